"""What a small language model is, and how to train, run and export it."""
