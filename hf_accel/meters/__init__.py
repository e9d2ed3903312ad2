"""Meters: floating-point operations, energy, and the time limit of a job."""
