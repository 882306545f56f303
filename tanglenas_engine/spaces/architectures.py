"""The architectures of a space: which there are, how to name one, and which is the best by a score."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tanglenas_engine.errors import TangleNASError, closest, unknown
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.cost import Cost
from tanglenas_engine.superposition.choice import Choice
from tanglenas_engine.superposition.mixture import Mixture, Superposition
from tanglenas_engine.superposition.size import Assignment, Row


class Architectures:
    """The set of architectures of a space.

    An architecture is composed of independent decisions, each a list of alternatives for the same rows. By default
    every row is decided by itself. A space in which not every assignment is an architecture overrides `decisions`,
    and what else is here follows: samples, extremes, the most probable architecture, and budgets.

    Attributes:
        choices: The choices by name, in order of declaration.
        superposition: The state that holds their rows.
    """

    name: str = ""
    choices: dict[str, Choice]
    superposition: Superposition

    @property
    def label(self) -> str:
        """The name in messages, in quotes."""
        return repr(self._key)

    @property
    def rows(self) -> list[Row]:
        """All rows of choices, in order of declaration."""
        return self.superposition.rows

    @property
    def size(self) -> int:
        """The exact number of distinct architectures."""
        gated: dict[Row | None, list[Row]] = {}
        for row in self.rows:
            gated.setdefault(row.gate[0].rows[0] if row.gate else None, []).append(row)

        def ways(depth: Row | None, assignment: dict[Row, int]) -> int:
            """Count the ways to choose the rows that `depth` decides about, and those that they decide about."""
            rows = [row for row in gated.get(depth, []) if row.active(assignment)]
            return math.prod(sum(ways(r, {**assignment, r: i}) for i in range(len(r.options))) for r in rows)

        return ways(None, {})

    def assigned_cost(self, assignment: Assignment) -> Cost:
        """Return the exact cost of an assignment, which need not be an architecture."""
        raise NotImplementedError

    # What a space may override.

    def decisions(self) -> Iterator[list[dict[Row, int]]]:
        """Yield the decisions that an architecture is composed of, each as its alternatives."""
        return ([{row: i} for i in range(len(row.options))] for row in self.rows)

    def moves(self, assignment: Assignment) -> Iterator[dict[Row, int]]:
        """Yield the smallest changes that lead from an architecture to others; those of different rows combine."""
        return ({row: i} for row in self.rows for i in range(len(row.options)) if i != assignment[row])

    def scores(self, mixture: Mixture) -> dict[Row, list[float]]:
        """Return what each option contributes to an architecture's score: by default, its log-probability.

        Where edges have a weight of their own, it counts as that of each of their operations.
        """
        stacks = {count: stack.clamp_min(1e-12).log().tolist() for count, stack in mixture.detach().stacks.items()}
        edges = {row: math.log(max(weight.item(), 1e-12)) for row, weight in mixture.edges.items()}
        return {row: [s + edges.get(row, 0.0) for s in stacks[len(row.options)][row.slot]] for row in self.rows}

    # What follows from the decisions.

    def best(self, scores: Mapping[Row, Sequence[Any]]) -> Architecture:
        """Return the architecture whose options have the highest sum of scores; of equals the first."""
        picks: dict[Row, int] = {}
        for alternatives in self.decisions():
            totals = [sum(scores[row][option] for row, option in one.items()) for one in alternatives]
            picks |= alternatives[totals.index(max(totals))]
        return self.architecture_of(picks)

    def most_probable(self, mixture: Mixture) -> Architecture:
        """Return the architecture that a mixture stands for: the one of the highest score."""
        return self.best(self.scores(mixture))

    def sample(self, generator: torch.Generator | None = None) -> Architecture:
        """Return a random architecture: every decision uniform over its alternatives."""
        picks: dict[Row, int] = {}
        for alternatives in self.decisions():
            picks |= alternatives[int(torch.randint(len(alternatives), (), generator=generator))]
        return self.architecture_of(picks)

    def largest(self) -> Architecture:
        """Return the architecture of the largest options; between names, those with most parameters, then MACs."""
        return self.best(self._option_sizes())

    def smallest(self) -> Architecture:
        """Return the architecture of the smallest options; between names, those with fewest parameters, then MACs."""
        sizes = self._option_sizes()
        return self.best({row: [-size for size in options] for row, options in sizes.items()})

    def _option_sizes(self) -> dict[Row, list[Any]]:
        """Return how large each option is: the number itself, or the cost of a named one beside first options."""
        first = dict.fromkeys(self.rows, 0)

        def named(row: Row, option: int) -> int:
            cost = self.assigned_cost({**first, row: option})
            return int(cost.params << 64 | cost.flops)  # parameters first; MACs decide between equals

        return {
            row: [named(row, i) if isinstance(option, str) else option for i, option in enumerate(row.options)]
            for row in self.rows
        }

    # There and back.

    def architecture(self, **choices: Any) -> Architecture:
        """Return the architecture with these options: one per choice, or a list with one per layer (those in use)."""
        for name in choices:
            if name not in self.choices:
                raise unknown(f"choice of {self.label}", name, self.choices)
        missing = [name for name in self.choices if name not in choices]
        if missing:
            raise TangleNASError(f"an architecture of {self.label} also needs: {', '.join(missing)}")
        assignment: dict[Row, int] = {}
        for name, choice in self.choices.items():
            given = choices[name]
            values = list(given) if choice.layered and isinstance(given, list | tuple) else [given]
            rows = [row for row in choice.layer_rows if row.active(assignment)]
            if choice.layered != isinstance(given, list | tuple) or len(values) < len(rows):
                expected = f"a list of {len(rows)} options" if choice.layered else "one option"
                raise TangleNASError(f"choice {name!r} of {self.label} is {given!r}, expected {expected}")
            if len(values) not in (len(rows), len(choice.layer_rows)):
                used = f", {len(rows)} of them in use" if len(rows) < len(choice.layer_rows) else ""
                raise TangleNASError(
                    f"choice {name!r} has {len(choice.layer_rows)} layers{used}, but {len(values)} were given"
                )
            for row, value in zip(rows if len(values) == len(rows) else choice.layer_rows, values, strict=True):
                if row not in rows:
                    continue
                if value not in row.options:
                    raise TangleNASError(
                        f"choice {row!r} of {self.label} is {value!r}, expected one of "
                        f"{', '.join(map(str, row.options))}"
                    )
                assignment[row] = row.options.index(value)
        return self.architecture_of(assignment)

    def architecture_of(self, assignment: Assignment) -> Architecture:
        """Return the architecture of an assignment; rows beyond the depth are dropped."""
        choices = {}
        for name, choice in self.choices.items():
            options = tuple(r.options[assignment[r]] for r in choice.layer_rows if r.active(assignment))
            choices[name] = options if choice.layered else options[0]
        return Architecture(self._key, choices)

    def assignment_of(self, architecture: Architecture) -> dict[Row, int]:
        """Return the assignment of an architecture; rows beyond the depth take their first option.

        Raises:
            TangleNASError: The architecture is of another space, or has options that this one lacks.
        """
        if architecture.space != self._key:
            raise TangleNASError(
                f"the architecture is of the space {architecture.space!r}, not of {self.label}: "
                f"create that space, or search this one.{closest(architecture.space, [self.name])}"
            )
        architecture = self.architecture(**architecture.choices)
        assignment = {row: 0 for row in self.rows}
        for name, choice in self.choices.items():
            value = architecture.choices[name]
            rows = [row for row in choice.layer_rows if row.active(assignment)]
            for row, option in zip(rows, value if choice.layered else [value], strict=True):
                assignment[row] = row.options.index(option)
        return assignment

    @property
    def _key(self) -> str:
        """The name of the space in architectures and files."""
        return self.name or type(self).__name__
