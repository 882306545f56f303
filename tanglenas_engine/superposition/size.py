"""Sizes: the numbers of a network that an architecture decides.

A `Size` is a function of a few rows of choices. It is kept as the table of its values over all combinations of their
options. Arithmetic builds new tables, so `E * R` or `make_divisible(E * R, 8)` need no rule of their own. Code that
uses a Size enumerates its rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tanglenas_engine.errors import TangleNASError

Number = int | float


class SharedState(Protocol):
    """The state that the rows and layers of one space share: its `Superposition`."""

    rows: list[Row]

    def rank(self, depth: Size, layer: int) -> int:
        """Return the number of layers that a depth keeps before this one: by default the layer's own number."""


@dataclass(frozen=True, eq=False)
class Row:
    """A categorical variable: a choice, or one layer of a choice that is made per layer.

    Rows with equally many options are stacked, and `slot` is the row's place in its stack. `gate`, if any, is a pair
    (depth, layer). The row matters if its depth matters and exceeds the layer's rank.
    """

    choice: str
    layer: int | tuple[int, int] | None
    options: tuple[Any, ...]
    slot: int
    superposition: SharedState
    gate: tuple[Size, int] | None = None

    def __repr__(self) -> str:
        layer = ", ".join(map(str, self.layer)) if isinstance(self.layer, tuple) else self.layer
        return self.choice if layer is None else f"{self.choice}[{layer}]"

    @property
    def label(self) -> str:
        """The layer as people read it, counted from 1: "3", or "2.1" for the first block of the second stage."""
        place = self.layer if isinstance(self.layer, tuple) else (self.layer or 0,)
        return ".".join(str(number + 1) for number in place)

    def active(self, assignment: Assignment) -> bool:
        """Return whether the row matters under an assignment."""
        if self.gate is None:
            return True
        depth, layer = self.gate
        rank = self.superposition.rank(depth, layer)
        return all(row.active(assignment) for row in depth.rows) and depth.value(assignment) > rank


Assignment = Mapping[Row, int]
"""An architecture as the position of the chosen option in every row."""


def combinations(rows: Iterable[Row]) -> Iterator[dict[Row, int]]:
    """Yield all assignments of `rows`; the last row varies fastest."""
    rows = tuple(rows)
    for picks in itertools.product(*(range(len(row.options)) for row in rows)):
        yield dict(zip(rows, picks, strict=True))


class Size:
    """A number that depends on rows of choices. Supports `+`, `-`, `*`, `//` and `map`."""

    def __init__(self, rows: Iterable[Row], values: Iterable[Any]):
        self.rows = tuple(rows)
        self.values = tuple(values)
        self._max: int | None = None

    @classmethod
    def of(cls, number: Size | Number) -> Size:
        """Return `number` itself if it is a Size, else a constant Size."""
        return number if isinstance(number, Size) else Size((), (number,))

    @property
    def max(self) -> int:
        """The largest value: the dimension of the supernet's weight."""
        if self._max is None:  # every forward asks for it
            self._max = int(max(self.values))
        return self._max

    @property
    def min(self) -> int:
        return int(min(self.values))

    @property
    def used(self) -> int:
        """The part of the dimension that a search works on at present. It is all, except of a `PartialSize`."""
        return self.max

    def number(self, assignment: Assignment) -> Any:
        """Return the exact value under an assignment of at least this Size's rows."""
        index = 0
        for row in self.rows:
            index = index * len(row.options) + assignment[row]
        return self.values[index]

    def value(self, assignment: Assignment) -> int:
        """Return the value as a dimension. Fractions are cut, as in the paper's `int(embed_dim * mlp_ratio)`."""
        return int(self.number(assignment))

    def map(self, function: Callable[..., Number], *others: Size | Number) -> Size:
        """Return the Size `function(self, *others)`."""
        operands = (self, *map(Size.of, others))
        rows = dict.fromkeys(row for operand in operands for row in operand.rows)
        return Size(
            rows,
            (function(*(operand.number(picks) for operand in operands)) for picks in combinations(rows)),
        )

    def __add__(self, other: Size | Number) -> Size:
        return self.map(lambda a, b: a + b, other)

    def __sub__(self, other: Size | Number) -> Size:
        return self.map(lambda a, b: a - b, other)

    def __mul__(self, other: Size | Number) -> Size:
        return self.map(lambda a, b: a * b, other)

    def positive(self) -> Size:
        """Return the Size that is 1 where this one is positive, else 0."""
        return self.map(lambda value: int(value > 0))

    def __floordiv__(self, other: Size | Number) -> Size:
        return self.map(lambda a, b: a // b, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def round(self) -> Size:
        """Return the Size of the nearest integers, ties to even. Without it, fractions are cut."""
        return self.map(round)

    def __repr__(self) -> str:
        if not self.rows:
            return f"{self.values[0]}"
        return f"Size({', '.join(map(repr, self.rows))}: {sorted(set(self.values))})"


def make_divisible(size: Size | Number, divisor: int = 8, min_value: int | None = None) -> Size:
    """Return the multiple of `divisor` nearest to `size`, never more than 10 % below it (MobileNet's rule)."""

    def nearest(number: Number) -> int:
        rounded = max(min_value or divisor, int(number + divisor / 2) // divisor * divisor)
        return rounded + divisor if rounded < 0.9 * number else rounded

    return Size.of(size).map(nearest)


def divided(channels: Size | Number, groups: Size | Number) -> Size:
    """Return the number of channels of one group.

    Raises:
        TangleNASError: Some numbers of channels do not divide into their groups.
    """

    def per_group(channels: Number, groups: Number) -> int:
        channels, groups = int(channels), int(groups)
        if channels % groups:
            raise TangleNASError(f"{channels} channels do not divide into {groups} groups")
        return channels // groups

    return Size.of(channels).map(per_group, groups)


@dataclass(frozen=True, eq=False)
class Axis:
    """A dimension of a parameter, with the entries of it that an architecture uses.

    `layout` is the place of these entries: "prefix" are the first `size`, "window" are the central `size` (nested
    kernels), and "value" is entry j for the j-th distinct value of the size (depths).
    `blocks` repeats the prefix: q, k and v, stacked in one projection, have three.
    `role` is the use of the dimension. `mixture.COVERED` lists the roles that a mixture covers.
    `unit` is the number of consecutive entries that move as one if units are put in another order, such as the
    dimensions of a head. None stands for entries whose place has a meaning, which never move.
    """

    size: Size
    layout: str = "prefix"
    blocks: int = 1
    role: str = "read"
    unit: int | None = 1

    def __post_init__(self) -> None:
        self.size.number(dict.fromkeys(self.size.rows, 0))  # raises for a choice made per layer, which needs an index
        if any(isinstance(value, str) for value in self.size.values):
            raise TangleNASError(f"{self.size!r} is a choice between names, not a number: map it to one first")
        least = 0 if self.layout == "window" and self.size.max else 1  # a kernel may be absent, with its operation
        if self.layout != "value" and self.size.min < least:
            raise TangleNASError(f"a dimension must be at least {least}, but {self.size!r} can be {self.size.min}")
        sizes = {int(value) for value in self.size.values if value}
        if self.layout == "window" and len({size % 2 for size in sizes}) > 1:
            raise TangleNASError(
                f"nested kernels share their centre, but {self.size!r} mixes odd and even kernel sizes: "
                "choose all odd or all even ones"
            )

    @classmethod
    def of(cls, dimension: Axis | Size | Number, role: str) -> Axis:
        """Return the axis of a number or Size in `role`. An Axis keeps its own role."""
        return dimension if isinstance(dimension, Axis) else cls(Size.of(dimension), role=role)

    def in_role(self, role: str) -> Axis:
        """Return the same entries in another use. A fixed dimension stays one."""
        return self if self.role == "fixed" else replace(self, role=role)

    @property
    def length(self) -> int:
        """The number of entries of the supernet's full dimension."""
        return len(set(self.size.values)) if self.layout == "value" else self.size.max * self.blocks

    def used(self, assignment: Assignment) -> tuple[bool, ...]:
        """Return for each of the `length` entries whether the assignment uses it."""
        value = self.size.value(assignment)
        if self.layout == "value":
            return tuple(depth == value for depth in sorted({int(v) for v in self.size.values}))
        start = (self.size.max - value) // 2 if self.layout == "window" else 0
        return tuple(start <= i < start + value for i in range(self.size.max)) * self.blocks

    def entries(self, assignment: Assignment) -> int:
        """Return the number of entries that the assignment uses."""
        return self.size.value(assignment) * self.blocks


def stacked(size: Size | Number, blocks: int, unit: int | None = 1) -> Axis:
    """Return a dimension of `blocks` equal blocks, each `size` long, of units that do not mix (heads in q, k, v).

    A unit has `unit` consecutive entries (see `Axis`).
    """
    return Axis(Size.of(size), blocks=blocks, role="unit", unit=unit)
