"""The set of architectures of a space: counting, sampling, building, and finding the best one by a score."""

from __future__ import annotations

import itertools
import math
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tanglenas_engine.errors import TangleNASError, closest, unknown
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.cost import Additive, Cost
from tanglenas_engine.spaces.decisions import LEAST, Decision, expected
from tanglenas_engine.superposition.choice import Choice
from tanglenas_engine.superposition.mixture import Mixture, Superposition
from tanglenas_engine.superposition.size import Assignment, Row, combinations


class Architectures:
    """The set of architectures of a space.

    An architecture is composed of independent decisions. A decision is a list of alternatives for the same rows. By
    default, each row is a decision of its own. A space in which some assignments are not architectures overrides
    `decisions`. The other methods follow from `decisions`: samples, extremes, the most probable architecture, and
    budgets.

    Attributes:
        name: The name under which the space is registered.
        table_columns: The columns of a benchmark table with one for each option of an architecture, in the order in
            which `from_string` reads them with ", " between them; () if there is no such table.
        choices: The choices by name, in order of declaration.
        superposition: The state that holds the rows of the choices.
    """

    name: str = ""
    table_columns: tuple[str, ...] = ()
    choices: dict[str, Choice]
    superposition: Superposition

    @property
    def label(self) -> str:
        """The space's name in messages, in quotes."""
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
            """Count the ways to choose the rows gated by `depth`, with the rows gated by those in turn."""
            rows = [row for row in gated.get(depth, []) if row.active(assignment)]
            return math.prod(sum(ways(r, {**assignment, r: i}) for i in range(len(r.options))) for r in rows)

        return ways(None, {})

    def assigned_cost(self, assignment: Assignment) -> Cost:
        """Return the exact cost of an assignment, which does not have to be an architecture."""
        raise NotImplementedError

    # Methods that a space may override.

    def decisions(self) -> Iterator[list[dict[Row, int]]]:
        """Yield the decisions that compose an architecture. Each decision is the list of its alternatives."""
        return ([{row: i} for i in range(len(row.options))] for row in self.rows)

    def moves(self, assignment: Assignment) -> Iterator[dict[Row, int]]:
        """Yield the smallest changes from one architecture to another. Changes of different rows can be combined."""
        return ({row: i} for row in self.rows for i in range(len(row.options)) if i != assignment[row])

    def scores(self, mixture: Mixture) -> dict[Row, list[float]]:
        """Return each option's contribution to an architecture's score: its log-probability, or 0 if it has no score.

        If edges have weights, the log of an edge's weight is added to the score of each of its operations.
        """
        stacks = {count: stack.clamp_min(LEAST).log().tolist() for count, stack in mixture.detach().stacks.items()}
        edges = {row: math.log(max(weight.item(), LEAST)) for row, weight in mixture.edges.items()}
        return {
            row: [
                score + edges.get(row, 0.0) if self.has_score(row, option) else 0.0
                for option, score in enumerate(stacks[len(row.options)][row.slot])
            ]
            for row in self.rows
        }

    def has_score(self, row: Row, option: int) -> bool:
        """Return whether an option counts in an architecture's score. One that says that something is absent does not.

        Architectures are drawn with probabilities in proportion to the exponential of their scores.
        """
        return True

    # Methods that follow from the decisions.

    @cached_property
    def _decided(self) -> dict[Row, Decision]:
        """The decision of each row, or nothing if all rows are independent."""
        found = [Decision(alternatives, self.has_score) for alternatives in self.decisions()]
        if all(decision.is_independent for decision in found):
            return {}
        return {row: decision for decision in found for row in decision.picks}

    def expectation_of(self, terms: Additive, mixture: Mixture) -> Tensor:
        """Return the expectation of a sum of tables over the architectures that `sample` draws by a mixture's scores.

        Returns:
            A float64 scalar, differentiable in the mixture.
        """
        return expected(terms, self._decided, mixture) if self._decided else terms.expected(mixture)

    def all_architectures(self) -> Iterator[Architecture]:
        """Yield each architecture of the space once. `size` says how many there are."""
        seen: set[str] = set()
        for picks in itertools.product(*self.decisions()):
            architecture = self.architecture_of(dict(ChainMap(*picks)))
            if architecture.digest not in seen:
                seen.add(architecture.digest)
                yield architecture

    def best(self, scores: Mapping[Row, Sequence[Any]]) -> Architecture:
        """Return the architecture with the highest sum of scores. The first one wins a tie."""
        picks: dict[Row, int] = {}
        for alternatives in self.decisions():
            totals = [sum(scores[row][option] for row, option in one.items()) for one in alternatives]
            picks |= alternatives[totals.index(max(totals))]
        return self.architecture_of(picks)

    def most_probable(self, mixture: Mixture) -> Architecture:
        """Return the architecture with the highest score under a mixture."""
        return self.best(self.scores(mixture))

    def sample(
        self, generator: torch.Generator | None = None, scores: Mapping[Row, Sequence[float]] | None = None
    ) -> Architecture:
        """Return a random architecture.

        Args:
            scores: Log-probabilities of every row's options. The probability of an alternative of a decision is in
                proportion to the product over its rows. None makes each decision uniform over its alternatives.
        """
        picks: dict[Row, int] = {}
        for alternatives in self.decisions():
            if scores is None:
                picks |= alternatives[int(torch.randint(len(alternatives), (), generator=generator))]
            else:
                picks |= alternatives[draw(weights_of(alternatives, scores), generator)]
        return self.architecture_of(picks)

    def largest(self) -> Architecture:
        """Return the architecture with the largest options. Named options compare by parameters, then by MACs."""
        return self.best(self._option_sizes())

    def smallest(self) -> Architecture:
        """Return the architecture with the smallest options. Named options compare by parameters, then by MACs."""
        sizes = self._option_sizes()
        return self.best({row: [-size for size in options] for row, options in sizes.items()})

    def _option_sizes(self) -> dict[Row, list[Any]]:
        """Return the size of each option: its number, or its cost if it is a name.

        The cost is that of an assignment in which all other rows take their first option, but for depths: a row of a
        layer matters where the layer is there.
        """
        first = dict.fromkeys(self.rows, 0)

        def named(row: Row, option: int) -> int:
            cost = self.assigned_cost({**first, **_deepest(row), row: option})
            return int(cost.params << 64 | cost.macs)  # compares parameters first, then MACs

        return {
            row: [named(row, i) if isinstance(option, str) else option for i, option in enumerate(row.options)]
            for row in self.rows
        }

    # From options to architectures, and from architectures to assignments.

    def architecture(self, **choices: Any) -> Architecture:
        """Return the architecture with these options.

        Args:
            choices: For each choice one option, or a list with one option per layer. A list may leave out layers that
                are not used.

        Raises:
            TangleNASError: A choice is unknown or missing, or has an unknown option or a wrong number of options.
        """
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
            rows = [row for row in choice.rows if row.active(assignment)]
            if choice.layered != isinstance(given, list | tuple) or len(values) < len(rows):
                expected = f"a list of {len(rows)} options" if choice.layered else "one option"
                raise TangleNASError(f"choice {name!r} of {self.label} is {given!r}, expected {expected}")
            if len(values) not in (len(rows), len(choice.rows)):
                used = f", {len(rows)} of them in use" if len(rows) < len(choice.rows) else ""
                raise TangleNASError(
                    f"choice {name!r} has {len(choice.rows)} layers{used}, but {len(values)} were given"
                )
            for row, value in zip(rows if len(values) == len(rows) else choice.rows, values, strict=True):
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
        """Return the architecture of an assignment. Rows beyond the depth are dropped."""
        choices = {}
        for name, choice in self.choices.items():
            options = tuple(r.options[assignment[r]] for r in choice.rows if r.active(assignment))
            choices[name] = options if choice.layered else options[0]
        return Architecture(self._key, choices)

    def assignment_of(self, architecture: Architecture) -> dict[Row, int]:
        """Return the assignment of an architecture. Rows beyond the depth take their first option.

        Raises:
            TangleNASError: The architecture is of another space, or has options that this space lacks.
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
            rows = [row for row in choice.rows if row.active(assignment)]
            for row, option in zip(rows, value if choice.layered else [value], strict=True):
                assignment[row] = row.options.index(option)
        return assignment

    # From architectures to text, and back. Tables list architectures by this text.

    def to_string(self, architecture: Architecture) -> str:
        """Return an architecture as text: `name=option` for each choice, with commas between layers."""
        return str(architecture)

    def from_string(self, text: str) -> Architecture:
        """Return the architecture of a text that `to_string` wrote.

        Raises:
            TangleNASError: The text has no `name=option` for a choice, or an option that its choice lacks.
        """
        choices: dict[str, Any] = {}
        for part in text.split():
            name, given, value = part.partition("=")
            if not given or name not in self.choices:
                raise TangleNASError(
                    f"{text[:200]!r} is no architecture of {self.label}: expected text such as "
                    f"{self.to_string(self.smallest())!r}"
                )
            choice = self.choices[name]
            options = {str(option): option for option in choice.options}
            values = [options.get(one, one) for one in (value.split(",") if choice.layered else [value]) if one]
            choices[name] = values if choice.layered else values[0] if values else value
        return self.architecture(**choices)

    @property
    def _key(self) -> str:
        """The space's name in architectures and files."""
        return self.name or type(self).__name__


def weights_of(alternatives: Sequence[Mapping[Row, int]], scores: Mapping[Row, Sequence[float]]) -> list[float]:
    """Return the weights of a decision's alternatives under log-probabilities of the rows' options, the largest 1."""
    totals = [sum(scores[row][option] for row, option in one.items()) for one in alternatives]
    most = max(totals)
    return [math.exp(total - most) for total in totals]


def draw(weights: Sequence[float], generator: torch.Generator | None) -> int:
    """Return a random number in proportion to weights; 0 where they are not numbers, as after a divergence.

    The step in which a search diverges says so at its end.
    """
    point = float(torch.rand((), generator=generator, dtype=torch.float64)) * math.fsum(weights)
    for number, total in enumerate(itertools.accumulate(weights)):
        if point < total:
            return number
    return max((number for number, weight in enumerate(weights) if weight > 0), default=0)


def _deepest(row: Row) -> dict[Row, int]:
    """Return picks of the depths that decide whether a row matters, with which it does."""
    if row.gate is None:
        return {}
    depth, _ = row.gate
    picks: dict[Row, int] = max(combinations(depth.rows), key=depth.value)
    for outer in depth.rows:
        picks = {**_deepest(outer), **picks}
    return picks
