"""Benchmark tables: look up what an architecture is worth, its rank and its regret.

    table = load_table("nb201.table.csv.gz", space)
    table.rank(architecture, "c10_test200")

Importing this loads numpy, but not torch. The project ships no table: a path to one's own copy is given.
"""

from .pickles import read_pickle
from .reading import load_table
from .table import Check, Notation, Table, kendall_tau, rank_correlations, spearman

__all__ = [
    "Check",
    "Notation",
    "Table",
    "kendall_tau",
    "load_table",
    "rank_correlations",
    "read_pickle",
    "spearman",
]
