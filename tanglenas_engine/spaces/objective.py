"""Objectives: costs of architectures beside parameters and multiply-accumulates."""

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
    """A cost of architectures that a search can limit. It is finite, and at least 0.

    A subclass writes `terms`, from which the rest follows. If its cost is not a sum of tables, it writes `measure` and
    `expectation` instead. A local search then keeps hard budgets in it.

    Attributes:
        name: The name in histories, metrics and budgets.
        unit: The unit of its numbers, as a person reads it.
        source: The origin of its numbers, if they do not follow from the architecture alone. Stages print it.
        additive: The terms on the space that it is bound to.
    """

    name: str = ""
    unit: str = ""
    source: str = ""
    additive: Additive | None = None

    # A subclass overrides these.

    def terms(self, space: SearchSpace) -> Additive | None:
        """Return the cost as tables over the space's rows of choices, or None if it has not this form."""
        return None

    def measure(self, architecture: Architecture) -> float:
        """Return the cost of one architecture."""
        return float(self._tables().cost(self.space.assignment_of(architecture)))

    def expectation(self, mixture: Mixture) -> Tensor:
        """Return the expectation of `measure` under a mixture, a differentiable scalar."""
        return self.space.expectation_of(self._tables(), mixture)

    # The engine calls these.

    def origin(self) -> str:
        """Return the name with the unit and the source of its numbers, for a person."""
        return f"{self.name}{f' in {self.unit}' if self.unit else ''}{f', of {self.source}' if self.source else ''}"

    def bind(self, space: SearchSpace) -> Self:
        """Bind the objective to the space of its architectures.

        Raises:
            TangleNASError: The objective is not for this space.
        """
        with self._blamed(f"on {space.label}"):
            self.space, self.additive = space, self.terms(space)
        return self

    def cost(self, architecture: Architecture) -> float:
        """Return the cost of one architecture.

        Raises:
            TangleNASError: The objective fails, or its cost is negative or not finite.
        """
        with self._blamed(f"on the architecture {architecture}"):
            cost = float(self.measure(architecture))
            if not (math.isfinite(cost) and cost >= 0):
                raise ValueError(f"its cost is {cost}, expected a finite number of at least 0")
        return cost

    def expected(self, mixture: Mixture) -> Tensor:
        """Return the expectation of `cost` under a mixture, a differentiable scalar.

        Raises:
            TangleNASError: The objective fails, or its expectation is not a tensor with one number.
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
        """Name the objective in every error that it raises."""
        try:
            yield
        except Exception as cause:
            said = str(cause) if isinstance(cause, TangleNASError) else describe(cause)
            raise TangleNASError(
                f"the objective {(self.name or type(self).__name__)!r} failed {where}: {said}"
            ) from cause
