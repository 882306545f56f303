"""The anytime curves of a comparison: what the searches of each group would have given, by processor time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tanglenas_engine.pipeline import finished_runs
from tanglenas_engine.pipeline.comparison.estimates import bootstrap
from tanglenas_engine.pipeline.comparison.groups import Comparison, Group, Table
from tanglenas_engine.pipeline.comparison.settings import plain
from tanglenas_engine.pipeline.config.reader import OF_TABLE
from tanglenas_engine.pipeline.tracking.tracker import TABLE

VALUES = {
    "table_value": "table value",
    "validation_accuracy": "validation accuracy (%)",
    "validation_loss": "validation loss (nats)",
}
"""The values of a search by epoch that a curve can show, and the labels of their axes."""
TIME = "processor_seconds"
POINTS = 200
"""The number of moments at which the curves of seeds are averaged."""
RESAMPLES = 999
"""The resamples of a band. A line on a figure needs fewer than a number in a table."""

Vector = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Curve:
    """The mean of a group's searches over seeds, from the moment on at which all of them had a value.

    A search that has ended keeps its last value.

    Attributes:
        label: The group.
        seconds: The processor time, of shape `(points,)`.
        mean: The mean over seeds, of shape `(points,)`.
        band: The ends of its interval, two of shape `(points,)`, or None for one seed.
        derived: True if the value is that of the current architecture. A method that draws architectures has none
            before discretize, and its value is that of one fixed network.
        spread: True if a search logged no time by epoch: its total is spread over the epochs evenly.
        seeds: The seeds that it is of, such as "2 of 3 seeds", where some left no record, else "".
    """

    label: str
    seconds: Vector
    mean: Vector
    band: tuple[Vector, Vector] | None
    derived: bool
    spread: bool
    seeds: str = ""


@dataclass(frozen=True)
class Curves:
    """The curves of one table.

    Attributes:
        value: The key in VALUES of what they show.
    """

    value: str
    curves: Sequence[Curve]


def read_curves(root: Path, comparison: Comparison) -> list[Curves]:
    """Return the curves of each table of a comparison. A group without a record of its searches has none.

    Raises:
        Exception: The store does not answer.
    """
    runs = [run for table in comparison.tables for group in table.groups for run in group.runs.values()]
    searches = list(dict.fromkeys(run["search_id"] for run in runs if run["search_id"]))
    names = [f"search/{name}" for name in (*VALUES, TIME, "entropy")]
    found = finished_runs.histories(root, searches, names)
    return [_curves(table, found) for table in comparison.tables]


def _curves(table: Table, found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Curves:
    runs = [run for group in table.groups for run in group.runs.values()]
    if _one_table(runs) and all(found.get(run["search_id"], {}).get("search/table_value") for run in runs):
        value = "table_value"
    else:
        value = "validation_loss" if any("test_perplexity" in run["metrics"] for run in runs) else "validation_accuracy"
    curves = [curve for group in table.groups if (curve := _curve(group, value, found))]
    return Curves(value, curves)


def _one_table(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether searches have one table and metric. Those of earlier versions have no fingerprint of the table."""
    tables = [
        {
            plain(name): text
            for name, text in run["settings"].items()
            if name.startswith(OF_TABLE) and name.removeprefix(plain(name)) in ("", " (search)")
        }
        for run in runs
    ]
    contents = {one.pop(TABLE) for one in tables if TABLE in one}
    return len(contents) <= 1 and all(one == tables[0] for one in tables)


def _curve(group: Group, value: str, found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Curve | None:
    """Return the curve of a group, or None where its searches left no records."""
    paths, derived, spread = [], True, False
    for run in group.runs.values():
        history = found.get(run["search_id"], {})
        values, clock = history.get(f"search/{value}", {}), history.get(f"search/{TIME}", {})
        if not values:
            continue
        last, total = max(values), run["metrics"].get(f"search_{TIME}")
        if not set(values) <= set(clock):
            if total is None or not math.isfinite(total):
                continue
            clock, spread = {epoch: total * epoch / last for epoch in values}, True
        epochs = sorted(values)
        paths.append((np.array([clock[epoch] for epoch in epochs]), np.array([values[epoch] for epoch in epochs])))
        derived = derived and bool(history.get("search/entropy"))
    if not paths:
        return None
    first, end = max(times[0] for times, _ in paths), max(times[-1] for times, _ in paths)
    seconds = np.linspace(first, end, POINTS)
    # At each moment a search has the value of its last finished epoch.
    each = np.stack([values[np.searchsorted(times, seconds, side="right") - 1] for times, values in paths])
    band = bootstrap(each, RESAMPLES) if len(each) > 1 else None
    seeds = f"{len(paths)} of {len(group.runs)} seeds" if len(paths) < len(group.runs) else ""
    return Curve(group.label, seconds, each.mean(0), band, derived, spread, seeds)
