"""Budgets: the architectures of a space that cost no more than allowed.

A cost is a sum of tables over a few rows of choices each (`cost.Additive`), and a mixture's score is a sum over rows.
So the most probable architecture within limits is the solution of a mixed-integer linear program, which HiGHS finds:

    minimize    sum_{d, a}  loss[d, a] x[d, a]
    subject to  sum_a x[d, a] = 1                              for each decision d of `space.decisions()`
                sum_{c: d takes a} y[s, c] = x[d, a]           for each scope s, each d in s, each alternative a of d
                sum_{s, c} cost[l, s, c] y[s, c] <= most[l]    for each limit l
                x in {0, 1}, y in [0, 1]

x[d, a] is 1 if decision d takes its alternative a, which gives away the score loss[d, a] against its best alternative.
A scope s is the set of decisions that a table is over, and y[s, c] is 1 if they take the combination c of alternatives.
A scope of one decision has no y of its own: there it is x.

HiGHS computes with tolerances: x may be 1e-6 from a whole number. So costs and losses are computed again from the
decisions taken, costs in whole numbers where tables hold them. If a limit is exceeded, or the losses are more than the
bound that HiGHS proved, what costs or loses no less in any scope is excluded, and HiGHS solves again.

A cost without tables has no such program, nor has a space that overrides `moves` without `decisions`. There a local
search takes over, and `Projection.exact` is False.
"""

from __future__ import annotations

import itertools
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize  # type: ignore[import-untyped]

from tanglenas_engine.errors import TangleNASError, at_least, positive, unknown
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.cost import METRICS, Additive
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.superposition.size import Assignment, Row, Size

Picks = dict[Row, int]
Vector = NDArray[np.float64]
Tables = Mapping[tuple[Row, ...], Sequence[float]]

LABELS = {"macs": "MACs"}
"""Costs that messages call otherwise than options do."""
MARGIN = 1 + 1e-12
"""The factor by which rounding may change fractions of a cost, and sums of them."""
ROUNDING = 1e-9
"""Gains of log-probability below this are rounding errors."""
MAX_NODES = 100_000
"""Nodes of HiGHS' search tree after which a local search takes over."""
MAX_SOLVES = 100
"""Runs of HiGHS after which a local search takes over."""


@dataclass(frozen=True)
class Projection:
    """An architecture within a budget.

    Attributes:
        architecture: The architecture.
        exact: True if no architecture within the budget is more probable. False if a local search found this one.
    """

    architecture: Architecture
    exact: bool


class Budget:
    """Upper limits on what an architecture of a space may cost.

    Args:
        limits: An upper limit for each metric of `cost.METRICS` or objective, by name. None and infinity set no limit.
            Limits on metrics are rounded down, because metrics are counts.
        objectives: Bound to the space; for limits on costs that are not of `cost.METRICS`.

    Raises:
        TangleNASError: A limit is not a positive number, or its name is neither a metric nor an objective's.

    Attributes:
        limits: The limits, in the order given.
    """

    def __init__(self, space: SearchSpace, limits: Mapping[str, float | None], objectives: Iterable[Objective] = ()):
        known = {objective.name: objective for objective in objectives}
        self.space = space
        finite = {name: most for name, most in limits.items() if most is not None and most != math.inf}
        self.limits = [_limit(space, name, most, known) for name, most in finite.items()]

    def excess(self, assignment: Assignment) -> float:
        """Return by which share the limits are exceeded, summed over them; 0 within the budget."""
        costs = [(limit.cost(assignment), limit) for limit in self.limits]
        return float(sum(cost / limit.most - 1 for cost, limit in costs if cost > limit.allowed))

    def check(self) -> None:
        """Check that an architecture fits.

        Raises:
            TangleNASError: None fits, or a local search found none; the message has the smallest cost.
        """
        smallest: dict[str, Picks] = {}
        certain = True
        for limit in self.limits:
            smallest[limit.name], exact = _extreme(self.space, limit)
            certain = certain and exact
            least = limit.cost(smallest[limit.name])
            if least > limit.allowed:
                raise TangleNASError(
                    f"no architecture of {self.space.label} {_has(exact)} at most {limit.counted(limit.most)}: the "
                    f"smallest has {amount(least)}{limit.unit and f' {limit.unit}'}. Raise the limit of {limit.name}"
                )
        if len(self.limits) < 2 or any(self.excess(picks) == 0 for picks in smallest.values()):
            return
        indifferent = {row: [0.0] * len(row.options) for row in self.space.rows}
        if self._best(indifferent, self.space.assignment_of(self.space.smallest())) is None:
            wanted = " and ".join(limit.counted(limit.most) for limit in self.limits)
            nearest = "; ".join(
                f"that with least {name} has " + " and ".join(limit.counted(limit.cost(p)) for limit in self.limits)
                for name, p in smallest.items()
            )
            raise TangleNASError(
                f"no architecture of {self.space.label} {_has(certain)} at most {wanted} together: {nearest}"
            )

    def project(self, mixture: Mixture) -> Projection:
        """Return the most probable architecture within the budget.

        Rows beyond a depth count at their most probable option. So without a limit it is the architecture of every
        row's most probable option, which a gradient search means. The solver decides between equally probable ones.

        Raises:
            TangleNASError: No architecture fits.
        """
        free = self.space.most_probable(mixture)
        start = self.space.assignment_of(free)
        if self.excess(start) == 0:
            return Projection(free, True)
        found = self._best(self.space.scores(mixture), start)
        if found is None:
            self.check()
            raise TangleNASError(f"no architecture of {self.space.label} was found within the budget: raise it")
        return Projection(self.space.architecture_of(found[0]), found[1])

    def is_tabulated(self, *costs: str | Objective) -> bool:
        """Return whether the limits, and these costs, have tables over the decisions of the space."""
        return tabulated(self.space, [*self.limits, *(_unlimited(self.space, cost) for cost in costs)])

    def minimum(self, tables: Tables) -> Architecture:
        """Return the architecture within the budget at which a sum of tables is least.

        Raises:
            TangleNASError: A cost of the budget has no tables, the space overrides `moves` without `decisions`, or no
                architecture fits.
        """
        if not tabulated(self.space, self.limits):
            raise TangleNASError(
                f"a sum is minimised over tables, but a cost of the budget has none, or {self.space.label} does not "
                "tell its decisions: use method 'random' or 'evolution'"
            )
        found, _ = _solve(self.space, tables, self.limits)
        if found is None:
            self.check()
            raise TangleNASError(f"no architecture of {self.space.label} was found within the budget: raise it")
        return self.space.architecture_of(found)

    def cheapest(self, cost: str | Objective) -> Architecture:
        """Return the architecture within the budget that costs least in another cost.

        Without tables it is the end of random moves that cost less, from an architecture within the budget.
        """
        return self._end(cost, 1)

    def dearest(self, cost: str | Objective) -> Architecture:
        """Return the architecture within the budget that costs most in another cost: a baseline that needs no data.

        Without tables it is the end of random moves that cost more, from an architecture within the budget.
        """
        return self._end(cost, -1)

    def _end(self, cost: str | Objective, sign: int) -> Architecture:
        """Return the architecture within the budget of least `sign * cost`."""
        limit = _unlimited(self.space, cost)
        if tabulated(self.space, [limit, *self.limits]):
            goal = {rows: [sign * value for value in values] for rows, values in (limit.tables or {}).items()}
            found, _ = _solve(self.space, goal, self.limits)
            if found is not None:
                return self.space.architecture_of(found)
        self.check()
        generator = torch.Generator().manual_seed(0)
        start = self.shrink(self.space.smallest() if sign > 0 else self.space.largest(), generator)
        bound = limit.cost(_extreme(self.space, limit, sign)[0])

        def missing(picks: Picks) -> float:
            return math.inf if self.excess(picks) else max(0.0, float(sign * (limit.cost(picks) - bound)))

        return self.space.architecture_of(self._descend(self.space.assignment_of(start), missing, generator))

    def shrink(self, architecture: Architecture, generator: torch.Generator) -> Architecture:
        """Return the architecture after random moves into the budget, each of which lowers the excess."""
        picks = self._descend(self.space.assignment_of(architecture), self.excess, generator)
        if self.excess(picks) > 0:  # no move saves by itself
            return self.project(self.space.one_hot(architecture)).architecture
        return self.space.architecture_of(picks)

    def grow(self, architecture: Architecture, generator: torch.Generator, share: float = 1.0) -> Architecture:
        """Return the architecture after random moves within the budget, each of which uses more of the tightest limit.

        The tightest limit is the one of which the largest share is used. The moves end at `share` of it, or where no
        move leads nearer. An architecture beyond the budget is shrunk first.
        """

        def room(picks: Picks) -> float:
            used = max(limit.cost(picks) / limit.most for limit in self.limits)
            return math.inf if self.excess(picks) else max(0.0, share - used)

        architecture = self.shrink(architecture, generator)
        if not self.limits or not share:
            return architecture
        return self.space.architecture_of(self._descend(self.space.assignment_of(architecture), room, generator))

    def _descend(self, picks: Picks, height: Callable[[Picks], float], generator: torch.Generator) -> Picks:
        """Make random moves that lower `height`, until it is 0 or no move lowers it, and return the result."""
        here, descending = height(picks), True
        while here > 0 and descending:
            moves, descending = list(self.space.moves(picks)), False
            for index in torch.randperm(len(moves), generator=generator).tolist():
                if (there := height({**picks, **moves[index]})) < here:
                    picks, here, descending = {**picks, **moves[index]}, there, True
                    break
        return picks

    def _best(self, scores: Mapping[Row, Sequence[float]], start: Picks) -> tuple[Picks, bool] | None:
        """Return the assignment of highest score within the limits, and whether that is certain; None if none fits."""
        found, certain = None, False
        if tabulated(self.space, self.limits):
            losses: Tables = {(row,): [max(values) - value for value in values] for row, values in scores.items()}
            found, certain = _solve(self.space, losses, self.limits)
        if not certain:
            found = self._searched(scores, start if found is None else found)
        return None if found is None else (found, certain)

    def _searched(self, scores: Mapping[Row, Sequence[float]], picks: Picks) -> Picks | None:
        """Return an assignment within the limits that no move and no two moves improve, or None if none was found.

        Moves that lose least score per share of the excess lead into the budget.
        """

        def gain(change: Picks) -> float:
            return sum(scores[row][option] - scores[row][picks[row]] for row, option in change.items())

        over = self.excess(picks)
        while over > 0:
            moves = [(change, self.excess({**picks, **change})) for change in self.space.moves(picks)]
            rated = [(-gain(change) / (over - after), change, after) for change, after in moves if after < over]
            if not rated:  # a change helps only together with another
                picks = self.space.assignment_of(self.space.smallest())
                if self.excess(picks) > 0:
                    return None
                break
            _, change, over = min(rated, key=lambda move: move[0])
            picks = {**picks, **change}
        better: Picks | None = picks
        while better is not None:
            picks = better
            one = [(gain(change), change) for change in self.space.moves(picks)]
            two = [(a + b, {**p, **q}) for (a, p), (b, q) in itertools.combinations(one, 2) if p.keys().isdisjoint(q)]
            gains = sorted((g for g in [*one, *two] if g[0] > ROUNDING), key=lambda g: -g[0])
            better = next(({**picks, **c} for _, c in gains if not self.excess({**picks, **c})), None)
        return picks


def cheapest(space: SearchSpace, cost: str | Objective) -> Architecture:
    """Return the architecture that costs least, in a metric of `cost.METRICS` or an objective bound to the space.

    Without tables, or in a space that does not tell its decisions, it is the end of a descent from the smallest
    architecture, one move at a time.
    """
    return space.architecture_of(_extreme(space, _unlimited(space, cost))[0])


def dearest(space: SearchSpace, cost: str | Objective) -> Architecture:
    """Return the architecture that costs most, as `cheapest` returns the one that costs least."""
    return space.architecture_of(_extreme(space, _unlimited(space, cost), -1)[0])


def amount(value: float, digits: int = 7) -> str:
    """Return a cost as a person reads it: with so many digits, and whole where these leave no fraction."""
    is_whole = float(value).is_integer() or abs(value) >= 10 ** (digits - 1)
    return f"{value:,.0f}" if is_whole else f"{value:,.{digits}g}"


def whole(most: float) -> int:
    """Return the largest count within a limit. A share of a count may be rounded to just below a whole number."""
    return most if isinstance(most, int) else math.floor(most * MARGIN)


@dataclass(frozen=True)
class Limit:
    """An upper limit on one cost, and the function that computes the cost of an assignment."""

    name: str
    most: float
    cost: Callable[[Assignment], float]
    tables: Tables | None
    unit: str = ""

    @cached_property
    def allowed(self) -> float:
        """The limit, with a margin for what rounding adds to sums of fractions, in one order of terms or another."""
        counts = all(isinstance(value, int) for values in (self.tables or {}).values() for value in values)
        return self.most if counts else self.most * MARGIN

    def counted(self, cost: float, digits: int = 7) -> str:
        return " ".join(part for part in (amount(cost, digits), self.unit, LABELS.get(self.name, self.name)) if part)


def _limit(space: SearchSpace, name: str, most: float, known: Mapping[str, Objective]) -> Limit:
    positive(f"the limit of {name}", most, infinite=True)
    if name in METRICS and most != math.inf:
        # The message is about the limit that was given, which may be a fraction.
        most = whole(most) or at_least(f"the limit of {name}", most, 1)
    if name not in {*METRICS, *known}:
        raise TangleNASError(
            f"{unknown('cost in a budget', name, [*METRICS, *known])} For another cost, pass its objective"
        )
    unit = "" if name in METRICS else known[name].unit
    terms: Additive | None = known[name].additive if name in known else space.terms(name)
    if terms is None:
        return Limit(name, most, lambda picks: known[name].cost(space.architecture_of(picks)), None, unit)
    return Limit(name, most, terms.cost, terms.tables, unit)


def _unlimited(space: SearchSpace, cost: str | Objective) -> Limit:
    name, known = (cost, {}) if isinstance(cost, str) else (cost.name, {cost.name: cost})
    return _limit(space, name, math.inf, known)


def _has(certain: bool) -> str:
    return "has" if certain else "was found that has"


def _extreme(space: SearchSpace, limit: Limit, sign: int = 1) -> tuple[Picks, bool]:
    """Return the assignment of least `sign * cost`, and whether that is certain."""

    def cost(picks: Picks) -> float:
        return sign * limit.cost(picks)

    if limit.tables is not None and tabulated(space, [limit]):
        found, certain = _solve(space, {rows: [sign * v for v in values] for rows, values in limit.tables.items()}, [])
        if found is not None and certain:
            return found, True
    picks = space.assignment_of(space.smallest() if sign > 0 else space.largest())
    while True:
        least = min(({**picks, **change} for change in space.moves(picks)), key=cost, default=picks)
        if not cost(least) < cost(picks):
            return picks, False
        picks = least


def tabulated(space: SearchSpace, limits: Iterable[Limit]) -> bool:
    """Return whether the space tells its decisions, and all costs have tables: whether there is a program."""
    silent = type(space).moves is not SearchSpace.moves and type(space).decisions is SearchSpace.decisions
    return not silent and all(limit.tables is not None for limit in limits)


def _solve(space: SearchSpace, goal: Tables, limits: Sequence[Limit]) -> tuple[Picks | None, bool]:
    """Return the assignment within the limits of least `goal`, or None, and whether that is certain."""
    decisions = [list(alternatives) for alternatives in space.decisions()]
    every = [goal, *(limit.tables or {} for limit in limits)]
    shared = {scope for tables in every for scope in scopes_of(tables, decisions) if len(scope) > 1}
    # The variables of a scope are numbered by the alternatives of its decisions: those of x first, then those of y.
    picks: dict[tuple[int, ...], list[Picks]] = {}
    places: dict[tuple[int, ...], NDArray[np.int64]] = {}
    count = 0
    for scope in [*((d,) for d in range(len(decisions))), *sorted(shared)]:
        shape = [len(decisions[d]) for d in scope]
        picks[scope] = [dict(ChainMap(*parts)) for parts in itertools.product(*(decisions[d] for d in scope))]
        places[scope] = count + np.arange(len(picks[scope])).reshape(shape)
        count += len(picks[scope])

    def ones(where: Any) -> Vector:
        return np.isin(np.arange(count), where).astype(np.float64)

    def linear(tables: Tables) -> tuple[Vector, float, float]:
        """Return coefficients from 0 to 1e6, the factor that makes them so, and a constant to add before it does."""
        coefficients, constant = np.zeros(count), 0.0
        for scope, above, least in scoped(tables, decisions):
            constant += least
            if scope:
                coefficients[places[scope]] += above
        factor = 1e6 / (coefficients.max() or 1.0)
        return coefficients * factor, factor, constant

    # Each constraint is (row, least, most): least <= row @ variables <= most.
    constraints: list[tuple[Vector, float, float]] = [(ones(places[d,]), 1, 1) for d in range(len(decisions))]
    for scope in sorted(shared):
        for axis, d in enumerate(scope):
            for a, x in enumerate(places[d,]):
                constraints.append((ones(places[scope].take(a, axis)) - ones(x), 0, 0))
    costs = []
    for limit in limits:
        coefficients, factor, constant = linear(limit.tables or {})
        costs.append(coefficients)
        constraints.append((coefficients, -math.inf, (limit.allowed - constant) * factor))
    losses, _, _ = linear(goal)
    best, value = None, math.inf
    for _ in range(MAX_SOLVES):
        matrix, least, most = zip(*constraints, strict=True)
        result = optimize.milp(
            losses,
            integrality=np.arange(count) < sum(map(len, decisions)),
            bounds=optimize.Bounds(0, 1),
            constraints=optimize.LinearConstraint(np.array(matrix), least, most),
            # Presolving takes as long as it saves, and prints a line in some versions.
            options={"mip_rel_gap": 0, "node_limit": MAX_NODES, "presolve": False},
        )
        if result.status != 0:
            return best, result.status == 2  # 2 is infeasible
        chosen = [int(result.x[places[d,]].argmax()) for d in range(len(decisions))]
        taken = {scope: place[tuple(chosen[d] for d in scope)] for scope, place in places.items()}
        found = dict(ChainMap(*(decisions[d][a] for d, a in enumerate(chosen))))
        lost = losses[list(taken.values())].sum()
        beyond = [row for row, limit in zip(costs, limits, strict=True) if limit.cost(found) > limit.allowed]
        if not beyond and lost < value:
            best, value = found, lost
        if value <= result.mip_dual_bound + 1e-5:
            return best, True
        for row in beyond or [losses]:
            no_less = [place[row[place] >= row[taken[scope]]] for scope, place in places.items()]
            constraints.append((ones(np.concatenate(no_less)), 0, len(places) - 1))
    return best, False


def scopes_of(tables: Iterable[Sequence[Row]], decisions: Sequence[Sequence[Picks]]) -> list[tuple[int, ...]]:
    """Return for each table the numbers of the decisions about its rows, in order."""
    home = {row: d for d, alternatives in enumerate(decisions) for row in alternatives[0]}
    return [tuple(sorted({home[row] for row in rows})) for rows in tables]


def scoped(
    tables: Tables, decisions: Sequence[Sequence[Picks]]
) -> Iterator[tuple[tuple[int, ...], NDArray[np.float64], float]]:
    """Yield tables over rows as tables over decisions.

    Yields:
        The scope, what each combination costs above the least, shape (alternatives of each decision of the scope...),
        and the least.
    """
    for (rows, values), scope in zip(tables.items(), scopes_of(tables, decisions), strict=True):
        size, least = Size(rows, values), min(values)
        ways = itertools.product(*(decisions[d] for d in scope))
        above = [size.number(dict(ChainMap(*way))) - least for way in ways]
        yield scope, np.array(above, np.float64).reshape([len(decisions[d]) for d in scope]), least
