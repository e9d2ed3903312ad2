"""Define the format of checkpoints, write them and read them."""
