"""The command line: ``hf-accel``."""

from hf_accel.cli.app import app

__all__ = ["app"]
