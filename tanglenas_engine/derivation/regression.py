"""A regression on what a few trained networks are worth, which tells a race whom to train next.

What a network is worth depends on its options, and on what the supernet says of it. Ridge regression (Hoerl and
Kennard, 1970) weighs both by the losses of networks that were trained, so a supernet that says little counts little. It
is a predictor of accuracy (Wen et al., 2019, arXiv:1912.00848) for so few networks that each row of numbers, such as
widths, gets one weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.size import Row

LEAST = 4
"""The smallest number of trained networks that are worth a regression."""
PENALTY = 3.0
"""The penalty of the ridge regression. With 1 and 10 simulated races end alike (benchmarks/README.md)."""

Vector = NDArray[np.float64]


def features_of(space: SearchSpace, architectures: Sequence[Architecture], losses: Sequence[float]) -> Vector:
    """Return the features of architectures, shape (architectures, features).

    A row of numbers is one feature, from -1 for the smallest to 1 for the largest, at equal steps. Another row has a
    feature for each option, which is 1 or 0. A row that an architecture does not use is 0. The last feature is the
    supernet's loss, with a mean of 0 and a deviation of 1.

    Args:
        losses: The losses with the supernet's weights.
    """
    picks = [space.assignment_of(one) for one in architectures]
    columns = [
        [column[each[row]] if row.active(each) else 0.0 for each in picks]
        for row in space.rows
        for column in _columns(row)
    ]
    judged = _bounded(losses)
    return np.array([*columns, (judged - judged.mean()) / (judged.std() or 1.0)]).T


def _columns(row: Row) -> Vector:
    """Return the values of the features of a row, shape (features, options)."""
    count = len(row.options)
    if all(isinstance(option, Real) for option in row.options):
        return np.linspace(-1, 1, count)[None, np.argsort(np.argsort(row.options))]
    return np.eye(count)


def predicted(features: Vector, losses: Mapping[int, float]) -> Vector:
    """Return the predicted losses of all architectures, shape (architectures,). Without a loss, all are alike.

    Args:
        features: Their features, shape (architectures, features).
        losses: The losses of those that were trained, by their numbers; NaN for one that diverged.
    """
    from sklearn.linear_model import Ridge

    if not losses:
        return np.zeros(len(features))
    worth = _bounded([*losses.values()])
    found: Vector = Ridge(PENALTY).fit(features[[*losses]], worth).predict(features)
    return found


def _bounded(losses: Sequence[float]) -> Vector:
    """Return the losses, and a bound in place of those above it or not finite, which would hide all others.

    The bound is above the median of the distinct losses by three times as much as the best is below it. Where there is
    one loss only, it is above that by 1: how much does not change the order of predictions.
    """
    found = np.asarray(losses, np.float64)
    finite = np.isfinite(found)
    if not finite.any():
        return np.zeros_like(found)
    distinct = np.unique(found[finite])
    middle = np.median(distinct)
    bound = middle + (3 * (middle - distinct[0]) or 1.0)
    return np.where(finite, np.minimum(found, bound), bound)
