"""Comparisons of finished runs: groups over seeds, with their tables, figure and anytime curves."""
