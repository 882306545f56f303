"""Means over seeds with intervals, and the number of seeds that a claim needs.

The interval of a mean is a percentile bootstrap over seeds (Efron and Tibshirani, 1993).
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
"""The confidence level of intervals."""
RESAMPLES = 9999
POWER = 0.8
"""The probability with which a claim's seeds show a difference that is there."""
ROUNDING = 1e-12
"""The share of a mean, or of 1, up to which a deviation is a rounding error, and so is a mean of differences."""
MOST_SEEDS = 9999
"""The largest number of seeds that a claim is said to need."""


@dataclass(frozen=True)
class Metric:
    """A number that compares runs.

    Attributes:
        title: Its name for a person.
        unit: The unit of what tables show, or "".
        decimals: The decimals of a mean in tables.
        scale: The number that tables divide it by.
    """

    title: str
    unit: str
    decimals: int
    scale: float = 1.0

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


METRICS = {
    "test_accuracy": Metric("test accuracy", "%", 2),
    "test_loss": Metric("test loss", "nats", 4),
    "test_perplexity": Metric("test perplexity", "", 3),
    "macs": Metric("MACs", "millions", 3, 1e6),
    "params": Metric("parameters", "thousands", 2, 1e3),
    "search_seconds": Metric("search, wall time", "s", 1),
    "search_processor_seconds": Metric("search, processor time", "s", 1),
    "processor_seconds": Metric("all stages, processor time", "s", 1),
    "peak_memory_MiB": Metric("peak memory", "MiB", 0),
}
"""The metrics that a comparison shows unless it is told others."""


def metric_of(name: str) -> Metric:
    """Return how a metric is shown. One that is not in METRICS has its own name and four decimals."""
    return METRICS.get(name) or Metric(name.replace("_", " "), "", 4)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        count: The number of seeds.
        deviation: The standard deviation, of one degree of freedom less than there are seeds. None for one seed, and 0
            for values that are equal up to rounding.
        interval: The ends of the bootstrap interval of the mean, or None for one seed.
    """

    count: int
    mean: float
    deviation: float | None = None
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the mean of one value or more. The resamples are the same in every call."""
        if len(values) == 1:
            return cls(1, values[0])
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        if deviation <= ROUNDING * max(1.0, abs(mean)):
            return cls(len(values), mean, 0.0, (mean, mean))
        low, high = bootstrap(np.asarray(values)[:, None])
        return cls(len(values), mean, deviation, (float(low[0]), float(high[0])))


def bootstrap(values: np.ndarray[Any, Any], resamples: int = RESAMPLES) -> tuple[Any, Any]:
    """Return the ends of the interval of the mean over the first dimension.

    Args:
        values: Of shape `(seeds, points)`, with two seeds or more.
        resamples: The number of times that seeds are drawn with replacement.
    """
    from scipy import stats  # type: ignore[import-untyped]

    interval = stats.bootstrap(
        (values,), np.mean, axis=0, n_resamples=resamples, confidence_level=LEVEL, method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return interval.low, interval.high


def seeds_needed(difference: float, deviation: float) -> int | None:
    """Return how many seeds show a difference, or None if the difference or the deviation is 0.

    It is the least n for which a two-sided paired t-test at level 1 - LEVEL has the power POWER. Under the difference d
    with the standard deviation s, the test's statistic has a noncentral t distribution with n - 1 degrees of freedom
    and the noncentrality d sqrt(n) / s. Differences are assumed to be independent and normal, and d and s to be the
    true ones. Above MOST_SEEDS the result is MOST_SEEDS + 1.
    """
    if difference == 0 or deviation == 0:
        return None
    from scipy import stats

    effect = abs(difference) / deviation

    def power(count: int) -> float:
        edge, centre = stats.t.ppf((1 + LEVEL) / 2, count - 1), effect * math.sqrt(count)
        # The other tail is NaN where it is too small for SciPy, which it often is, and then adds nothing.
        return float(stats.nct.sf(edge, count - 1, centre) + np.nan_to_num(stats.nct.cdf(-edge, count - 1, centre)))

    # The power is NaN for a very large effect, which `bisect` takes for enough.
    return 2 + bisect.bisect_left(range(2, MOST_SEEDS + 1), POWER, key=power)
