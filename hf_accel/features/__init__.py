"""What techniques share that read, cut, mix and score examples."""
