"""A table's metric as the measure of a search: of all architectures of a space, or of a random sample, a pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tanglenas_engine.tables.table import Table

if TYPE_CHECKING:
    from tanglenas_engine.spaces.architecture import Architecture

MEASURED = {"test_acc": "test_accuracy", "test_loss": "test_loss"}
"""The columns that a network's own results can be compared with."""


class Benchmark:
    """A metric of a table that is tied to a space.

    A table of the whole space looks an architecture up; it may lack some. A pool is a table of a few random
    architectures, less than half of the space, so it rarely has the one that was found. It says instead which share of
    its networks is worse than the one found.

    Args:
        table: The table, tied to its space.
        metric: The metric's name.

    Attributes:
        listed: The architectures of a pool, or None for a table of the whole space.

    Raises:
        TangleNASError: The metric is unknown, or its direction is.
    """

    def __init__(self, table: Table, metric: str):
        assert table.tied is not None
        self.table, self.metric = table, metric
        table.best(metric)  # an unknown metric is refused before the search, not after an epoch
        space = table.tied
        self.listed: list[Architecture] | None = None
        if 2 * len(table) < space.size:
            self.listed = [space.from_string(key) for key in table.keys]

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        """Return the value, rank and regret of an architecture; nothing if the table is a pool."""
        return {} if self.listed is not None else self.row(architecture)

    def row(self, architecture: Architecture) -> dict[str, float]:
        """Return the value, rank and regret of an architecture; nothing if the table lacks it."""
        assert self.table.tied is not None
        listed = self.table.tied.to_string(architecture) in self.table
        return self.table.row(architecture, self.metric) if listed else {}

    def judged(self, architecture: Architecture, **measured: float) -> dict[str, float]:
        """Return what the table says of a network: the values of its architecture, or its place in a pool."""
        return {**self(architecture), **self.placed(measured)}

    def placed(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Return the percentile of a network in the pool, with the ends of its 95 % interval; nothing without a pool.

        The percentile is the share of the pool, in %, that is worse. Its interval is that of Clopper and Pearson for
        this share in all networks of which the pool is a sample.

        Args:
            measured: The network's results by name, as `metrics/evaluate.json` has them.
        """
        name = MEASURED.get(self.metric, self.metric)
        if self.listed is None or name not in measured:
            return {}
        from scipy import stats  # type: ignore[import-untyped]

        column, value = self.table.columns[self.metric], measured[name]
        worse = int(((column < value) if self.table.higher_is_better(self.metric) else (column > value)).sum())
        interval = stats.binomtest(worse, len(column)).proportion_ci(method="exact")
        ends = {"percentile": worse / len(column), "percentile_low": interval.low, "percentile_high": interval.high}
        return {f"pool_{key}": 100.0 * float(share) for key, share in ends.items()} | {"pool_size": len(column)}
