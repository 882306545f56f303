"""What a stage depends on and DVC does not see by itself: data, code, weights and the environment."""
