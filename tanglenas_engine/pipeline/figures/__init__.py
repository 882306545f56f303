"""Figures of a search and of what it found: one PNG each, byte-equal for equal input."""

from .network import architecture
from .results import candidates, confusion, pareto, predictions, rank_correlation
from .search import alphas, anytime, training

__all__ = [
    "alphas",
    "anytime",
    "architecture",
    "candidates",
    "confusion",
    "pareto",
    "predictions",
    "rank_correlation",
    "training",
]
