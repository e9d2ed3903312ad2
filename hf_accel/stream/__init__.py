"""Stream the step batches that the model trains on."""
