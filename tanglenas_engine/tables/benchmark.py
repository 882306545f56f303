"""A table's metric as the measure of a search: of all architectures of a space, or of a random sample, a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tanglenas_engine.tables.table import Table

if TYPE_CHECKING:
    from tanglenas_engine.spaces.architecture import Architecture

MEASURED = {"test_acc": "test_accuracy", "test_loss": "test_loss"}
"""The columns that a network's own results can be compared with."""


class Benchmark:
    """A metric of a table that is tied to a space.

    A table looks up the architectures that it lists. A pool is a table of a few random architectures, less than half of
    the space, so it rarely has the one that was found. It also says which share of its networks is worse than the one
    found.

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

    @property
    def gaps(self) -> str:
        """A sentence about a table that lacks architectures of the space; "" for a table of all."""
        assert self.table.tied is not None
        count, size = len(self.table), self.table.tied.size
        if count == size:
            return ""
        told = f"the table lists {count:,} of {size:,} architectures: the values of all others are not known"
        if self.listed is None:
            return told
        return f"{told}. Evaluate says which share of these {count:,} is worse than the network found (a pool)"

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        """Return what `row` returns: a benchmark is a table of a search. The scripts of projects call it `row`."""
        return self.row(architecture)

    def row(self, architecture: Architecture) -> dict[str, float]:
        """Return the value, rank and regret of an architecture; nothing if the table lacks it."""
        assert self.table.tied is not None
        listed = self.table.tied.to_string(architecture) in self.table
        return self.table.row(architecture, self.metric) if listed else {}

    def judged(
        self, architecture: Architecture, measured: Mapping[str, float], trainings: Sequence[Sequence[float]] = ()
    ) -> dict[str, float]:
        """Return what the table says of a network: the values of its architecture, and its place in a pool.

        The arguments `measured` and `trainings` are those of `placed`.
        """
        return {**self.row(architecture), **self.placed(measured, trainings)}

    def placed(self, measured: Mapping[str, float], trainings: Sequence[Sequence[float]] = ()) -> dict[str, float]:
        """Return the percentile of a network in the pool, with the ends of its 95 % interval; nothing without a pool.

        The percentile is the share of the pool, in %, that is worse. Its interval is that of Clopper and Pearson for
        this share in all networks of which the pool is a sample. With several trainings of each network, the share is
        the mean of the shares that single trainings give, and is treated as one of as many networks.

        Args:
            measured: The results of one training of the network by name, as `metrics/evaluate.json` has them.
            trainings: The pool's values of the metric, a sequence for each training seed. Without any, the table's
                values are taken. Of several seeds these are means, which differ by less than single trainings do, so
                that one training would look better or worse than most.
        """
        name = MEASURED.get(self.metric, self.metric)
        if self.listed is None or name not in measured:
            return {}
        from scipy import stats  # type: ignore[import-untyped]

        column = self.table.columns[self.metric]
        values = np.array(trainings) if trainings else column[None]  # (seeds, networks)
        beats = np.less if self.table.higher_is_better(self.metric) else np.greater
        size = values.shape[1]
        worse = size * float(beats(values, measured[name]).mean())
        ends = {
            "percentile": worse / size,
            "percentile_low": stats.beta.ppf(0.025, worse, size - worse + 1) if worse > 0 else 0.0,
            "percentile_high": stats.beta.ppf(0.975, worse + 1, size - worse) if worse < size else 1.0,
        }
        return {f"pool_{key}": 100.0 * float(share) for key, share in ends.items()} | {"pool_size": size}
