"""Bands: random architectures whose cost is within a range just below a limit.

A supernet that trains on such architectures alone spends no step on those that are too small or too large. Few
architectures of a large space cost nearly as much as a limit allows, so drawing until one does can take for ever.
Instead, the ways to get there are counted. Decisions are taken in a fixed order. `counts[k][f][t]` is the number of
ways to take the decisions from the k-th on at a cost of t, where f are the earlier ones that share a table with these:

    counts[k][f][t] = sum_a counts[k + 1][f, a][t - cost_k(f, a)]

A decision takes each alternative in proportion to the ways that are left to end in the band. Under probabilities of
options, a way counts with its probability: each term of the sum is multiplied by that of the alternative a.

Costs are counted in bins of 1/4096 of the limit, rounded down. What a bin lets through beyond the band is drawn again,
so that a sample is one of the space under the condition that it is in the band, exactly.

Where ways cannot be counted, architectures of the whole space are drawn until one is in the band, which is exact, too.
After a number of these, random moves lead into the band. Such samples favour what moves reach.
"""

from __future__ import annotations

import itertools
import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tanglenas_engine.derivation.budget import Budget, Limit, Picks, amount, scoped, scopes_of, tabulated
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.architectures import draw, weights_of
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.size import Row

BINS = 4096
"""Bins into which the cost of a limit is cut."""
MAX_WAYS = 50_000
"""Combinations of a decision with earlier ones that are counted at most; beyond, the space is drawn from."""
REJECTIONS = 300
"""Draws from the space without one in the band, after which random moves lead there. It costs what a few of these do,
and misses a band that holds a hundredth of the space in 5 % of the cases."""
MAX_DRAWS = 1000
"""Draws without one in the band after which a band counts as empty."""


class Band:
    """A range of costs below the limits of a budget, and a source of random architectures in it.

    An architecture is in the band if it keeps the budget and uses at least a share of one of its limits. `sample` draws
    as `space.sample` does, under the condition of being in the band.

    Args:
        budget: The limits; at least one.
        least: The share of a limit that an architecture uses at least, from 0 to 1.
        of: The name of the limit that is meant by that; None for any of them.

    Attributes:
        exact: True if samples have exactly these probabilities. False if ways cannot be counted, as a cost has no
            tables, too many decisions share one, or the space tells no decisions. Random moves then lead to the samples
            that `REJECTIONS` draws from the space do not find.

    Raises:
        TangleNASError: No architecture is in the band.
    """

    def __init__(self, budget: Budget, least: float = 0.93, of: str | None = None):
        self.space, self.budget, self.least = budget.space, budget, least
        budget.check()
        # Samples do not depend on the order of the limits.
        self._limits = sorted((limit for limit in budget.limits if of in (None, limit.name)), key=lambda it: it.name)
        self._counters: list[_Counter] = []
        self._scores: Mapping[Row, Sequence[float]] | None = None
        self._under_scores: list[_Counter] = []
        self.exact = tabulated(self.space, budget.limits)
        if self.exact:
            for limit in self._limits:
                counter = _Counter.count(self.space, limit, least)
                if counter is None:
                    self.exact, self._counters = False, []
                    break
                self._counters.append(counter)
        self.sample(torch.Generator().manual_seed(0))

    def holds(self, architecture: Architecture) -> bool:
        """Return whether an architecture is in the band."""
        return bool(self._used_limits(self.space.assignment_of(architecture)))

    def sample(
        self,
        generator: torch.Generator | None = None,
        scores: Mapping[Row, Sequence[float]] | None = None,
        draws: int = MAX_DRAWS,
    ) -> Architecture:
        """Return a random architecture in the band.

        Args:
            scores: Log-probabilities of every row's options, as `space.sample` takes them. They are counted anew when
                they change. They are left out if they give the band no chance: the numbers underflow, or so many
                `draws` lead to no architecture in it.
            draws: The draws after which scores are left out. What is likely but just below the band is drawn again and
                again. Where ways cannot be counted, these follow on `REJECTIONS` others.

        Raises:
            TangleNASError: A thousand draws without scores led to none.
        """
        attempts = MAX_DRAWS if scores is None else draws
        found = (self._by_counts if self.exact else self._by_moves)(generator, scores, attempts)
        if found is not None:
            return found
        if scores is None:
            raise self._empty()
        return self.sample(generator)

    def by_rejection(
        self,
        generator: torch.Generator | None = None,
        scores: Mapping[Row, Sequence[float]] | None = None,
        draws: int = REJECTIONS,
    ) -> Architecture | None:
        """Return the first of some random architectures of the space that is in the band, or None if none of them is.

        It is a sample of the band, exactly. Each draw takes the costs of one architecture.
        """
        found = (self.space.sample(generator, scores) for _ in range(draws))
        return next(filter(self.holds, found), None)

    def caveat(self) -> str:
        """Return a sentence about the samples of a band whose ways cannot be counted."""
        bare = " and ".join(limit.name for limit in self.budget.limits if limit.tables is None)
        generator = torch.Generator().manual_seed(0)
        count = sum(self.holds(self.space.sample(generator)) for _ in range(REJECTIONS))
        return (
            f"the band cannot be counted{f', as there are no terms of {bare}' if bare else ''}: up to {REJECTIONS} "
            "architectures are drawn until one is in it, and else random moves lead there, which favours some. Of "
            f"{REJECTIONS} random ones, {count} are in it"
        )

    def _by_counts(
        self, generator: torch.Generator | None, scores: Mapping[Row, Sequence[float]] | None, draws: int
    ) -> Architecture | None:
        """Return an architecture of the band by the counts of ways, or None if so many draws lead to none."""
        counters = self._counters if scores is None else self._weighted(scores)
        if not any(counter.ways for counter in counters):
            return None
        for _ in range(draws):
            number = draw([counter.ways for counter in counters], generator)
            picks = counters[number].draw(generator)
            # Each limit whose share is used leads here, so each is taken in one of so many cases. A limit whose share
            # is just missed may lead here, too, as bins round costs: it is never taken.
            used = self._used_limits(picks)
            if number in used and draw([1.0] * len(used), generator) == 0:
                return self.space.architecture_of(picks)
        return None

    def _by_moves(
        self, generator: torch.Generator | None, scores: Mapping[Row, Sequence[float]] | None, draws: int
    ) -> Architecture | None:
        """Return an architecture of the band by rejection, or else by moves, or None if so many draws lead to none."""
        generator = generator or torch.default_generator
        if (found := self.by_rejection(generator, scores)) is not None:
            return found
        for _ in range(draws):
            grown = self.budget.grow(self.space.sample(generator, scores), generator, self.least)
            if self.holds(grown):
                return grown
        return None

    def _weighted(self, scores: Mapping[Row, Sequence[float]]) -> list[_Counter]:
        """Return the counters under log-probabilities of options. The last ones are kept for the next sample."""
        if scores != self._scores:
            self._scores = scores
            self._under_scores = [counter.under(scores) for counter in self._counters]
        return self._under_scores

    def _used_limits(self, picks: Mapping[Any, int]) -> list[int]:
        """Return the indices of the limits whose share the assignment reaches; [] if it exceeds a limit."""
        costs = {limit.name: limit.cost(picks) for limit in self.budget.limits}
        if any(costs[limit.name] > limit.allowed for limit in self.budget.limits):
            return []
        return [n for n, limit in enumerate(self._limits) if costs[limit.name] >= self.least * limit.most]

    def _empty(self) -> TangleNASError:
        ranges = " or ".join(
            f"{amount(self.least * limit.most)} to {limit.counted(limit.most)}" for limit in self._limits
        )
        return TangleNASError(
            f"the band of {ranges} holds no architecture of {self.space.label} that was found: widen it, or move the "
            "limit"
        )


@dataclass
class _Counter:
    """The counts of the ways to end in the band of one limit.

    Attributes:
        order: The decisions' alternatives in the order of counting.
        frontiers: For each decision, the numbers of the earlier ones that share a table with it or a later one.
        costs: For each decision, its cost in bins, shape (alternatives of the frontier's decisions..., alternatives).
        counts: For each decision and one past the last, the number of ways by cost in bins, shape (alternatives of the
            frontier's decisions..., bins + 1).
        window: The bins in which the band may end.
        weights: For each decision, the weights of its alternatives.
    """

    order: list[list[Picks]]
    frontiers: list[tuple[int, ...]]
    costs: list[NDArray[np.int64]]
    counts: list[NDArray[np.float64]]
    window: slice
    weights: list[list[float]]
    ways: float = field(init=False)

    def __post_init__(self) -> None:
        self.ways = self._left(0, (), 0)

    @classmethod
    def count(cls, space: SearchSpace, limit: Limit, least: float) -> _Counter | None:
        """Return the counts, or None if too many decisions share tables."""
        decisions = [list(alternatives) for alternatives in space.decisions()]
        tables = limit.tables or {}
        order = [decisions[d] for d in _ordered(len(decisions), scopes_of(tables, decisions))]
        constant = sum(min(values) for values in tables.values())
        width = max(limit.most - constant, 0) / BINS
        scopes: list[tuple[tuple[int, ...], NDArray[np.int64]]] = []
        for scope, above, _ in scoped(tables, order):
            bins = np.floor(above / width) if width else np.where(above > 0, BINS + 1, 0)
            scopes.append((scope, np.minimum(bins, BINS + 1).astype(np.int64)))
        frontiers = [
            tuple(sorted({d for scope, _ in scopes if scope and scope[-1] >= k for d in scope if d < k}))
            for k in range(len(order) + 1)
        ]
        sizes = [len(alternatives) for alternatives in order]
        if any(math.prod(sizes[d] for d in (*f, k)) > MAX_WAYS for k, f in enumerate(frontiers[:-1])):
            return None
        costs = []
        for k, frontier in enumerate(frontiers[:-1]):
            axes_of = [*frontier, k]
            total = np.zeros([sizes[d] for d in axes_of], np.int64)
            for scope, bins in scopes:
                if scope and scope[-1] == k:
                    total += bins.reshape([sizes[d] if d in scope else 1 for d in axes_of])
            costs.append(total)
        # Each table's costs are rounded down, by less than a bin.
        first = max(0, math.floor((least * limit.most - constant) / width) - len(scopes)) if width else 0
        weights = [[1.0] * size for size in sizes]
        counts = _counts(frontiers, costs, weights)
        return cls(order, frontiers, costs, counts, slice(min(first, BINS), BINS + 1), weights)

    def under(self, scores: Mapping[Row, Sequence[float]]) -> _Counter:
        """Return the counts of ways under log-probabilities of options."""
        weights = [weights_of(alternatives, scores) for alternatives in self.order]
        return replace(self, weights=weights, counts=_counts(self.frontiers, self.costs, weights))

    def draw(self, generator: torch.Generator | None) -> Picks:
        """Return an assignment whose cost in bins is in the window."""
        taken: list[int] = []
        spent = 0
        for k, frontier in enumerate(self.frontiers[:-1]):
            costs = self.costs[k][tuple(taken[d] for d in frontier)]
            ways = [
                self.weights[k][a] * self._left(k + 1, (*taken, a), spent + int(cost)) for a, cost in enumerate(costs)
            ]
            taken.append(draw(ways, generator))
            spent += int(costs[taken[-1]])
        return dict(ChainMap(*(alternatives[a] for alternatives, a in zip(self.order, taken, strict=True))))

    def _left(self, k: int, taken: Sequence[int], spent: int) -> float:
        """Return the number of ways to take the decisions from the k-th on, and to end in the window."""
        counts = self.counts[k][tuple(taken[d] for d in self.frontiers[k])]
        return float(counts[max(0, self.window.start - spent) : max(0, self.window.stop - spent)].sum())


def _counts(
    frontiers: Sequence[tuple[int, ...]], costs: Sequence[NDArray[np.int64]], weights: Sequence[Sequence[float]]
) -> list[NDArray[np.float64]]:
    """Return the counts of ways for each decision and one past the last. A way counts as the product of its weights."""
    counts = np.zeros(BINS + 1)
    counts[0] = 1.0
    found = [counts]
    for k in reversed(range(len(costs))):
        axes = (*frontiers[k], k)
        before = np.zeros((*costs[k].shape[:-1], BINS + 1))
        after = [axes.index(d) for d in frontiers[k + 1]]
        for picks in itertools.product(*map(range, costs[k].shape)):
            shift = int(costs[k][picks])
            if shift <= BINS:
                left = counts[tuple(picks[axis] for axis in after)][: BINS + 1 - shift]
                before[picks[:-1]][shift:] += weights[k][picks[-1]] * left
        counts = before
        found.append(counts)
    return found[::-1]


def _ordered(count: int, scopes: Sequence[tuple[int, ...]]) -> list[int]:
    """Return the decisions in an order in which few earlier ones share a scope with later ones."""
    left, order = list(range(count)), list[int]()
    neighbours = {d: {e for scope in scopes if d in scope for e in scope} - {d} for d in left}
    # The decisions about many others come first. The others follow so that few stay open.
    open_: set[int] = set()
    left.sort(key=lambda d: (-len(neighbours[d]), d))
    while left:
        done = {*order}

        def opened(d: int, done: set[int] = done) -> tuple[int, int]:
            frontier = {e for e in {*done, d} if neighbours[e] - done - {d}}
            return len(frontier), left.index(d)

        linked = [d for d in left if neighbours[d] & open_] or left
        best = min(linked, key=opened) if order else left[0]
        left.remove(best)
        order.append(best)
        open_ = {e for e in order if neighbours[e] - {*order}}
    return order
