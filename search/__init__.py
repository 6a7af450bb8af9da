"""Which architecture to train: search against measured latency and a short-training proxy."""
