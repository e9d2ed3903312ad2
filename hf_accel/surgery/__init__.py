"""Surgery on models: blocks, their wrappers, depth, width, and frozen models beside them."""
