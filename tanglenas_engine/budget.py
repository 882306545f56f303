"""Budgets: the architectures of a space that cost no more than allowed."""

from __future__ import annotations

import itertools

import torch

from tanglenas_engine.architecture import Architecture
from tanglenas_engine.cost import METRICS
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.mixture import Mixture
from tanglenas_engine.size import Row
from tanglenas_engine.space import SearchSpace
from tanglenas_engine.training import at_least

Budget = dict[str, int | None]
"""The most that each metric of `cost.METRICS` may be; None for one without a limit."""

Picks = dict[Row, int]


def check_budget(space: SearchSpace, budget: Budget) -> None:
    """Check that the smallest architecture fits.

    Raises:
        TangleNASError: It does not; the message has the smallest possible cost.
    """
    smallest = space.cost(space.smallest())
    for metric in METRICS:
        limit = budget.get(metric)
        if limit is None:
            continue
        at_least(f"max_{metric}", limit, 1)
        if getattr(smallest, metric) > limit:
            raise TangleNASError(
                f"no architecture of {space._label} has at most {limit:,} {metric}: the smallest has "
                f"{getattr(smallest, metric):,}. Raise max_{metric}"
            )


def project(space: SearchSpace, mixture: Mixture, budget: Budget) -> Architecture:
    """The most probable architecture within the budget, as a local search finds it.

    From the most probable one of all, the move of the space is made that loses the least log-probability per share
    of the budget saved, until it fits. Then what gains probability and still fits is changed, one or two moves at a
    time, until nothing is left: no move and no two moves give a more probable architecture within the budget.
    """
    picks = space.assignment_of(space.most_probable(mixture))
    scores = space.scores(mixture)

    def gain(change: Picks) -> float:
        return sum(scores[row][option] - scores[row][picks[row]] for row, option in change.items())

    over = _excess(space, picks, budget)
    if over == 0:
        return space.architecture_of(picks)
    while over > 0:
        moves = []
        for change in space.moves(picks):
            after = _excess(space, {**picks, **change}, budget)
            if after < over:
                moves.append((-gain(change) / (over - after), after, change))
        if not moves:  # a change helps only together with another
            picks = space.assignment_of(space.smallest())
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
        # Smaller gains than this may be rounding, and would go on for ever.
        changes = sorted((c for c in [*gains, *pairs] if c[0] > 1e-9), key=lambda change: -change[0])
        fitting = ({**picks, **change} for _, change in changes if not _excess(space, {**picks, **change}, budget))
        better = next(fitting, None)
    return space.architecture_of(picks)


def shrunk(space: SearchSpace, architecture: Architecture, budget: Budget, generator: torch.Generator) -> Architecture:
    """The architecture after random changes that bring it into the budget, each of which saves."""
    picks = space.assignment_of(architecture)
    over = _excess(space, picks, budget)
    while over > 0:
        moves = list(space.moves(picks))
        for index in torch.randperm(len(moves), generator=generator).tolist():
            after = _excess(space, {**picks, **moves[index]}, budget)
            if after < over:
                picks, over = {**picks, **moves[index]}, after
                break
        else:
            return space.smallest()
    return space.architecture_of(picks)


def _excess(space: SearchSpace, picks: Picks, budget: Budget) -> float:
    """By which share the budget is exceeded, summed over its limits; 0 within it."""
    cost = space.cost(space.architecture_of(picks))
    limits = {metric: limit for metric, limit in budget.items() if limit is not None}
    return float(sum(max(0.0, getattr(cost, metric) / limit - 1) for metric, limit in limits.items()))
