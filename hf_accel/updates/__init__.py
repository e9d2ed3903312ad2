"""Code that techniques share to change updates: averages, noise, trust ratios, rounds of ranks, learning rates."""
