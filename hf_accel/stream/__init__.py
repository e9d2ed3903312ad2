"""One stream of step batches: what the model trains on next."""
