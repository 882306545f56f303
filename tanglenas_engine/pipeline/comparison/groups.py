"""Comparisons of finished runs: groups over seeds with intervals, and paired differences between the groups.

The interval of a mean is a percentile bootstrap over seeds (Efron and Tibshirani, 1993). Two groups are compared by the
differences of runs with equal seeds, which share splits and initial weights.
"""

from __future__ import annotations

import bisect
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tanglenas_engine.errors import TangleNASError, closest, shown
from tanglenas_engine.pipeline import finished_runs
from tanglenas_engine.pipeline.config.reader import IMMATERIAL, OF_TABLE
from tanglenas_engine.pipeline.tracking.redaction import reason
from tanglenas_engine.pipeline.tracking.store import Store

LEVEL = 0.95
"""The confidence level of intervals."""
RESAMPLES = 9999
POWER = 0.8
"""The probability with which a claim's seeds show a difference that is there."""
MOST_SEEDS = 9999
"""The largest number of seeds that a claim is said to need."""
MOST_NAMED = 3
"""The most settings or runs that a note names."""
CONDITIONS = (
    "space", "dataset", "search.epochs", "search.seconds", "search.clock", "retrain.epochs", "search.objective",
    "search.target", "search.target_share", "discretize.max_params", "discretize.max_macs", "discretize.max_flops",
    "discretize.limits",
)  # fmt: skip
"""The settings without which runs are not comparable: what is searched, on which data, and within which budgets."""
OF_DATA = ("create_dataset.", "make_splits.samples")
"""Prefixes of further settings that must be equal: with other options, a dataset of the same name has other data."""
TABLE_METRICS = "table_"
"""The beginning of metrics that a benchmark table has looked up."""
LABELLED = ("optimizer", "space", "dataset")
"""Settings whose values need no name before them."""
BY_HAND = "architecture changed by hand"
"""The suffix of a group's label if a person changed its architectures by hand."""
NUMBER = re.compile(r"((?:(?<![\w.])-)?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
UNSET = "not set"
"""What stands for the value of a setting that a run does not have. Settings may be "none" or None."""


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
        deviation: The standard deviation, of one degree of freedom less than there are seeds. None for one seed.
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
        low, high = bootstrap(np.asarray(values)[:, None])
        return cls(len(values), statistics.fmean(values), statistics.stdev(values), (float(low[0]), float(high[0])))


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


@dataclass(frozen=True)
class Group:
    """Runs that agree in the settings by which a comparison groups, one for each seed.

    Attributes:
        runs: Rows of `finished_runs.Records.evaluated` by seed: of a seed that ran again, the latest.
    """

    label: str
    runs: Mapping[str, dict[str, Any]]

    def values(self, metric: str) -> dict[str, float]:
        """Return a metric by seed. Runs that lack it, or have no finite number, are left out."""
        found = {seed: run["metrics"].get(metric, math.nan) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Difference:
    """The mean difference of a metric between runs of two groups with equal seeds, the first minus the second.

    Attributes:
        seeds_needed: The number of seeds that a claim needs, or None where it is unknown.
    """

    group: str
    against: str
    metric: str
    estimate: Estimate
    seeds_needed: int | None


@dataclass(frozen=True)
class Table:
    """The groups of runs under equal conditions.

    Attributes:
        title: The conditions in which it differs from other tables of the comparison, or "".
        estimates: The mean of each metric and group.
        differences: The differences to one group.
        notes: Sentences about what the numbers do not show.
    """

    title: str
    groups: Sequence[Group]
    estimates: Mapping[tuple[str, str], Estimate]
    differences: Sequence[Difference]
    notes: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """A comparison of runs, a table for each set of conditions.

    Attributes:
        by: The settings by which runs are grouped.
        metrics: The metrics in the order of the tables.
        notes: Sentences about all tables, and the runs that were left out.
        shown: How metrics are shown that METRICS does not have.
    """

    by: Sequence[str]
    metrics: Sequence[str]
    tables: Sequence[Table]
    notes: Sequence[str]
    shown: Mapping[str, Metric] = field(default_factory=dict)

    def metric(self, name: str) -> Metric:
        """Return how a metric is shown."""
        return self.shown.get(name) or metric_of(name)


def compare(
    root: Path,
    by: Sequence[str] = (),
    metrics: Sequence[str] = (),
    against: str | None = None,
    joined: Sequence[str] = (),
) -> Comparison:
    """Compare the finished runs of a project.

    Args:
        root: The folder of the project.
        by: The settings by which runs are grouped, by their names in params.yaml; all that differ if empty.
        metrics: The metrics to compare; those of METRICS that a run has if empty.
        against: The label of the group that others are compared with; the one with the most seeds if None.
        joined: Settings that may differ within a group.

    Raises:
        TangleNASError: The store does not answer, no run is finished, or a setting, a metric or a group is unknown.
    """
    try:
        found = finished_runs.read(root)
    except Exception as error:  # of the store, its server and its database
        raise TangleNASError(f"the MLflow store {Store.of(root).name} cannot be read ({reason(error)})") from None
    if not (found.evaluated or found.unfinished or (root / "dvc.yaml").exists()):
        raise TangleNASError(
            f"{root} is no project, as it has no dvc.yaml: change into one, or lay one out with `tanglenas init DIR`"
        )
    return compare_rows(found, finished_runs.names_of_params(root), by, metrics, against, joined)


def compare_rows(
    found: finished_runs.Records,
    names: Mapping[str, str],
    by: Sequence[str] = (),
    metrics: Sequence[str] = (),
    against: str | None = None,
    joined: Sequence[str] = (),
) -> Comparison:
    """Compare runs as `compare` does.

    Args:
        found: The runs.
        names: The names in params.yaml of bindings.

    Raises:
        TangleNASError: No run is finished, or a setting, a metric or a group is unknown.
    """
    rows, damaged = _usable(found.evaluated)
    notes = [_listed("left out, because they did not reach the end of evaluate", found.unfinished)] * bool(
        found.unfinished
    )
    notes += damaged
    if not rows:
        raise TangleNASError(
            " ".join(["there is no finished run to compare: run `dvc repro` or `dvc exp run` first.", *notes])
        )
    settings = [_settings(row, names) for row in rows]
    by, joined = (_known("by", by, settings, names), _known("join", joined, settings, names))
    if both := [name for name in joined if name in by]:
        raise TangleNASError(f"--by and --join both have {both[0]}: leave it out of one")
    if equal := _differing(settings, joined):
        notes.insert(0, f"The runs differ in {', '.join(equal)}, which --join takes for equal.")
    metrics = _chosen_metrics(metrics, rows)
    if not any(metric.startswith(TABLE_METRICS) for metric in metrics):
        named = {*by, *joined}
        settings = [
            {name: value for name, value in one.items() if name in named or not name.startswith(OF_TABLE)}
            for one in settings
        ]
    whole = settings
    settings = [{name: value for name, value in one.items() if name not in joined} for one in settings]
    by = by or _fewest(settings, names)
    split: dict[tuple[str, ...], list[int]] = {}
    conditions = [name for name in _differing(settings, _conditions(settings)) if name not in by]
    for number, one in enumerate(settings):
        split.setdefault(_values(one, conditions), []).append(number)
    if len(split) > 1:
        notes.insert(
            0,
            f"The runs differ in {', '.join(conditions)}: there is a table for each, as their numbers are not "
            "comparable. Name one in --by to have them in one table, or in --join to take its values for equal.",
        )
    drafts = {
        _label(conditions, values): _groups(rows, whole, numbers, by, joined)
        for values, numbers in sorted(split.items(), key=lambda part: in_order(*part[0]))
    }
    labels = {group.label for groups, _ in drafts.values() for group in groups}
    if against is not None and against not in labels:
        known = ", ".join(f"'{label}'" for label in sorted(labels, key=in_order))  # labels have commas
        raise TangleNASError(
            f"--against: unknown group '{shown(against, 80)}'.{closest(against, labels)} Choose one of: "
            f"{shown(known, 2000)}"
        )
    if against is not None and len(labels) == 1:
        raise TangleNASError(f"--against {against}: it is the only group. Name what differs with --by, or leave it out")
    tables = [
        table_of(title, groups, [*mixed, *absent(groups, metrics)], metrics, against)
        for title, (groups, mixed) in drafts.items()
    ]
    return Comparison(by, metrics, tables, notes)


def _usable(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows that have a seed and a finite test metric, and sentences about the others."""
    notes = []
    seedless = [row["name"] for row in rows if row["seed"] is None]
    if seedless:
        notes.append(_listed("left out, because their seed is unknown", seedless))
    rows = [row for row in rows if row["seed"] is not None]
    tests = ("test_accuracy", "test_loss", "test_perplexity")
    broken = [row for row in rows if not any(math.isfinite(row["metrics"].get(name, math.nan)) for name in tests)]
    if broken:
        notes.append(_listed("left out, because they have no finite test metric", [row["name"] for row in broken]))
    return [row for row in rows if row not in broken], notes


def _apart(labels: Sequence[str]) -> str:
    """Return labels with commas between them. Those that have commas themselves are quoted."""
    return ", ".join(f"'{label}'" if "," in label else label for label in labels)


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{len(names)} run{'s' * (len(names) != 1)} {what}: {', '.join(names[-MOST_NAMED:])}{more}."


def _settings(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of a run that results depend on, by their names in params.yaml.

    One that is null there is left out.
    """
    known = {names.get(name, name): value for name, value in row["settings"].items() if not name.endswith(IMMATERIAL)}
    known |= {name: row[name] for name in LABELLED if row[name] is not None}
    nullable = set(names.values())
    return {name: value for name, value in known.items() if value and not (value == "None" and name in nullable)}


def _conditions(settings: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the settings that are equal in comparable runs."""
    return [*CONDITIONS, *sorted({name for one in settings for name in one if name.startswith(OF_DATA)})]


def _differing(settings: Sequence[Mapping[str, str]], among: Iterable[str]) -> list[str]:
    return [name for name in among if len({one.get(name) for one in settings}) > 1]


def _values(settings: Mapping[str, str], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(settings.get(name, UNSET) for name in names)


def _known(
    option: str, given: Sequence[str], settings: Sequence[Mapping[str, str]], names: Mapping[str, str]
) -> list[str]:
    """Return the settings that an option of the command names, as params.yaml does.

    Raises:
        TangleNASError: A setting is unknown, or is the seed.
    """
    known = {name for one in settings for name in one} | set(LABELLED)
    chosen = list(dict.fromkeys(names.get(name, name) for name in given))
    for name in chosen:
        if name.lower() == "seed":
            raise TangleNASError(f"--{option} seed: a group is what differs by seed alone. Leave it out")
        if name not in known | set(names.values()):
            raise TangleNASError(
                f"--{option}: no run has a parameter {shown(name, 80)!r}.{closest(name, known)} Take the names of "
                "params.yaml, or those of the runs' parameters in MLflow"
            )
    return chosen


def _fewest(settings: Sequence[Mapping[str, str]], names: Mapping[str, str]) -> list[str]:
    """Return the fewest settings that tell apart all runs that differ, apart from what makes tables of their own."""
    known = {name for one in settings for name in one} | set(LABELLED)
    people = [*LABELLED, *sorted(set(names.values()) - set(LABELLED))]
    others = sorted(known - set(people))
    conditions = _conditions(settings)
    kept = list(_differing(settings, conditions))
    parts = len({_values(one, kept) for one in settings})
    found = []
    for name in _differing(settings, [*people, *others]):
        if name not in conditions and len({_values(one, [*kept, name]) for one in settings}) > parts:
            kept.append(name)
            found.append(name)
            parts = len({_values(one, kept) for one in settings})
    return found


def _chosen_metrics(metrics: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the metrics asked for, or else those of METRICS that a run has.

    Raises:
        TangleNASError: No run has a finite number of a metric.
    """
    known = {name for row in rows for name, value in row["metrics"].items() if math.isfinite(value)}
    if absent := [name for name in metrics if name not in known]:
        raise TangleNASError(
            f"--metric: no run has a finite {shown(absent[0], 80)!r}.{closest(absent[0], known)} "
            f"Choose among {shown(', '.join(sorted(known)), 1000)}"
        )
    return list(dict.fromkeys(metrics)) or [name for name in METRICS if name in known]


def _label(names: Sequence[str], values: Sequence[str]) -> str:
    told = [value if name in LABELLED else f"{name}={value}" for name, value in zip(names, values, strict=True)]
    return ", ".join(told)


def in_order(*texts: str) -> list[list[Any]]:
    """Return the key that sorts texts as a person does, with their numbers by size: 2, 3, 12."""
    return [[float(part) if index % 2 else part for index, part in enumerate(NUMBER.split(text))] for text in texts]


def _groups(
    rows: Sequence[dict[str, Any]],
    settings: Sequence[Mapping[str, str]],
    numbers: Sequence[int],
    by: Sequence[str],
    joined: Sequence[str],
) -> tuple[list[Group], list[str]]:
    """Return the groups of some runs, sorted by label, and a sentence for each that mixes settings.

    Settings that are joined may differ between seeds. Where they differ between runs of one seed, the group mixes them.
    Runs whose architecture was changed by hand have a group of their own: they are no results of their method.
    """
    members: dict[str, list[int]] = {}
    for number in numbers:
        label = _label(by, _values(settings[number], by))
        if rows[number].get("by_hand"):
            label = f"{label}, {BY_HAND}" if label else BY_HAND
        members.setdefault(label or "all runs", []).append(number)
    groups, notes = [], []
    for label, own in sorted(members.items(), key=lambda member: in_order(member[0])):
        groups.append(Group(label, {rows[number]["seed"]: rows[number] for number in own}))
        inside = [settings[number] for number in own]
        seeds = [[settings[n] for n in own if rows[n]["seed"] == seed] for seed in groups[-1].runs]
        names = sorted({name for one in inside for name in one})
        mixed = [
            name
            for name in _differing(inside, names)
            if name not in joined or any(_differing(runs, [name]) for runs in seeds)
        ]
        if mixed:
            more = f" and {len(mixed) - MOST_NAMED} more" if len(mixed) > MOST_NAMED else ""
            notes.append(
                f"{label} mixes runs that differ in {', '.join(mixed[:MOST_NAMED])}{more}, and has the latest of "
                "each seed."
            )
    return groups, notes


def table_of(
    title: str, groups: Sequence[Group], mixed: Sequence[str], metrics: Sequence[str], against: str | None
) -> Table:
    """Return the means of groups of runs under equal conditions, and the differences of all groups to one.

    Args:
        title: The conditions in which the table differs from others, or "".
        groups: The groups.
        mixed: Notes about the groups and what they lack, which come first.
        metrics: The metrics in the order of the table.
        against: The label of the group that others are compared with; None takes the one with the most seeds.
    """
    estimates = {
        (metric, group.label): Estimate.of(list(values.values()))
        for metric in metrics
        for group in groups
        if (values := group.values(metric))
    }
    notes = list(mixed)
    labels = [group.label for group in groups]
    alone = [group.label for group in groups if len(group.runs) == 1]
    if alone:
        notes.append(f"One seed gives no interval, and shows nothing of chance: {_apart(alone)}.")
    if pairs := [group.label for group in groups if len(group.runs) == 2]:
        notes.append(
            "The interval of two seeds is from one value to the other. It has the true mean in half of all cases, and "
            f"is no evidence: {_apart(pairs)}."
        )
    differences: list[Difference] = []
    if len(groups) == 1:
        notes.append(f"{labels[0]} is the only group here, so there is nothing to compare it with.")
    elif against is None or against in labels:
        most = max(groups, key=lambda group: len(group.runs))  # the first of several
        base = next((group for group in groups if group.label == against), most)
        differences, apart = differences_to(groups, base, metrics)
        notes += apart
    else:
        notes.append(f"There is no group {against} here: no differences.")
    return Table(title, groups, estimates, differences, notes)


def absent(groups: Sequence[Group], metrics: Sequence[str]) -> list[str]:
    """Return a sentence for each metric that some runs of the groups lack, or that is not finite in them."""
    notes = []
    for metric in metrics:
        lacking = [
            run["name"] for group in groups for seed, run in group.runs.items() if seed not in group.values(metric)
        ]
        if lacking and len(lacking) < sum(len(group.runs) for group in groups):
            notes.append(_listed(f"without a finite {metric}", lacking))
    return notes


def differences_to(groups: Sequence[Group], base: Group, metrics: Sequence[str]) -> tuple[list[Difference], list[str]]:
    """Return the differences of all groups to one, and a sentence for each that has no seed in common with it."""
    found, notes = [], []
    for group in groups:
        if group is base:
            continue
        if not group.runs.keys() & base.runs.keys():
            notes.append(
                f"{group.label} (seeds {_short(group.runs)}) and {base.label} (seeds {_short(base.runs)}) have no seed "
                "in common, so there is no paired difference. Run the same seeds of both."
            )
        for metric in metrics:
            ours, theirs = group.values(metric), base.values(metric)
            if common := [seed for seed in ours if seed in theirs]:
                estimate = Estimate.of([ours[seed] - theirs[seed] for seed in common])
                needed = None if estimate.deviation is None else seeds_needed(estimate.mean, estimate.deviation)
                found.append(Difference(group.label, base.label, metric, estimate, needed))
    return sorted(found, key=lambda one: metrics.index(one.metric)), notes


def _short(seeds: Iterable[str]) -> str:
    return shown(", ".join(sorted(seeds, key=in_order)), 60)
