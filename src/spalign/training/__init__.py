"""Training: the loss, the batches, the trainer. Importing this package loads torch."""
