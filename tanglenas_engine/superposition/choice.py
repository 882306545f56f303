"""Choices: the decisions that a search makes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.mixture import Superposition
from tanglenas_engine.superposition.size import Assignment, Number, Row, Size


class Choice(Size):
    """A named choice between options: one row of architecture parameters, or one row per layer.

    A choice with one row is itself a Size. A choice `per` layer has one Size per layer: `num_heads[3] * 64`, or
    `kernel_size[stage, block]` if every stage has its own depth.

    Args:
        name: The name of the choice in mixtures and architectures.
        options: Distinct positive numbers, or distinct names (such as names of operations; `map` turns them into
            numbers). Their order is that of the architecture parameters.
        superposition: The state that all layers of the space share.
        per: The layers that have one row each. A depth gives one row per layer, and a row counts only if its layer is
            below the chosen depth. A list of depths, or a depth that is itself chosen per stage, gives such rows for
            each stage. An int is the number of rows. A list of pairs (depth, layer) gives one row for each pair, where
            only some layers have the choice.

    Raises:
        TangleNASError: The options are empty, repeated, or not all positive numbers or all names.
    """

    def __init__(
        self,
        name: str,
        options: Iterable[Number | str],
        superposition: Superposition,
        per: Size | Sequence[Size] | Sequence[tuple[Size, int]] | int | None = None,
    ):
        several = isinstance(options, Iterable)
        if isinstance(options, str | set | frozenset) or (several and getattr(options, "shape", None) == ()):
            raise TangleNASError(
                f"choice {name!r} has the options {options!r}: give a list of them, which has an order"
            )
        options = tuple(map(_plain, options if several else (options,)))
        if not options:
            raise TangleNASError(f"choice {name!r} has no options: give at least one")
        numbers = [o for o in options if isinstance(o, int | float) and not isinstance(o, bool) and 0 < o < math.inf]
        names = [o for o in options if isinstance(o, str) and o]
        if len(options) not in (len(numbers), len(names)):
            wrong = next(o for o in options if o not in (names if len(names) > len(numbers) else numbers))
            raise TangleNASError(
                f"choice {name!r} has the option {wrong!r}: options are finite positive ints or floats, or all "
                "of them names"
            )
        if len(set(options)) < len(options):
            raise TangleNASError(f"choice {name!r} lists an option twice: {options}")
        self.name = name
        self.options: tuple[Any, ...] = options
        self.layered = per is not None

        def add(layer: int | tuple[int, int] | None, depth: Size | None = None, below: int = 0) -> Row:
            if depth is not None and len(depth.rows) != 1:
                raise TangleNASError(f"choice {name!r} is made per {depth!r}: expected a depth that is one choice")
            return superposition.add_row(name, layer, options, None if depth is None else (depth, below))

        if per is None:
            self.stages: tuple[tuple[Row, ...], ...] = ((add(None),),)
        elif isinstance(per, int):
            self.stages = (tuple(add(i) for i in range(per)),)
        elif isinstance(per, Size) and not (isinstance(per, Choice) and per.layered):
            self.stages = (tuple(add(i, per, i) for i in range(per.max)),)
        elif pairs := [pair for pair in per if isinstance(pair, tuple)]:
            self.stages = (tuple(add(layer, depth, layer) for depth, layer in pairs),)
        else:
            depths: Any = per
            self.stages = tuple(tuple(add((s, i), d, i) for i in range(d.max)) for s, d in enumerate(depths))
        super().__init__(itertools.chain(*self.stages), self.options)

    def __getitem__(self, layer: int | tuple[int, int]) -> Size:
        """Return the Size of one layer, given its number among all layers, or its stage and its number in the stage."""
        if not self.layered:
            raise TangleNASError(f"choice {self.name!r} is made once, not per layer: use it without an index")
        row = self.stages[layer[0]][layer[1]] if isinstance(layer, tuple) else self.rows[layer]
        return Size((row,), self.options)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Size]:
        return (self[layer] for layer in range(len(self)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the choice's mixing weights: `(options,)`, or `(layers, options)` for a choice per layer."""
        return (len(self), len(self.options)) if self.layered else (len(self.options),)

    def number(self, assignment: Assignment) -> Any:
        if self.layered:
            raise TangleNASError(f"choice {self.name!r} is made per layer: index it, as in {self.name}[0]")
        return super().number(assignment)

    def __repr__(self) -> str:
        return f"Choice({self.name!r}, {self.options}{f', layers={len(self)}' if self.layered else ''})"


def _plain(option: Any) -> Any:
    """Return a number of NumPy as Python's, which files of architectures can hold, and other options as they are."""
    return option.item() if isinstance(option, np.generic) else option
