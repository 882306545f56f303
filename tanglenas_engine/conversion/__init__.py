"""Conversion of a torch module into a search space: record it, find its sizes, and make its layers elastic."""
