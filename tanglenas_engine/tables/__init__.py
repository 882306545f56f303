"""Benchmark tables: the value, rank and regret of an architecture.

    table = load_table("nb201.table.csv.gz", space)
    table.rank(architecture, "c10_test200")

This package imports numpy, but not torch. The project ships no table: users give the path of their own copy.
"""

from .benchmark import Benchmark
from .pickles import read_pickle
from .reading import load_table
from .table import Check, Table, kendall_tau, rank_correlations, spearman

__all__ = [
    "Benchmark",
    "Check",
    "Table",
    "kendall_tau",
    "load_table",
    "rank_correlations",
    "read_pickle",
    "spearman",
]
