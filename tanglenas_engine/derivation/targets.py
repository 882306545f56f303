"""Targets: terms of alpha's loss that pull a search to a cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import MARGIN, Budget, amount, cheapest, dearest
from tanglenas_engine.errors import TangleNASError, positive, unknown
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture

PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda ratio: (ratio - 1).clamp_min(0),
    "log": lambda ratio: ratio.log().abs(),
    "multiplier": lambda ratio: ratio - 1,
}
"""Penalties by name, as functions of expected cost / target.

"hinge" charges an excess only, "log" any distance, and "multiplier" credits what is left, too.
"""


class Target:
    """A target for the expected cost of a search: it adds `weight * penalty(expected / target)` to the loss of alpha.

    The expectation is of the mixture that alpha stands for, not of a sample. Without `value` and `share`, the cost is
    reported, and the loss is unchanged.

    Args:
        objective: The cost.
        value: The target in the objective's own unit.
        share: The target as a share of the largest architecture's cost, above 0 and up to 1.
        weight: The weight of the penalty, relative to the loss of the task. The slope of a penalty does not vanish at
            the target. So from some weight on, an optimum meets the target instead of a compromise.
        penalty: "hinge", `max(0, ratio - 1)`, charges costs above the target; "log", `|log(ratio)|`, charges costs on
            both sides. "multiplier", `ratio - 1`, has a weight of its own, a Lagrange multiplier, which starts at
            `weight`: it grows while the cost is above the target, and falls, down to 0, while it is below.
        rate: The change of the multiplier in a step, per `ratio - 1`.

    Attributes:
        multiplier: The weight of the penalty "multiplier", a scalar; None for the others.

    Raises:
        TangleNASError: Both `value` and `share` are given, a number is not positive, the share is above 1, or the
            penalty is unknown.
    """

    def __init__(
        self,
        objective: Objective,
        value: float | None = None,
        share: float | None = None,
        weight: float = 1.0,
        penalty: Literal["hinge", "log", "multiplier"] = "hinge",
        rate: float = 0.1,
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
                f"the target's share for {self.name} is {share!r}, expected a share of the largest network's, above "
                "0 and up to 1"
            )
        if penalty not in PENALTIES:
            raise unknown(f"penalty of the target for {self.name}", penalty, PENALTIES)
        self.value, self.share, self.penalty = value, share, penalty
        self.weight = positive(f"the weight of the target for {self.name}", weight)
        self.rate = positive(f"the rate of the target for {self.name}", rate)
        self.multiplier: Tensor | None = None
        self.limit: float | None = None

    @property
    def active(self) -> bool:
        """Whether there is a target. Without one, the cost is only reported."""
        return self.value is not None or self.share is not None

    def bind(self, space: SearchSpace) -> Self:
        """Bind the target to a space, and compute its limit there.

        Raises:
            TangleNASError: The target is below the smallest or above the largest cost in the space, the objective
                fails, or its expectation has no gradient.
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
        if limit * MARGIN < least:
            raise TangleNASError(
                f"{given}, but no architecture of {space.label} has less than {amount(least)}: raise the target"
            )
        if limit > most * MARGIN:
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
        self.multiplier = torch.tensor(self.weight, dtype=torch.float64) if self.penalty == "multiplier" else None
        return self

    def charge(self, mixture: Mixture) -> Tensor:
        """Return the term that a mixture adds to alpha's loss, and move the multiplier, if there is one."""
        assert self.limit is not None
        ratio = self.objective.expected(mixture) / self.limit
        penalty = PENALTIES[self.penalty](ratio)
        if self.multiplier is None:
            return self.weight * penalty
        weight = self.multiplier.to(penalty.device)
        self.multiplier = (weight + self.rate * penalty.detach()).clamp_min(0)
        return weight * penalty

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed search needs of a target with a multiplier."""
        assert self.multiplier is not None
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.multiplier = state["multiplier"]


def bind_targets(targets: Sequence[Target], space: SearchSpace) -> list[Target]:
    """Bind targets to the space, and return those that are not only reported.

    Raises:
        TangleNASError: Two targets have the same objective, or a target cannot be met.
    """
    names = [target.name for target in targets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TangleNASError(f"search.targets has two for {twice[0]!r}: give one for each objective")
    for target in targets:
        target.bind(space)
    return [target for target in targets if target.active]


def band_of(space: SearchSpace, label: str, targets: Sequence[Target], band: tuple[float, float] | None) -> Band:
    """Return the architectures whose costs are within a band below the targets, from which an optimizer draws.

    Args:
        label: The name of the optimizer, for an error message.
        band: The least and the most that an architecture costs, as shares of the tightest target.

    Raises:
        TangleNASError: There is no band, it is no range of shares, or it holds no architecture.
    """
    if band is None:
        raise TangleNASError(
            f"search.targets: {label} has no architecture parameters that a target for {targets[0].name} "
            "could draw, and search.band is None: leave the target out, or give the band a range such as (0.93, 1.0)"
        )
    try:
        low, high = band
        valid = 0 <= low < high <= 1
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise TangleNASError(
            f"search.band is {band!r}, expected two shares of the target, the smaller first, such as (0.93, 1.0)"
        )
    limits = {target.name: high * target.limit for target in targets if target.limit is not None}
    try:
        return Band(Budget(space, limits, [target.objective for target in targets]), low / high)
    except TangleNASError as error:
        raise TangleNASError(f"search.band is {band!r}, shares of the target: {error}") from None
