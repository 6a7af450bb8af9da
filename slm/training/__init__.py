"""Training of one model: data, loss, optimizer, checkpoints, metrics."""
