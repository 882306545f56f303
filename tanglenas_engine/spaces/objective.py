"""Objectives: what an architecture costs, and how a search is drawn to a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from tanglenas_engine.derivation.budget import amount, cheapest, dearest
from tanglenas_engine.errors import TangleNASError, describe, positive, unknown
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.cost import Additive
from tanglenas_engine.superposition.mixture import Mixture

if TYPE_CHECKING:
    from tanglenas_engine.spaces.space import SearchSpace


class Objective:
    """A cost of architectures that a search can keep down: finite, and at least 0.

    A subclass writes `terms`, from which the rest follows. One whose cost is no sum of tables writes `measure` and
    `expectation` instead; hard budgets in it are met by a local search.

    Attributes:
        name: Under which histories, metrics and budgets list it.
        unit: What its numbers count, as a person reads it.
        source: Where its numbers come from, if not from the architecture alone; stages say it.
        additive: Its terms on the space that it is bound to.
    """

    name: str = ""
    unit: str = ""
    source: str = ""
    additive: Additive | None = None

    # What an objective says.

    def terms(self, space: SearchSpace) -> Additive | None:
        """The cost as tables over the space's rows of choices, or None if it has no such form."""
        return None

    def measure(self, architecture: Architecture) -> float:
        """The cost of one architecture."""
        return float(self._tables().cost(self.space.assignment_of(architecture)))

    def expectation(self, mixture: Mixture) -> Tensor:
        """The expectation of `measure` under a mixture: a scalar, differentiable."""
        return self._tables().expected(mixture)

    # What it is asked.

    def bind(self, space: SearchSpace) -> Self:
        """Take up the space whose architectures are meant.

        Raises:
            TangleNASError: The objective is not for this space.
        """
        with self._blamed(f"on {space.label}"):
            self.space, self.additive = space, self.terms(space)
        return self

    def cost(self, architecture: Architecture) -> float:
        """The cost of one architecture.

        Raises:
            TangleNASError: The objective fails, or says something that is no cost.
        """
        with self._blamed(f"on the architecture {architecture}"):
            cost = float(self.measure(architecture))
            if not (math.isfinite(cost) and cost >= 0):
                raise ValueError(f"its cost is {cost}, expected a finite number of at least 0")
        return cost

    def expected(self, mixture: Mixture) -> Tensor:
        """The expectation of `cost` under a mixture: a scalar, differentiable.

        Raises:
            TangleNASError: The objective fails, or gives something else.
        """
        with self._blamed("on a mixture"):
            expected = self.expectation(mixture)
            if not isinstance(expected, Tensor) or expected.numel() != 1:
                raise TypeError(f"its expectation is {expected!r}, expected a tensor with one number")
        return expected.reshape(())

    def _tables(self) -> Additive:
        if self.additive is None:
            raise NotImplementedError("it has neither terms(space) nor measure(architecture) and expectation(mixture)")
        return self.additive

    @contextmanager
    def _blamed(self, where: str) -> Iterator[None]:
        """Name the objective in whatever goes wrong in it."""
        try:
            yield
        except Exception as cause:
            said = str(cause) if isinstance(cause, TangleNASError) else describe(cause)
            raise TangleNASError(
                f"the objective {(self.name or type(self).__name__)!r} failed {where}: {said}"
            ) from cause


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda ratio: (ratio - 1).clamp_min(0),
    "log": lambda ratio: ratio.log().abs(),
}
"""What a search is charged, as a function of expected cost / target: for an excess only, or for any distance."""


class Target:
    """A cost that a search is drawn to: `weight * penalty(expected / target)` in the loss of alpha.

    The expectation is that of the mixture which alpha stands for, not of a sample. Without `value` and `share` nothing
    is added, and the cost is reported only.

    Args:
        objective: What is meant by cost.
        value: The target in the objective's own unit.
        share: The target as a share of the largest architecture's cost, above 0 and up to 1.
        weight: Against the loss of the task. The penalty's slope is constant, so that an optimum meets the target,
            rather than a compromise, from some weight on.
        penalty: "hinge", `max(0, ratio - 1)`, leaves alone what costs less; "log", `|log(ratio)|`, draws from both
            sides.

    Raises:
        TangleNASError: An option cannot be.
    """

    def __init__(
        self,
        objective: Objective,
        value: float | None = None,
        share: float | None = None,
        weight: float = 1.0,
        penalty: Literal["hinge", "log"] = "hinge",
    ):
        self.objective, self.name = objective, objective.name or type(objective).__name__
        if value is not None and share is not None:
            raise TangleNASError(
                f"the target for {self.name} is given twice, as the value {value!r} and as the share {share!r} of the "
                "largest: leave one out"
            )
        if value is not None:
            positive(f"the target for {self.name}", value)
        if share is not None and positive(f"the target's share for {self.name}", share) > 1:
            raise TangleNASError(
                f"the target's share for {self.name} is {share!r}, expected one of the largest, above 0 and up to 1"
            )
        if penalty not in PENALTIES:
            raise unknown(f"penalty of the target for {self.name}", penalty, PENALTIES)
        self.value, self.share, self.penalty = value, share, penalty
        self.weight = positive(f"the weight of the target for {self.name}", weight)
        self.limit: float | None = None

    @property
    def active(self) -> bool:
        """Whether there is a target, or the cost is reported only."""
        return self.value is not None or self.share is not None

    def bind(self, space: SearchSpace) -> Self:
        """Take up a space, and find what the target is there.

        Raises:
            TangleNASError: No architecture costs so little, none so much, or the objective fails.
        """
        self.objective.bind(space)
        if not self.active:
            return self
        extremes = cheapest(space, self.objective), dearest(space, self.objective)
        least, most = (self.objective.cost(architecture) for architecture in extremes)
        limit = self.value
        if limit is None:
            limit = (self.share or 1.0) * self.objective.cost(space.largest())
        given = f"the target for {self.name} is {amount(limit)} {self.objective.unit}".rstrip()
        if limit < least:
            raise TangleNASError(
                f"{given}, but no architecture of {space.label} has less than {amount(least)}: raise the target"
            )
        if limit > most:
            raise TangleNASError(
                f"{given}, but no architecture of {space.label} has more than {amount(most)}: lower the target, or "
                "leave it out"
            )
        stacks = {count: torch.zeros(rows, count, requires_grad=True) for count, rows in space.stacks.items()}
        expected = self.objective.expected(space.mixture({count: stack.softmax(1) for count, stack in stacks.items()}))
        if not (bool(expected.isfinite()) and expected.requires_grad):
            raise TangleNASError(
                f"the objective {self.name!r} cannot draw a search: its expectation under the uniform mixture is "
                f"{float(expected.detach())}{'' if expected.requires_grad else ', without a gradient'}"
            )
        self.limit = limit
        return self

    def charge(self, mixture: Mixture) -> Tensor:
        """What is added to alpha's loss for a mixture."""
        assert self.limit is not None
        return self.weight * PENALTIES[self.penalty](self.objective.expected(mixture) / self.limit)
