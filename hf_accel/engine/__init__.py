"""The engine of a run: who takes part, the step, the optimizer, memory and checkpoints."""
