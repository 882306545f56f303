"""One judging for a whole front: candidates of every cost, and a regression that all costs share.

To judge candidates for one budget after the other takes as many judgings as there are budgets. But what a candidate of
one cost says of an option holds for other costs, too. So one ridge regression explains the losses of all candidates
(`surrogate.py`), and its minimum within each level of cost is known exactly. All candidates are judged on the same few
samples, and only those on the front are judged on more (`pareto.final_front`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import numpy as np

from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import MARGIN, Budget, amount, dearest
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.surrogate import Explained, is_impossible
from tanglenas_engine.errors import TangleNASError, at_least, positive
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.superposition.mixture import Mixture


def front(
    candidates: Candidates, mixture: Mixture | None, *, levels: int | Sequence[float] = 12, rounds: int = 3
) -> None:
    """Judge random candidates of every cost, and in each round what a regression on their losses finds best by level.

    As many random candidates are drawn for one level as for any other: of the costs between it and the next lower one,
    or of those that fill it, if levels are given as costs. Where the best of a level was judged before, a random one
    follows, which teaches more.

    Without enough candidates to fit, or without tables to minimise over, all candidates are random, and a note says so.

    Args:
        levels: The costs for which a network is wanted, or their number: they are then equal steps, as factors, from
            the cheapest architecture to the dearest one within the budget.
        rounds: The largest number of candidates that the regression proposes for each level, out of all candidates.

    Raises:
        TangleNASError: An option is out of its range, or a level for which candidates are proposed is below the
            cheapest architecture's cost or above the dearest one's.
    """
    at_least("front.rounds", rounds, 1)
    number = len(levels) if isinstance(levels, list | tuple) else at_least("front.levels", levels, 1)
    at_least("the number of front.levels", number, 1)
    if is_impossible(candidates, number * rounds, candidates.front_cost):
        candidates.judge(candidates.first(candidates.limit, fill=False), candidates.limit, on="first rung")
        return
    budgets, bands = _levels(candidates, levels)
    turns = itertools.cycle(bands)

    def random(count: int) -> list[Architecture]:
        """Return new random candidates, of each band in turn, and of any cost where bands have no more."""
        found = candidates.fresh(count, lambda: next(turns).sample(candidates.generator), fill=False) if bands else []
        return found + candidates.fresh(count - len(found), fill=False)

    count = candidates.limit - number * rounds
    drawn = random(count) if candidates.prior is None else candidates.first(count, fill=False)
    candidates.judge(drawn, candidates.limit, on="first rung")
    explained = Explained(candidates)
    for _ in range(rounds):
        tables = explained.by_tables(drawn)
        best = {one.digest: one for one in (budget.minimum(tables) for budget in budgets)}
        new = [one for digest, one in best.items() if digest not in candidates.drawn]
        candidates.drawn.update(one.digest for one in new)
        new += random(number - len(new))
        if not new:
            return
        drawn += new
        candidates.judge(new, candidates.limit, on="first rung")


def _levels(candidates: Candidates, levels: int | Sequence[float]) -> tuple[list[Budget], list[Band]]:
    """Return the budget of each level, cheapest first, and the architectures that are drawn for it."""
    space, budget, cost = candidates.space, candidates.budget, candidates.front_cost

    def price(architecture: Architecture) -> float:
        return getattr(space.cost(architecture), cost) if isinstance(cost, str) else cost.cost(architecture)

    least, most = price(budget.cheapest(cost)), price(budget.dearest(cost))
    if isinstance(levels, int):
        fill, edges = 0.0, (np.geomspace if least > 0 else np.linspace)(least, most, levels + 1).tolist()
    else:
        _check_levels(candidates, levels, most, price(dearest(space, cost)))
        fill, edges = candidates.fill, [least, *sorted({min(one, most) for one in levels})]
    limits = {limit.name: limit.most for limit in budget.limits}
    budgets, bands = [], []
    for below, level in itertools.pairwise(edges):
        budgets.append(Budget(space, {**limits, candidates.cost: level}, candidates.objectives))
        with contextlib.suppress(TangleNASError):  # costs with few values may have none there
            bands.append(Band(budgets[-1], max(below / level, fill), of=candidates.cost))
    budgets[0].check()
    return budgets, bands


def _check_levels(candidates: Candidates, levels: Sequence[float], most: float, largest: float) -> None:
    """Refuse levels that no architecture of the space reaches, and note those that none within the budget does.

    Args:
        most: The largest cost within the budget.
        largest: The largest cost of the space.
    """
    above = [one for one in sorted({positive("front.levels", one) for one in levels}) if one > most * MARGIN]
    if above and above[-1] > largest * MARGIN:
        raise TangleNASError(
            f"front.levels has {amount(above[-1])} {candidates.cost}, but no architecture of {candidates.space.label} "
            f"has more than {amount(largest)}: lower it, or bind discretize.cost to the cost that it is of"
        )
    if above:
        candidates.note(
            f"front.levels has {', '.join(map(amount, above))} {candidates.cost}, and no architecture within the "
            f"budget has more than {amount(most)}: that is the level in their place"
        )
