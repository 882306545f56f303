"""Comparisons of finished runs: groups over seeds, and paired differences between the groups.

Two groups are compared by the differences of runs with equal seeds, which share splits and initial weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tanglenas_engine.errors import TangleNASError, closest, shown
from tanglenas_engine.pipeline import finished_runs
from tanglenas_engine.pipeline.comparison.estimates import METRICS, Estimate, Metric, metric_of, seeds_needed
from tanglenas_engine.pipeline.comparison.settings import (
    MOST_NAMED,
    TABLE_METRICS,
    Settings,
    all_settings,
    conditions_of,
    differing,
    fewest,
    fingerprints_of,
    in_order,
    known,
    label_of,
    unnamed,
    values_of,
    without_tables,
)
from tanglenas_engine.pipeline.tracking.redaction import reason
from tanglenas_engine.pipeline.tracking.store import Store

BY_HAND = "architecture changed by hand"
"""The suffix of a group's label if a person changed its architectures by hand."""


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
    notes += [*damaged, *[found.origin] * bool(found.origin)]
    if not rows:
        raise TangleNASError(
            " ".join(["there is no finished run to compare: run `dvc repro` or `dvc exp run` first.", *notes])
        )
    if lost := [row["name"] for row in rows if row["search_id"] is None]:
        what = "whose search is out of reach, so that its settings, times and curve are unknown and count as equal"
        notes.append(_listed(what, lost))
    settings: Sequence[Settings] = all_settings(rows, names)
    by, joined = (known("by", by, settings, names), known("join", joined, settings, names))
    if both := [name for name in joined if name in by]:
        raise TangleNASError(f"--by and --join both have {both[0]}: leave it out of one")
    joined += [name for name in fingerprints_of(joined, settings) if name not in [*by, *joined]]
    if equal := differing(settings, joined):
        notes.insert(0, f"The runs differ in {', '.join(equal)}, which --join takes for equal.")
    metrics = _chosen_metrics(metrics, rows)
    if not any(metric.startswith(TABLE_METRICS) for metric in metrics):
        settings = without_tables(settings, {*by, *joined})
    whole = settings
    settings = [{name: value for name, value in one.items() if name not in joined} for one in settings]
    conditions = conditions_of(settings, by)
    by = by or fewest(settings, names, conditions)
    split: dict[tuple[str, ...], list[int]] = {}
    for number, one in enumerate(settings):
        split.setdefault(values_of(one, conditions), []).append(number)
    if len(split) > 1:
        notes.insert(
            0,
            f"The runs differ in {', '.join(conditions)}: there is a table for each, as their numbers are not "
            "comparable. Name one in --by to have them in one table, or in --join to take its values for equal.",
        )
    drafts = {
        label_of(conditions, values): _groups(rows, whole, numbers, by, joined)
        for values, numbers in sorted(split.items(), key=lambda part: in_order(*part[0]))
    }
    labels = {group.label for groups, _ in drafts.values() for group in groups}
    if against is not None and against not in labels:
        listed = ", ".join(f"'{label}'" for label in sorted(labels, key=in_order))  # labels have commas
        raise TangleNASError(
            f"--against: unknown group '{shown(against, 80)}'.{closest(against, labels)} Choose one of: "
            f"{shown(listed, 2000)}"
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
    latest = [*names[-MOST_NAMED:], *names[:-MOST_NAMED]]
    return f"{len(names)} run{'s' * (len(names) != 1)} {what}: {_some(latest)}."


def _some(names: Sequence[str]) -> str:
    """Return the first few of some names, and the number of the others."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


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


def _groups(
    rows: Sequence[dict[str, Any]],
    settings: Sequence[Settings],
    numbers: Sequence[int],
    by: Sequence[str],
    joined: Sequence[str],
) -> tuple[list[Group], list[str]]:
    """Return the groups of some runs, sorted by label, and sentences about settings that their labels do not name.

    Settings that are joined may differ between seeds. Where they differ between runs of one seed, the group mixes them.
    Runs whose architecture was changed by hand have a group of their own: they are no results of their method.
    """
    members: dict[str, list[int]] = {}
    for number in numbers:
        label = label_of(by, values_of(settings[number], by))
        if rows[number].get("by_hand"):
            label = f"{label}, {BY_HAND}" if label else BY_HAND
        members.setdefault(label or "all runs", []).append(number)
    members = dict(sorted(members.items(), key=lambda member: in_order(member[0])))
    groups, notes = [], []
    for label, own in members.items():
        groups.append(Group(label, {rows[number]["seed"]: rows[number] for number in own}))
        inside = [settings[number] for number in own]
        seeds = [[settings[n] for n in own if rows[n]["seed"] == seed] for seed in groups[-1].runs]
        names = sorted({name for one in inside for name in one})
        mixed = [
            name
            for name in differing(inside, names)
            if name not in joined or any(differing(runs, [name]) for runs in seeds)
        ]
        if mixed:
            notes.append(f"{label} mixes runs that differ in {_some(mixed)}, and has the latest of each seed.")
    inside_of = {label: [settings[number] for number in own] for label, own in members.items()}
    if also := unnamed(inside_of, [*by, *joined]):
        notes.append(f"The groups also differ in settings that their labels do not name: {_some(also)}.")
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
