"""A surrogate of the supernet's judgement: ridge regression on options, minimised exactly within the budget.

Judged candidates give each option a number: what it adds to the loss. A choice that is made once, such as an embedding
dimension, changes what the others are worth, so every pair of it with another option has a number too. Ridge regression
(Hoerl and Kennard, 1970) shares the losses out, with a penalty that cross-validation chooses. The sum of such numbers
is what budgets minimise (`budget.py`), so the architecture that the regression likes best is known exactly, however
large the space is. It is judged like the others, and the regression is fitted again.

`regression.py` has the regression of races. A race trains few networks, so that regression has fewer numbers to fit.
The supernet's loss is one of its features, which only judged candidates have: it ranks these, and minimises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from tanglenas_engine.derivation.budget import Tables, Vector
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.errors import at_least
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.superposition.size import Assignment, Row, combinations

FOLDS = 5
"""Folds of the cross-validation whose correlation is reported."""
PENALTIES = np.logspace(-4, 4, 17)
"""Penalties among which cross-validation chooses."""


def surrogate(candidates: Candidates, mixture: Mixture | None, *, proposals: int = 10) -> None:
    """Judge random candidates, then those that a regression on their losses finds best, one after another.

    Where that one was judged before, a random candidate follows.

    Without enough candidates to fit, or without tables to minimise over, all candidates are random, and a note says so.

    Args:
        proposals: The largest number of candidates that the regression proposes, out of all candidates.
    """
    at_least("surrogate.proposals", proposals, 1)
    candidates.in_generations(None, single=proposals)
    if is_impossible(candidates, proposals):
        candidates.judge(candidates.first(candidates.limit))
        return
    explained = Explained(candidates)
    drawn = candidates.first(candidates.limit - proposals)
    candidates.judge(drawn, candidates.limit)
    for _ in range(proposals):
        best = candidates.budget.minimum(explained.by_tables(drawn))
        if best in drawn:  # a random one teaches more
            more = candidates.fresh(1)
            if not more:
                return
            (best,) = more
        drawn.append(best)
        candidates.judge([best], candidates.limit)


def is_impossible(candidates: Candidates, proposals: int, *costs: str | Objective) -> bool:
    """Return whether a regression is impossible, with so many proposals within limits of these costs, and note why."""
    trouble = ""
    if candidates.limit - proposals < 2 * FOLDS:
        trouble = (
            f"{candidates.limit} candidates without {proposals} proposals are too few to fit, which takes {2 * FOLDS}: "
            "raise discretize.candidates"
        )
    elif not candidates.budget.is_tabulated(*costs):
        trouble = "a cost of the budget has no tables, or the space does not tell its decisions"
    if trouble:
        candidates.note(f"no regression, all candidates are random: {trouble}")
    return bool(trouble)


class Explained:
    """A regression on the losses of candidates on the first rung. The first fit notes how well it predicts."""

    def __init__(self, candidates: Candidates):
        self._candidates, self._terms, self._told = candidates, Terms(candidates.space), False

    def by_tables(self, drawn: Sequence[Architecture]) -> Tables:
        """Return tables whose sum explains the losses of these candidates, but for a constant."""
        losses = np.array(self._candidates.early(drawn))
        known = np.isfinite(losses)
        features = np.stack([self._terms.features(one) for one in drawn])
        weights, correlation = fitted(features[known], losses[known])
        if not self._told:
            said = "unknown" if math.isnan(correlation) else f"{correlation:.2f}"
            self._candidates.note(f"the regression predicts held-out candidates with a correlation of {said}")
            self._told = True
        return self._terms.tables(weights)


def fitted(features: Vector, losses: Vector) -> tuple[Vector, float]:
    """Fit the ridge regression, and return its weights and the correlation of held-out predictions with the losses.

    Args:
        features: What each candidate has, shape (candidates, features).
        losses: The candidates' losses, shape (candidates,).
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict

    if len(losses) < 2 * FOLDS or np.ptp(losses) == 0:
        return np.zeros(features.shape[1]), math.nan
    folds = KFold(FOLDS, shuffle=True, random_state=0)
    predicted = cross_val_predict(RidgeCV(PENALTIES), features, losses, cv=folds)
    correlation = math.nan if np.ptp(predicted) == 0 else float(np.corrcoef(predicted, losses)[0, 1])
    return RidgeCV(PENALTIES).fit(features, losses).coef_, correlation


class Terms:
    """The terms of the regression: each row of choices, and its pairs with the choices that are made once.

    A row that an architecture does not use contributes nothing.
    """

    def __init__(self, space: SearchSpace):
        self.space = space
        single = [row for row in space.rows if row.layer is None]
        pairs = [(row, one) for row in space.rows for one in single if row is not one and not _behind(row, one, single)]
        self._terms: list[tuple[Row, ...]] = [*((row,) for row in space.rows), *pairs]
        self._starts = np.cumsum([0, *(math.prod(len(row.options) for row in term) for term in self._terms)])

    def features(self, architecture: Architecture) -> Vector:
        """Return 1 for each combination of options of a term that the architecture has, and 0 elsewhere."""
        picks, found = self.space.assignment_of(architecture), np.zeros(self._starts[-1])
        for start, term in zip(self._starts, self._terms, strict=False):
            if all(row.active(picks) for row in term):
                found[start + _place(term, picks)] = 1.0
        return found

    def tables(self, weights: Vector) -> Tables:
        """Return the sum of weights and features as tables, such as budgets minimise."""
        tables: dict[tuple[Row, ...], list[float]] = {}
        for start, term in zip(self._starts, self._terms, strict=False):
            rows = tuple(dict.fromkeys([*(gate for row in term for gate in _gates(row)), *term]))
            values = [
                float(weights[start + _place(term, picks)]) if all(row.active(picks) for row in term) else 0.0
                for picks in combinations(rows)
            ]
            # A row and its pair with the depth that decides whether it is used are of the same rows.
            tables[rows] = [a + b for a, b in zip(tables.get(rows, [0.0] * len(values)), values, strict=True)]
        return tables


def _behind(row: Row, one: Row, single: Sequence[Row]) -> bool:
    """Return whether a pair of choices that are made once was met before, in the other order."""
    return row in single and single.index(row) > single.index(one)


def _gates(row: Row) -> Iterator[Row]:
    """Yield the rows that decide whether a row is used."""
    if row.gate is not None:
        for gate in row.gate[0].rows:
            yield from _gates(gate)
            yield gate


def _place(term: Sequence[Row], picks: Assignment) -> int:
    """Return the number of a combination of options; the last row's option varies fastest."""
    place = 0
    for row in term:
        place = place * len(row.options) + picks[row]
    return place
