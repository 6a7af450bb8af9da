"""Hugging Face: the classes transformers loads, export, and upload."""
