"""Budgets: the architectures of a space that cost no more than allowed.

A cost is a sum of tables over a few rows each (`cost.Additive`), and a mixture's score is a sum over rows. So the most
probable architecture within a budget is found exactly, by dynamic programming over the space's decisions, one
eliminated after the other: the rows of a layer depend on few others (the embedding dimension, the depth), and given
those a layer is a handful of alternatives. What is kept of them is what no other beats in score and in every cost.

Lagrange multipliers say where to look. For any of them, at least 0, `score + multipliers * (limits - costs)` is no less
than the score of an architecture that fits, and its maximum D over all architectures is found by the same elimination
with one value in place of many. An alternative that falls short of the best in its place by more than D less a score
already reached can be in no better architecture, and is dropped: a few hundred remain of what may be millions.

Where a space's decisions are too entangled for tables, or its objective has none, a local search takes over;
`projection` says which it was.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tanglenas_engine.architecture import Architecture
from tanglenas_engine.cost import METRICS, Additive
from tanglenas_engine.errors import TangleNASError, unknown
from tanglenas_engine.mixture import Mixture
from tanglenas_engine.size import Row
from tanglenas_engine.space import SearchSpace
from tanglenas_engine.training import at_least

if TYPE_CHECKING:
    from tanglenas_engine.objective import Objective

Budget = Mapping[str, float | None]
"""The most that each metric of `cost.METRICS`, and each objective, may be; None for one without a limit."""

Picks = dict[Row, int]
Array = NDArray[Any]

ENTRIES = 2**22
"""The most entries that one table may have, of values or of partial architectures."""
ROUNDING = 1e-9
"""A gain of log-probability that may be none."""


@dataclass(frozen=True)
class Projection:
    """An architecture within a budget; `exact` if there is none more probable, else it is what a local search found."""

    architecture: Architecture
    exact: bool


def check_budget(space: SearchSpace, budget: Budget, objectives: Iterable[Objective] = ()) -> None:
    """Check that an architecture fits.

    Raises:
        TangleNASError: None does; the message has the smallest possible cost.
    """
    limits = _limits(space, budget, objectives)
    smallest: dict[str, Picks] = {}
    for limit in limits:
        smallest[limit.name] = _extreme(space, limit)
        least = limit.cost(smallest[limit.name])
        if least > limit.allowed:
            raise TangleNASError(
                f"no architecture of {space._label} has at most {limit.most:,} {limit.name}: the smallest has "
                f"{least:,}. Raise max_{limit.name}"
            )
    if len(limits) > 1 and not any(_excess(limits, picks) == 0 for picks in smallest.values()):
        indifferent = {row: [0.0] * len(row.options) for row in space.rows}
        if _solve(space, indifferent, limits) is None:
            wanted = " and ".join(f"{limit.most:,} {limit.name}" for limit in limits)
            known = "; ".join(
                f"that with fewest {name} has "
                + " and ".join(f"{other.cost(picks):,} {other.name}" for other in limits)
                for name, picks in smallest.items()
            )
            raise TangleNASError(f"no architecture of {space._label} has at most {wanted} together: {known}")


def cheapest(space: SearchSpace, cost: str | Objective) -> Architecture:
    """The architecture that costs least, in a metric of `cost.METRICS` or an objective bound to the space.

    Exact, but for a cost without tables or a space whose decisions are too entangled: there it is the end of a descent
    from the smallest architecture, one move at a time.
    """
    return space.architecture_of(_extreme(space, _unlimited(space, cost)))


def dearest(space: SearchSpace, cost: str | Objective) -> Architecture:
    """The architecture that costs most, as `cheapest` finds the one that costs least."""
    return space.architecture_of(_extreme(space, _unlimited(space, cost), -1))


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
        raise TangleNASError(f"no architecture of {space._label} was found within the budget: raise it")
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


@dataclass(frozen=True)
class _Limit:
    """The most that a cost may be, and how to know it."""

    name: str
    most: float
    cost: Callable[[Picks], float]
    terms: Additive | None

    @cached_property
    def allowed(self) -> float:
        """The limit, and for sums of fractions what rounding may add to them, in one order of terms or another."""
        values = itertools.chain.from_iterable(self.terms.tables.values()) if self.terms else ()
        return self.most if all(isinstance(value, int) for value in values) else self.most * (1 + 1e-12)


def _limits(space: SearchSpace, budget: Budget, objectives: Iterable[Objective]) -> list[_Limit]:
    known = {objective.name: objective for objective in objectives}
    limits = []
    for name, most in budget.items():
        if most is None:
            continue
        if most != math.inf and name in METRICS:
            at_least(f"max_{name}", most, 1)
        elif isinstance(most, bool) or not isinstance(most, int | float) or not most > 0:
            raise TangleNASError(f"max_{name} is {most!r}, expected a positive number")
        if name in known:

            def measured(picks: Picks, objective: Objective = known[name]) -> float:
                return objective.cost(space.architecture_of(picks))

            terms = known[name].additive
            limits.append(_Limit(name, most, terms.cost if terms else measured, terms))
        elif name in METRICS:
            limits.append(_Limit(name, most, space.terms(name).cost, space.terms(name)))
        else:
            raise unknown("cost in a budget", name, [*METRICS, *known])
    return limits


def _excess(limits: Sequence[_Limit], picks: Picks) -> float:
    """By which share the budget is exceeded, summed over its limits; 0 within it."""
    costs = [(limit.cost(picks), limit) for limit in limits]
    return float(sum(cost / limit.most - 1 for cost, limit in costs if cost > limit.allowed))


def _unlimited(space: SearchSpace, cost: str | Objective) -> _Limit:
    if isinstance(cost, str):
        return _limits(space, {cost: math.inf}, ())[0]
    return _limits(space, {cost.name: math.inf}, (cost,))[0]


def _extreme(space: SearchSpace, limit: _Limit, sign: int = 1) -> Picks:
    """The assignment for which `sign` times the cost is least."""
    problem = _Problem.of(space, {}, [limit])
    if problem is not None:
        return problem.picks(problem.relaxed(np.array([sign]))[1])

    def cost(picks: Picks) -> float:
        return sign * limit.cost(picks)

    picks = space.assignment_of(space.smallest() if sign > 0 else space.largest())
    while True:
        least = min(({**picks, **change} for change in space.moves(picks)), key=cost, default=picks)
        if not cost(least) < cost(picks):
            return picks
        picks = least


def _solve(
    space: SearchSpace, scores: Mapping[Row, Sequence[float]], limits: Sequence[_Limit], start: Picks | None = None
) -> tuple[Picks, bool] | None:
    """The assignment of highest score within the limits, and whether that is certain; None if none was found.

    `start` is where a local search begins, should it be needed.
    """
    problem = _Problem.of(space, scores, limits)
    incumbent = None
    if problem is not None:
        bound, multipliers, incumbent = problem.dual()
        if incumbent is None:  # whether anything fits is easier to see where all is equally probable
            possible = _Problem.of(space, {}, limits)
            assert possible is not None
            least, _, incumbent = possible.dual()
            if least < -ROUNDING:
                return None
        try:
            found = problem.search(bound, multipliers, incumbent)
            return None if found is None else (problem.picks(found), True)
        except _TooEntangled:
            pass
    within = None if problem is None or incumbent is None else problem.picks(incumbent)
    picks = _local_search(space, scores, limits, start or space.assignment_of(space.smallest()), within)
    return None if picks is None else (picks, False)


# The exact way.


class _TooEntangled(Exception):
    """A table would have more than `ENTRIES` entries."""


class _Front(NamedTuple):
    """Partial architectures, of which none beats another in score and in every cost."""

    scores: Array
    """`(n,)`"""
    costs: Array
    """`(n, limits)`"""
    picks: Array
    """`(n, decisions)`: the alternative of each decision made so far, 0 for others."""


class _Problem:
    """Scores and costs as tables over the decisions of a space, in an order in which to eliminate them.

    Decisions are numbered so that the one eliminated first comes last; tables have their axes in this order. A table
    belongs to the bucket of its last axis.
    """

    def __init__(
        self, space: SearchSpace, scores: Mapping[Row, Sequence[float]], limits: Sequence[_Limit], terms: list[Additive]
    ):
        decisions = [list(alternatives) for alternatives in space.decisions()]
        home = {row: i for i, alternatives in enumerate(decisions) for row in alternatives[0]}
        order = _order(
            [len(alternatives) for alternatives in decisions],
            [{home[row] for row in rows} for additive in terms for rows in additive.tables],
        )
        self.decisions = [decisions[i] for i in reversed(order)]
        self.sizes = [len(alternatives) for alternatives in self.decisions]
        home = {row: i for i, alternatives in enumerate(self.decisions) for row in alternatives[0]}
        self.scores = [
            np.array([sum(scores[row][option] for row, option in pick.items()) if scores else 0.0 for pick in picks])
            for picks in self.decisions
        ]
        self.count = len(limits)
        self.limits = np.zeros(self.count)
        # By bucket: axes before the last one, and costs of shape (limits, *axes).
        self.costs: list[dict[tuple[int, ...], Array]] = [{} for _ in self.decisions]
        for j, (limit, additive) in enumerate(zip(limits, terms, strict=True)):
            self.limits[j] = limit.allowed
            for rows, values in additive.tables.items():
                least = min(values)
                self.limits[j] -= least  # costs are at least 0: what exceeds a limit in part does so altogether
                scope = tuple(sorted({home[row] for row in rows}))
                if not scope:
                    continue
                table = np.array(values, dtype=np.float64).reshape([len(row.options) for row in rows]) - least
                places = [
                    np.array([pick[row] for pick in self.decisions[home[row]]]).reshape(
                        [-1 if axis == home[row] else 1 for axis in scope]
                    )
                    for row in rows
                ]
                shape = (self.count, *(self.sizes[axis] for axis in scope))
                self.costs[scope[-1]].setdefault(scope[:-1], np.zeros(shape))[j] += table[tuple(places)]
        # By bucket: the axes that it leaves, which its message is over, and the bucket that this goes to.
        self.scopes: list[tuple[int, ...]] = [() for _ in self.decisions]
        self.received: list[list[int]] = [[] for _ in self.decisions]
        for d in reversed(range(len(self.decisions))):
            parts = [*self.costs[d], *(self.scopes[sender] for sender in self.received[d])]
            self.scopes[d] = tuple(sorted({axis for part in parts for axis in part} - {d}))
            if math.prod(self.sizes[axis] for axis in (*self.scopes[d], d)) * self.count > ENTRIES:
                raise _TooEntangled
            if self.scopes[d]:
                self.received[self.scopes[d][-1]].append(d)

    @classmethod
    def of(cls, space: SearchSpace, scores: Mapping[Row, Sequence[float]], limits: Sequence[_Limit]) -> _Problem | None:
        """None where there is no exact way: a cost without tables, a space that does not tell its decisions."""
        terms = [limit.terms for limit in limits if limit.terms is not None]
        own = type(space).moves is not SearchSpace.moves and type(space).decisions is SearchSpace.decisions
        if own or len(terms) < len(limits):
            return None
        try:
            return cls(space, scores, limits, terms)
        except _TooEntangled:
            return None

    def picks(self, alternatives: Sequence[int] | Array) -> Picks:
        """The assignment of the alternatives, one per decision."""
        return {
            row: option
            for decision, chosen in zip(self.decisions, alternatives, strict=True)
            for row, option in decision[int(chosen)].items()
        }

    def relaxed(self, multipliers: Array) -> tuple[float, Array]:
        """The maximum of `score - multipliers * costs` over all architectures, and where it is."""
        messages: dict[int, Array] = {}
        best: dict[int, Array] = {}
        value = 0.0
        for d in reversed(range(len(self.decisions))):
            axes = (*self.scopes[d], d)
            total = self.scores[d]
            for scope, costs in self.costs[d].items():
                total = total - self._spread(np.tensordot(multipliers, costs, 1), (*scope, d), axes)
            for sender in self.received[d]:
                total = total + self._spread(messages[sender], self.scopes[sender], axes)
            total = np.broadcast_to(total, [self.sizes[axis] for axis in axes])
            best[d] = total.argmax(-1)
            messages[d] = total.max(-1)
            if not self.scopes[d]:
                value += float(messages[d])
        chosen = np.zeros(len(self.decisions), dtype=np.int32)
        for d in range(len(self.decisions)):
            chosen[d] = best[d][tuple(chosen[axis] for axis in self.scopes[d])]
        return value, chosen

    def score(self, chosen: Array) -> float:
        return float(sum(scores[pick] for scores, pick in zip(self.scores, chosen, strict=True)))

    def spent(self, chosen: Array) -> Array:
        """The costs `(limits,)`, less what all architectures cost."""
        total = np.zeros(self.count)
        for d, tables in enumerate(self.costs):
            for scope, costs in tables.items():
                total += costs[(slice(None), *(chosen[axis] for axis in (*scope, d)))]
        return total

    def dual(self) -> tuple[float, Array, Array | None]:
        """A small bound on the score of what fits, its multipliers, and the best that fits of what was seen.

        Bisection for each multiplier in turn: where its cost falls to the limit, the bound is least.
        """
        multipliers = np.zeros(self.count)
        bound, at, incumbent, reached = math.inf, multipliers.copy(), None, -math.inf

        def look() -> Array:
            nonlocal bound, at, incumbent, reached
            value, chosen = self.relaxed(multipliers)
            spent, score = self.spent(chosen), self.score(chosen)
            if (here := value + float(multipliers @ self.limits)) < bound:
                bound, at = here, multipliers.copy()
            if bool((spent <= self.limits).all()) and score > reached:
                incumbent, reached = chosen, score
            return spent

        look()
        for _ in range(1 if self.count == 1 else 4):
            for j, limit in enumerate(self.limits):
                low, high = 0.0, max(multipliers[j], 1 / max(1e-9, abs(limit)))
                multipliers[j] = 0.0
                if look()[j] <= limit:
                    continue
                for _ in range(40):
                    multipliers[j] = high
                    if look()[j] <= limit:
                        break
                    low, high = high, 4 * high
                for _ in range(25):
                    multipliers[j] = (low + high) / 2
                    low, high = (multipliers[j], high) if look()[j] > limit else (low, multipliers[j])
                multipliers[j] = high
        return bound, at, incumbent

    def search(self, bound: float, multipliers: Array, incumbent: Array | None) -> Array | None:
        """The alternatives of highest score within the limits, or None if nothing is.

        Raises:
            _TooEntangled: There is too much to look at.
        """
        room = math.inf if incumbent is None else bound - self.score(incumbent)
        if incumbent is not None and room <= ROUNDING:
            return incumbent
        # Most often the best is much nearer to the bound than the incumbent, and little remains to be looked at.
        for share in (1 / 32, 1 / 8, 1 / 2, 1) if incumbent is not None else (1,):
            front = self._eliminated(multipliers, share * room + ROUNDING)
            if len(front.scores):
                best = int(front.scores.argmax())
                if front.scores[best] >= bound - share * room - 2 * ROUNDING:
                    return np.asarray(front.picks[best])
        return incumbent

    def _eliminated(self, multipliers: Array, gap: float) -> _Front:
        """What is left of all architectures: of each table those within `gap` of its best."""
        messages: dict[int, Any] = {}  # arrays of fronts
        whole = _Front(np.zeros(1), np.zeros((1, self.count)), np.zeros((1, len(self.decisions)), dtype=np.int32))
        for d in reversed(range(len(self.decisions))):
            axes = (*self.scopes[d], d)
            shape = [self.sizes[axis] for axis in self.scopes[d]]
            costs = np.zeros((self.count, *(self.sizes[axis] for axis in axes)))
            for scope, table in self.costs[d].items():
                costs += self._spread(table, (*scope, d), axes)
            own = np.zeros((self.sizes[d], len(self.decisions)), dtype=np.int32)
            own[:, d] = np.arange(self.sizes[d])
            messages[d] = np.empty(shape, dtype=object)
            for index in np.ndindex(*shape):
                given = dict(zip(self.scopes[d], index, strict=True))
                front = _Front(self.scores[d], costs[(slice(None), *index)].T, own)
                if self.received[d]:
                    front = _joined(
                        [
                            self._merged(
                                _Front(*(part[k : k + 1] for part in front)),
                                [
                                    messages[sender][tuple({**given, d: k}[axis] for axis in self.scopes[sender])]
                                    for sender in self.received[d]
                                ],
                                multipliers,
                                gap,
                            )
                            for k in range(self.sizes[d])
                        ]
                    )
                messages[d][index] = self._pruned(front, multipliers, gap)
            if not shape:
                whole = self._merged(whole, [messages[d][()]], multipliers, gap)
        return whole

    def _merged(self, front: _Front, others: Iterable[_Front], multipliers: Array, gap: float) -> _Front:
        """All combinations of independent parts that are worth keeping."""
        for other in others:
            if len(front.scores) * len(other.scores) * front.picks.shape[1] > 16 * ENTRIES:
                raise _TooEntangled
            front = self._pruned(
                _Front(
                    (front.scores[:, None] + other.scores).ravel(),
                    (front.costs[:, None] + other.costs).reshape(-1, self.count),
                    (front.picks[:, None] + other.picks).reshape(-1, front.picks.shape[1]),
                ),
                multipliers,
                gap,
            )
        return front

    def _pruned(self, front: _Front, multipliers: Array, gap: float) -> _Front:
        if not len(front.scores):
            return front
        values = front.scores - front.costs @ multipliers
        keep = (values >= values.max() - gap) & (front.costs <= self.limits).all(1)
        front = _Front(*(part[keep] for part in front))
        # Cheapest first, and of equals the best: what is kept is beaten by nothing before it.
        order = np.lexsort((-front.scores, *front.costs.T[::-1]))
        front = _Front(*(part[order] for part in front))
        if self.count == 1:
            before = np.maximum.accumulate(np.concatenate([[-np.inf], front.scores[:-1]]))
            return _Front(*(part[front.scores > before] for part in front))
        kept: list[int] = []
        for i in range(len(front.scores)):
            if not ((front.scores[kept] >= front.scores[i]) & (front.costs[kept] <= front.costs[i]).all(1)).any():
                kept.append(i)
        return _Front(*(part[kept] for part in front))

    def _spread(self, table: Array, scope: Sequence[int], axes: Sequence[int]) -> Array:
        """A table over `scope`, the last of its axes, with the axes of `axes`: 1 long where it lacks one."""
        leading = table.shape[: table.ndim - len(scope)]
        return table.reshape(*leading, *(self.sizes[axis] if axis in scope else 1 for axis in axes))


def _joined(fronts: Sequence[_Front]) -> _Front:
    return _Front(*(np.concatenate(parts) for parts in zip(*fronts, strict=True)))


def _order(sizes: Sequence[int], scopes: Iterable[set[int]]) -> list[int]:
    """Decisions in the order in which to eliminate them: always the one that leaves the smallest table."""
    near: dict[int, set[int]] = {i: set() for i in range(len(sizes))}
    for scope in scopes:
        for i in scope:
            near[i] |= scope - {i}
    order = []
    while near:
        chosen = min(near, key=lambda i: (math.prod(sizes[j] for j in near[i]), i))
        for i in near[chosen]:
            near[i] |= near[chosen] - {i}
            near[i].discard(chosen)
        del near[chosen]
        order.append(chosen)
    return order


# The other way.


def _local_search(
    space: SearchSpace,
    scores: Mapping[Row, Sequence[float]],
    limits: Sequence[_Limit],
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
