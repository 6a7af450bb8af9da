"""What a device does: measured latencies of operators and of whole models."""
