"""The engine of a run: techniques, steps, the optimizer, memory and checkpoints."""
