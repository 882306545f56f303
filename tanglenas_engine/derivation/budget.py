"""Budgets: the architectures of a space that cost no more than allowed.

A cost is a sum of tables over a few rows each (`cost.Additive`), and a mixture's score is a sum over rows. So the most
probable architecture within a budget is found exactly, by `elimination`.

Where a space's decisions are too entangled for tables, or its objective has none, a local search takes over;
`projection` says which it was.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tanglenas_engine.derivation.elimination import ROUNDING, Limit, Picks, Problem, TooEntangled
from tanglenas_engine.errors import TangleNASError, at_least, unknown
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.cost import METRICS
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.superposition.size import Row

if TYPE_CHECKING:
    from tanglenas_engine.spaces.objective import Objective

Budget = Mapping[str, float | None]
"""The most that each metric of `cost.METRICS`, and each objective, may be; None for one without a limit."""


@dataclass(frozen=True)
class Projection:
    """An architecture within a budget; `exact` if there is none more probable, else it is what a local search found."""

    architecture: Architecture
    exact: bool


def check_budget(space: SearchSpace, budget: Budget, objectives: Iterable[Objective] = ()) -> None:
    """Check that an architecture fits.

    Raises:
        TangleNASError: None does, or none was found where there is no exact way; the message has the smallest cost.
    """
    limits = _limits(space, budget, objectives)
    smallest: dict[str, Picks] = {}
    certain = True
    for limit in limits:
        smallest[limit.name], exact = _extreme(space, limit)
        certain = certain and exact
        least = limit.cost(smallest[limit.name])
        if least > limit.allowed:
            raise TangleNASError(
                f"no architecture of {space.label} {_has(exact)} at most {_counted(limit, limit.most)}: the smallest "
                f"has {amount(least)}{limit.unit and f' {limit.unit}'}. Raise {_setting(limit.name)}"
            )
    if len(limits) > 1 and not any(_excess(limits, picks) == 0 for picks in smallest.values()):
        indifferent = {row: [0.0] * len(row.options) for row in space.rows}
        if _solve(space, indifferent, limits) is None:
            wanted = " and ".join(_counted(limit, limit.most) for limit in limits)
            known = "; ".join(
                f"that with least {name} has " + " and ".join(_counted(other, other.cost(picks)) for other in limits)
                for name, picks in smallest.items()
            )
            raise TangleNASError(f"no architecture of {space.label} {_has(certain)} at most {wanted} together: {known}")


def cheapest(space: SearchSpace, cost: str | Objective) -> Architecture:
    """The architecture that costs least, in a metric of `cost.METRICS` or an objective bound to the space.

    Exact, but for a cost without tables or a space whose decisions are too entangled: there it is the end of a descent
    from the smallest architecture, one move at a time.
    """
    return space.architecture_of(_extreme(space, _unlimited(space, cost))[0])


def dearest(space: SearchSpace, cost: str | Objective) -> Architecture:
    """The architecture that costs most, as `cheapest` finds the one that costs least."""
    return space.architecture_of(_extreme(space, _unlimited(space, cost), -1)[0])


def project(space: SearchSpace, mixture: Mixture, budget: Budget, objectives: Iterable[Objective] = ()) -> Architecture:
    """The architecture of `projection`."""
    return projection(space, mixture, budget, objectives).architecture


def projection(
    space: SearchSpace, mixture: Mixture, budget: Budget, objectives: Iterable[Objective] = ()
) -> Projection:
    """The most probable architecture within the budget.

    Rows beyond a depth are counted at their most probable option, so that without a limit it is the architecture of
    every row's most probable option, which a gradient search means.

    Args:
        objectives: Bound to the space; for limits that are not of `cost.METRICS`.

    Raises:
        TangleNASError: None fits.
    """
    limits = _limits(space, budget, objectives)
    free = space.most_probable(mixture)
    if _excess(limits, space.assignment_of(free)) == 0:
        return Projection(free, True)
    found = _solve(space, space.scores(mixture), limits, space.assignment_of(free))
    if found is None:
        check_budget(space, budget, objectives)
        raise TangleNASError(f"no architecture of {space.label} was found within the budget: raise it")
    return Projection(space.architecture_of(found[0]), found[1])


def shrunk(
    space: SearchSpace,
    architecture: Architecture,
    budget: Budget,
    generator: torch.Generator,
    objectives: Iterable[Objective] = (),
) -> Architecture:
    """The architecture after random changes that bring it into the budget, each of which saves."""
    limits = _limits(space, budget, objectives)
    picks = space.assignment_of(architecture)
    over = _excess(limits, picks)
    while over > 0:
        moves = list(space.moves(picks))
        for index in torch.randperm(len(moves), generator=generator).tolist():
            after = _excess(limits, {**picks, **moves[index]})
            if after < over:
                picks, over = {**picks, **moves[index]}, after
                break
        else:  # no change saves by itself
            return project(space, space.one_hot(architecture), budget, objectives)
    return space.architecture_of(picks)


# Limits.


def amount(value: float) -> str:
    """A cost as a person reads it: whole from a million on."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1e6 else f"{value:,.7g}"


def _has(certain: bool) -> str:
    return "has" if certain else "was found that has"


def _counted(limit: Limit, cost: float) -> str:
    return " ".join(part for part in (amount(cost), limit.unit, limit.name) if part)


def _setting(name: str) -> str:
    """What a limit is given as."""
    return f"max_{name}" if name in METRICS else f"limits[{name!r}]"


def _limits(space: SearchSpace, budget: Budget, objectives: Iterable[Objective]) -> list[Limit]:
    known = {objective.name: objective for objective in objectives}
    limits = []
    for name, most in budget.items():
        if most is None:
            continue
        if most != math.inf and name in METRICS:
            at_least(_setting(name), most, 1)
        elif isinstance(most, bool) or not isinstance(most, int | float) or not most > 0:
            raise TangleNASError(f"{_setting(name)} is {most!r}, expected a positive number")
        if name in known:

            def measured(picks: Picks, objective: Objective = known[name]) -> float:
                return objective.cost(space.architecture_of(picks))

            terms = known[name].additive
            unit = "" if name in METRICS else known[name].unit
            limits.append(Limit(name, most, terms.cost if terms else measured, terms, unit))
        elif name in METRICS:
            limits.append(Limit(name, most, space.terms(name).cost, space.terms(name)))
        else:
            raise unknown("cost in a budget", name, [*METRICS, *known])
    return limits


def _excess(limits: Sequence[Limit], picks: Picks) -> float:
    """By which share the budget is exceeded, summed over its limits; 0 within it."""
    costs = [(limit.cost(picks), limit) for limit in limits]
    return float(sum(cost / limit.most - 1 for cost, limit in costs if cost > limit.allowed))


def _unlimited(space: SearchSpace, cost: str | Objective) -> Limit:
    if isinstance(cost, str):
        return _limits(space, {cost: math.inf}, ())[0]
    return _limits(space, {cost.name: math.inf}, (cost,))[0]


def _extreme(space: SearchSpace, limit: Limit, sign: int = 1) -> tuple[Picks, bool]:
    """The assignment for which `sign` times the cost is least, and whether that is certain."""
    problem = Problem.of(space, {}, [limit])
    if problem is not None:
        return problem.picks(problem.relaxed(np.array([sign]))[1]), True

    def cost(picks: Picks) -> float:
        return sign * limit.cost(picks)

    picks = space.assignment_of(space.smallest() if sign > 0 else space.largest())
    while True:
        least = min(({**picks, **change} for change in space.moves(picks)), key=cost, default=picks)
        if not cost(least) < cost(picks):
            return picks, False
        picks = least


def _solve(
    space: SearchSpace, scores: Mapping[Row, Sequence[float]], limits: Sequence[Limit], start: Picks | None = None
) -> tuple[Picks, bool] | None:
    """The assignment of highest score within the limits, and whether that is certain; None if none was found.

    `start` is where a local search begins, should it be needed.
    """
    problem = Problem.of(space, scores, limits)
    incumbent = None
    if problem is not None:
        bound, multipliers, incumbent = problem.dual()
        if incumbent is None:  # whether anything fits is easier to see where all is equally probable
            possible = Problem.of(space, {}, limits)
            assert possible is not None
            least, _, incumbent = possible.dual()
            if least < -ROUNDING:
                return None
        try:
            found = problem.search(bound, multipliers, incumbent)
            return None if found is None else (problem.picks(found), True)
        except TooEntangled:
            pass
    within = None if problem is None or incumbent is None else problem.picks(incumbent)
    picks = _local_search(space, scores, limits, start or space.assignment_of(space.smallest()), within)
    return None if picks is None else (picks, False)


# The other way.


def _local_search(
    space: SearchSpace,
    scores: Mapping[Row, Sequence[float]],
    limits: Sequence[Limit],
    picks: Picks,
    within: Picks | None,
) -> Picks | None:
    """From `within` the budget, or from `picks` by the moves that lose least per share of the budget that they save.

    Then what gains score and still fits is changed, one or two moves at a time, until nothing is left: no move and no
    two moves give a better architecture within the budget.
    """

    def gain(change: Picks) -> float:
        return sum(scores[row][option] - scores[row][picks[row]] for row, option in change.items())

    if within is not None:
        picks = within
    over = _excess(limits, picks)
    while over > 0:
        moves = []
        for change in space.moves(picks):
            after = _excess(limits, {**picks, **change})
            if after < over:
                moves.append((-gain(change) / (over - after), after, change))
        if not moves:  # a change helps only together with another
            picks = space.assignment_of(space.smallest())
            if _excess(limits, picks) > 0:
                return None
            break
        _, over, change = min(moves, key=lambda move: move[0])
        picks = {**picks, **change}

    better: Picks | None = picks
    while better is not None:
        picks = better
        gains = [(gain(change), change) for change in space.moves(picks)]
        pairs = [
            (a + b, {**one, **two}) for (a, one), (b, two) in itertools.combinations(gains, 2) if not {*one} & {*two}
        ]
        changes = sorted((c for c in [*gains, *pairs] if c[0] > ROUNDING), key=lambda change: -change[0])
        fitting = ({**picks, **change} for _, change in changes if not _excess(limits, {**picks, **change}))
        better = next(fitting, None)
    return picks
