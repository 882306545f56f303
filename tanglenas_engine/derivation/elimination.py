"""The most probable architecture within limits, exactly: elimination of one decision after the other.

The rows of a layer depend on few others (the embedding dimension, the depth), and given those a layer is a handful of
alternatives. What is kept of them is what no other beats in score and in every cost.

Lagrange multipliers say where to look. For any of them, at least 0, `score + multipliers * (limits - costs)` is no less
than the score of an architecture that fits, and its maximum D over all architectures is found by the same elimination
with one value in place of many. An alternative that falls short of the best in its place by more than D less a score
already reached can be in no better architecture, and is dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tanglenas_engine.spaces.cost import Additive
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.size import Row

Picks = dict[Row, int]
Array = NDArray[Any]

ENTRIES = 2**22
"""The most entries that one table may have, of values or of partial architectures."""
ROUNDING = 1e-9
"""A gain of log-probability that may be none."""


@dataclass(frozen=True)
class Limit:
    """The most that a cost may be, and how to know it."""

    name: str
    most: float
    cost: Callable[[Picks], float]
    terms: Additive | None
    unit: str = ""

    @cached_property
    def allowed(self) -> float:
        """The limit, and for sums of fractions what rounding may add to them, in one order of terms or another."""
        values = itertools.chain.from_iterable(self.terms.tables.values()) if self.terms else ()
        return self.most if all(isinstance(value, int) for value in values) else self.most * (1 + 1e-12)


class TooEntangled(Exception):
    """A table would have more than `ENTRIES` entries."""


class _Front(NamedTuple):
    """Partial architectures, of which none beats another in score and in every cost."""

    scores: Array
    """`(n,)`"""
    costs: Array
    """`(n, limits)`"""
    picks: Array
    """`(n, decisions)`: the alternative of each decision made so far, 0 for others."""


class Problem:
    """Scores and costs as tables over the decisions of a space, in an order in which to eliminate them.

    Decisions are numbered so that the one eliminated first comes last; tables have their axes in this order. A table
    belongs to the bucket of its last axis.
    """

    def __init__(
        self, space: SearchSpace, scores: Mapping[Row, Sequence[float]], limits: Sequence[Limit], terms: list[Additive]
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
                raise TooEntangled
            if self.scopes[d]:
                self.received[self.scopes[d][-1]].append(d)

    @classmethod
    def of(cls, space: SearchSpace, scores: Mapping[Row, Sequence[float]], limits: Sequence[Limit]) -> Problem | None:
        """None where there is no exact way: a cost without tables, a space that does not tell its decisions."""
        terms = [limit.terms for limit in limits if limit.terms is not None]
        own = type(space).moves is not SearchSpace.moves and type(space).decisions is SearchSpace.decisions
        if own or len(terms) < len(limits):
            return None
        try:
            return cls(space, scores, limits, terms)
        except TooEntangled:
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
            TooEntangled: There is too much to look at.
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
                raise TooEntangled
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
