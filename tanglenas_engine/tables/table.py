"""Benchmark tables: the metrics of every architecture of a space, each trained by itself."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tanglenas_engine.errors import TangleNASError, shown, unknown
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.superposition.size import combinations
from tanglenas_engine.tables.metrics import expected, kind_of, possible

if TYPE_CHECKING:
    from tanglenas_engine.spaces.space import SearchSpace

EXAMPLES = 3
"""The number of architectures that a report names for each kind of fault."""


class Table:
    """Metrics of architectures: accuracies in %, other numbers, and costs, of which less is better.

    The name of a metric says which it is (see `metrics.kind_of`). A metric whose name does not say has values, but
    neither ranks nor a best architecture, until `higher_is_better` says it.

    Questions name an architecture by its key, the text under which the table lists it. A table that is tied to a space
    (`table.of(space)`) also takes an `Architecture`, and any text that the space reads.

    Args:
        keys: The architectures as text, each once.
        columns: For each metric, one finite value per architecture, shape `(len(keys),)`.
        space: The name of the space in whose notation the keys are. None if it is not known.
        higher_is_better: For metrics by name, True if more is better, instead of what the name says.

    Attributes:
        tied: The space that the table is tied to, or None.
        named: The name of the space that its values are of, as the file says it, or None. It differs from `space` where
            the table is tied to another size of that space.
        fractions: The accuracies that the table's file gives as fractions of 1. The table has them in %.
        key_columns: The columns of the file that are a key together, in the order of the keys, or ().

    Raises:
        TangleNASError: A key comes twice, a column has another length, a value is none that its metric can have, or
            `higher_is_better` names a metric that is not there.
    """

    def __init__(
        self,
        keys: Iterable[str],
        columns: Mapping[str, Sequence[float] | NDArray[Any]],
        space: str | None,
        higher_is_better: Mapping[str, bool] | None = None,
    ):
        self.space = self.named = space
        self.fractions: tuple[str, ...] = ()
        self.key_columns: tuple[str, ...] = ()
        self.keys = tuple(keys)
        self.columns = {metric: np.asarray(values, dtype=np.float64) for metric, values in columns.items()}
        self.tied: SearchSpace | None = None
        self._index = {key: i for i, key in enumerate(self.keys)}
        self._sorted: dict[str, NDArray[np.float64]] = {}
        self.directions = dict(higher_is_better or {})
        for metric in self.directions:
            self._column(metric)
        if len(self._index) < len(self.keys):
            twice = next(key for i, key in enumerate(self.keys) if self._index[key] != i)
            raise TangleNASError(f"the table lists {twice!r} twice: remove one of them")
        for metric, column in self.columns.items():
            if column.shape != (len(self.keys),):
                raise TangleNASError(
                    f"metric {metric!r} has shape {column.shape}, expected one value for each of {len(self.keys)} keys"
                )
            kind = kind_of(metric)
            if len(column) and not (possible(kind, column.min()) and possible(kind, column.max())):  # nan is neither
                i = next(i for i, value in enumerate(column) if not possible(kind, value))
                raise TangleNASError(f"{metric} of {self.keys[i]} is {column[i]}, expected {expected(kind)}")

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.columns)

    def higher_is_better(self, metric: str) -> bool | None:
        """Return True if more of the metric is better, False if less is, or None if nothing says so."""
        self._column(metric)
        kind = kind_of(metric)
        return self.directions.get(metric, None if kind is None else kind != "less")

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: object) -> bool:
        """Return whether the table lists an architecture under exactly this text."""
        return key in self._index

    def __repr__(self) -> str:
        return f"Table({self.space or 'unknown space'}, {len(self)} architectures, {', '.join(self.metrics)})"

    # Questions.

    def value(self, architecture: Architecture | str, metric: str) -> float:
        """Return the metric of an architecture: an accuracy in %, or a cost in the table's own unit."""
        column = self._column(metric)
        return float(column[self._position(architecture)])

    def rank(self, architecture: Architecture | str, metric: str) -> int:
        """Return the rank of an architecture, 1 for the best. Equal values share the better rank."""
        value, ordered = self.value(architecture, metric), self._ordered(metric)
        if not self._direction(metric):
            return 1 + int(np.searchsorted(ordered, value, side="left"))
        return 1 + len(self) - int(np.searchsorted(ordered, value, side="right"))

    def regret(self, architecture: Architecture | str, metric: str) -> float:
        """Return the distance from the best value, at least 0: percentage points, or the cost's unit."""
        return abs(self.value(self.best(metric), metric) - self.value(architecture, metric))

    def row(self, architecture: Architecture | str, metric: str) -> dict[str, float]:
        """Return value, rank and regret under the names of a history's columns."""
        return {
            "table_value": self.value(architecture, metric),
            "table_rank": self.rank(architecture, metric),
            "table_regret": self.regret(architecture, metric),
        }

    def best(self, metric: str) -> str:
        """Return the key of the best architecture, the first of equals."""
        column = self._column(metric)
        return self.keys[int(column.argmax() if self._direction(metric) else column.argmin())]

    def worst(self, metric: str) -> str:
        """Return the key of the worst architecture, the first of equals."""
        column = self._column(metric)
        return self.keys[int(column.argmin() if self._direction(metric) else column.argmax())]

    def median(self, metric: str) -> float:
        """Return the median over all architectures."""
        return float(np.median(self._column(metric)))

    # Spaces.

    def of(self, space: SearchSpace) -> Table:
        """Return this table tied to a space, with keys in the space's own notation.

        Architectures of the space may be missing from the table: `check` tells.

        Raises:
            TangleNASError: The table lists an architecture twice or one of another space.
        """
        keys: Sequence[str | None] = self.keys
        if self.space != _label(space):
            keys = self._names(space)
        named = [key for key in keys if key is not None]
        if len(set(named)) < len(keys):
            raise TangleNASError(f"{self.check(space)}. Remove what is wrong, or name the right space")
        table = Table(named, self.columns, _label(space), self.directions)
        table.tied, table.named, table.fractions = space, self.named, self.fractions
        table.key_columns = space.table_columns if self._order(space) else self.key_columns
        return table

    @property
    def origin(self) -> str:
        """A sentence where the values are of another space than the one that the table is tied to, else ""."""
        if self.tied is None or self.named in (None, self.space):
            return ""
        return f"the table is of {shown(self.named, 80)}: its values are of networks of that space, not of {self.space}"

    def check(self, space: SearchSpace) -> Check:
        """Compare with a space. Find the architectures that are missing, listed twice, or not of the space."""
        found: dict[str, str] = {}
        foreign, duplicates = [], []
        for key, name in zip(self.keys, self._names(space), strict=True):
            if name is None:
                foreign.append(key)
            elif name in found:
                duplicates.append(f"{found[name]} as {key}")
            else:
                found[name] = key
        missing: dict[str, None] = {}
        if len(found) < space.size:
            for assignment in combinations(space.rows):
                name = space.to_string(space.architecture_of(assignment))
                if name not in found:
                    missing[name] = None
                if len(missing) == EXAMPLES:
                    break
        return Check(_label(space), space.size, len(found), tuple(missing), tuple(duplicates), tuple(foreign))

    def _names(self, space: SearchSpace) -> list[str | None]:
        """Return the space's own text for every key, None where the key is no architecture of the space."""
        names: list[str | None] = []
        order = self._order(space)
        for key in self.keys:
            try:
                options = key.split(", ")
                if order and len(options) == len(self.key_columns):
                    key = ", ".join(options[place] for place in order)
                names.append(space.to_string(space.from_string(key)))
            except TangleNASError:
                names.append(None)
        return names

    def _order(self, space: SearchSpace) -> list[int]:
        """Return where the file has each column of a space, or [] where it lacks one."""
        if not set(space.table_columns) <= set(self.key_columns):
            return []
        return [self.key_columns.index(name) for name in space.table_columns]

    # Files.

    def write(self, path: str | Path) -> None:
        """Write the canonical CSV, compressed if the name ends in `.gz`. Equal tables give equal bytes.

        The header of the first column is `architecture of SPACE`. It names the space whose notation the keys are in.
        A metric whose name does not say which direction is better has it behind its name.

        Raises:
            TangleNASError: The table is of no space.
        """
        if self.space is None:
            raise TangleNASError("a file says which space its architectures are of: tie the table to one by table.of()")
        from tanglenas_engine.runtime.files import write_atomic

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([HEADER + self.space, *map(self._header, self.metrics)])
        for key, *values in zip(self.keys, *self.columns.values(), strict=True):
            writer.writerow([key, *(repr(float(value)).removesuffix(".0") for value in values)])
        data = text.getvalue().encode()
        write_atomic(path, gzip.compress(data, mtime=0) if Path(path).suffix == ".gz" else data)

    def _header(self, metric: str) -> str:
        told = self.directions.get(metric)
        return metric if told is None else f"{metric} ({'more' if told else 'less'} is better)"

    def _direction(self, metric: str) -> bool:
        """Return whether more of the metric is better.

        Raises:
            TangleNASError: Nothing says so.
        """
        higher = self.higher_is_better(metric)
        if higher is None:
            raise TangleNASError(
                f"the name {metric!r} does not say whether more or less of it is better: give it a usual name, such as "
                f"{metric}_error or {metric}_score, or say it: `tanglenas tables import --higher {metric}` or "
                f"`--lower {metric}`, or benchmark.higher_is_better = True or False in the gin file"
            )
        return higher

    def _column(self, metric: str) -> NDArray[np.float64]:
        if metric not in self.columns:
            raise unknown("metric", metric, self.columns)
        return self.columns[metric]

    def _ordered(self, metric: str) -> NDArray[np.float64]:
        """Return the column in ascending order. It is sorted once, on the first question."""
        if metric not in self._sorted:
            self._sorted[metric] = np.sort(self._column(metric))
        return self._sorted[metric]

    def _position(self, architecture: Architecture | str) -> int:
        key = architecture
        if key not in self._index and self.tied is not None:
            if isinstance(key, str):
                key = self.tied.from_string(key)
            key = self.tied.to_string(key)
        if isinstance(key, Architecture):
            raise TangleNASError(
                f"the table is not tied to a space, so it cannot look up an architecture of {key.space!r}: "
                "load it with load_table(path, space), or ask for the text under which it lists the architecture"
            )
        if key not in self._index:
            raise TangleNASError(
                f"the table has no architecture {key[:200]!r}. It lists {len(self)}, written like {self.keys[0]!r}"
            )
        return self._index[key]


@dataclass(frozen=True)
class Check:
    """A comparison of a table with a space. The table lists `found` of the space's `size` architectures.

    `missing` names the first few. `duplicates` and `foreign` are complete.
    """

    space: str
    size: int
    found: int
    missing: tuple[str, ...]
    duplicates: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """True if the table lists every architecture of the space once, and no other."""
        return not (self.missing or self.duplicates or self.foreign)

    def __str__(self) -> str:
        if self.complete:
            return f"all {self.size} architectures of {self.space}"
        faults = [f"{self.found} of the {self.size} architectures of {self.space}"]
        for count, what, listed in (
            (self.size - self.found, "missing", self.missing),
            (len(self.duplicates), "listed twice", self.duplicates),
            (len(self.foreign), "not of this space", self.foreign),
        ):
            if count:
                faults.append(f"{count} {what}, such as {'; '.join(text[:200] for text in listed[:EXAMPLES])}")
        return ". ".join(faults)


HEADER = "architecture of "


def _label(space: SearchSpace) -> str:
    return space.name or type(space).__name__


def kendall_tau(scores: Mapping[Architecture | str, float], table: Table, metric: str) -> float:
    """Return Kendall's tau-b between predicted scores (more is better) and the table, over the scored architectures.

    It is 1 for the table's order and -1 for the reverse. It is nan if all scores, or all values, are equal.

    Raises:
        TangleNASError: Fewer than two architectures have a score, or a score is not finite.
    """
    return _compared(scores, table, metric)["kendall_tau"]


def spearman(scores: Mapping[Architecture | str, float], table: Table, metric: str) -> float:
    """Return Spearman's rank correlation between scores and the table; see `kendall_tau`."""
    return _compared(scores, table, metric)["spearman"]


def rank_correlations(predicted: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """Return Kendall's tau-b and Spearman's correlation of two lists. In both lists more is better.

    Raises:
        TangleNASError: The lists have fewer than two values.
    """
    from scipy.stats import kendalltau, spearmanr  # type: ignore[import-untyped]

    if len(predicted) < 2:
        raise TangleNASError(f"a rank correlation needs 2 architectures or more, but {len(predicted)} have a score")
    measures = {"kendall_tau": kendalltau, "spearman": spearmanr}
    if len(set(predicted)) == 1 or len(set(true)) == 1:
        return dict.fromkeys(measures, math.nan)
    return {name: float(measure(predicted, true).statistic) for name, measure in measures.items()}


def _compared(scores: Mapping[Architecture | str, float], table: Table, metric: str) -> dict[str, float]:
    for architecture, score in scores.items():
        if not math.isfinite(score):
            raise TangleNASError(f"the score of {architecture} is {score}, expected a finite number")
    true = [table.value(architecture, metric) * (1 if table._direction(metric) else -1) for architecture in scores]
    return rank_correlations(list(scores.values()), true)
