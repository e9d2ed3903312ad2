"""Tools around a run: doctor, planning, lint, calibration, soups, and running scripts."""
