"""Training of super-networks."""
