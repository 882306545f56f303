"""Choices, the sizes made of them, and the masks of a mixture: README.md has the idea on one page."""
