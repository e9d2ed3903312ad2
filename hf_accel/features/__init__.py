"""Code that techniques share to read, cut, mix and score examples."""
