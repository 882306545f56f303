"""Measurements of the cost of a search. README.md says how to repeat them."""
