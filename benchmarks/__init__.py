"""What a search costs, measured. README.md says how to repeat it."""
