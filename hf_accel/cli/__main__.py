"""``python -m hf_accel.cli``, for launchers of several processes."""

from hf_accel.cli.app import app

if __name__ == "__main__":
    app()
