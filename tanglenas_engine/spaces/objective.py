"""Objectives: what an architecture costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from torch import Tensor

from tanglenas_engine.errors import TangleNASError, describe
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
