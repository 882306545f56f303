"""Training and measuring a network."""
