"""Gin files and bindings, params.yaml, and the functions that they set."""
