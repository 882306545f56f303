"""The settings of runs: which make groups, and which must be equal in runs that are compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tanglenas_engine.errors import TangleNASError, closest, shown
from tanglenas_engine.pipeline.config.reader import IMMATERIAL, OF_TABLE
from tanglenas_engine.pipeline.tracking.tracker import DATA, TABLE

MOST_NAMED = 3
"""The most settings or runs that a note names."""

CONDITIONS = (
    "space", "dataset", "search.epochs", "search.seconds", "search.clock", "retrain.epochs", "search.objective",
    "search.target", "search.target_share", "discretize.max_params", "discretize.max_macs", "discretize.max_flops",
    "discretize.limits",
)  # fmt: skip
"""The settings without which runs are not comparable: what is searched, on which data, and within which budgets."""
OF_DATA = ("create_dataset.", "make_splits.samples", "make_splits.test_portion")
"""Prefixes of further settings that must be equal: with other options, a dataset of the same name has other data."""
TABLE_METRICS = ("table_", "pool_", "kendall_tau", "spearman", "ranked_architectures")
"""The beginnings of metrics that depend on a benchmark table or a pool."""
FINGERPRINTS = {DATA: "dataset", TABLE: f"{OF_TABLE}path"}
"""Settings that are the fingerprint of a content, and those that name it. Runs of earlier versions have none."""
LABELLED = ("optimizer", "space", "dataset")
"""Settings whose values need no name before them."""
NUMBER = re.compile(r"((?:(?<![\w.])-)?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
UNSET = "not set"
"""What stands for the value of a setting that a run does not have. Settings may be "none" or None."""

Settings = Mapping[str, str]


def all_settings(rows: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[Settings]:
    """Return the settings of runs that results depend on, by their names in params.yaml.

    One that is null there is left out. A run without the fingerprint of a content has that of the others, if there is
    one alone.
    """
    nullable = set(names.values())
    found = []
    for row in rows:
        given = {
            _named(name, names): text for name, text in row["settings"].items() if not plain(name).endswith(IMMATERIAL)
        }
        given |= {name: row[name] for name in LABELLED if row[name] is not None}
        found.append({n: text for n, text in given.items() if text and not (text == "None" and plain(n) in nullable)})
    for fingerprint, content in FINGERPRINTS.items():
        seen: dict[str, set[str]] = {}
        for one in found:
            if content in one and fingerprint in one:
                seen.setdefault(one[content], set()).add(one[fingerprint])
        for one in found:
            if fingerprint not in one and len(only := seen.get(one.get(content, ""), set())) == 1:
                one[fingerprint] = next(iter(only))
    return list(found)


def _named(name: str, names: Mapping[str, str]) -> str:
    """Return the name of a setting in params.yaml, with the stage behind it if it has one."""
    bare = plain(name)
    return names.get(bare, bare) + name.removeprefix(bare)


def plain(name: str) -> str:
    """Return the name of a setting without the stage that `finished_runs` puts behind it where stages disagree."""
    return name.partition(" (")[0]


def conditions_of(settings: Sequence[Settings], by: Sequence[str] = ()) -> list[str]:
    """Return the settings that differ and must be equal in comparable runs, but for those in `by`.

    The fingerprint of the data is one of them only where no other setting tells the data apart.
    """
    prefixed = {name for one in settings for name in one if name.startswith(OF_DATA) or plain(name) in CONDITIONS}
    among = [*CONDITIONS, *sorted(prefixed - set(CONDITIONS))]
    found = [name for name in differing(settings, among) if name not in by]
    if DATA not in by and _splits(settings, [*found, *by], DATA):
        found.append(DATA)
    return found


def differing(settings: Sequence[Settings], among: Iterable[str]) -> list[str]:
    """Return the names of settings that are not equal in all runs."""
    return [name for name in among if len({one.get(name) for one in settings}) > 1]


def values_of(settings: Settings, names: Sequence[str]) -> tuple[str, ...]:
    """Return the values of settings, in the order of their names."""
    return tuple(settings.get(name, UNSET) for name in names)


def without_tables(settings: Sequence[Settings], named: Iterable[str]) -> list[Settings]:
    """Return settings without the options of a benchmark table, but for those that a person named."""
    return [
        {name: text for name, text in one.items() if name in named or not name.startswith(OF_TABLE)} for one in settings
    ]


def known(option: str, given: Sequence[str], settings: Sequence[Settings], names: Mapping[str, str]) -> list[str]:
    """Return the settings that an option of the command names, as params.yaml does.

    Raises:
        TangleNASError: A setting is unknown, or is the seed.
    """
    there = {name for one in settings for name in one} | set(LABELLED)
    chosen = list(dict.fromkeys(names.get(name, name) for name in given))
    for name in chosen:
        if name.lower() == "seed":
            raise TangleNASError(f"--{option} seed: a group is what differs by seed alone. Leave it out")
        if name not in there | set(names.values()):
            raise TangleNASError(
                f"--{option}: no run has a parameter {shown(name, 80)!r}.{closest(name, there)} Take the names of "
                "params.yaml, or those of the runs' parameters in MLflow"
            )
    return chosen


def fewest(settings: Sequence[Settings], names: Mapping[str, str]) -> list[str]:
    """Return the fewest settings that tell apart all runs that differ, apart from what makes tables of their own."""
    there = {name for one in settings for name in one} | set(LABELLED)
    people = [*LABELLED, *sorted(set(names.values()) - set(LABELLED))]
    others = sorted(there - set(people), key=lambda name: (name in FINGERPRINTS, name))
    kept = conditions_of(settings)
    found: list[str] = []
    for name in differing(settings, [*people, *others]):
        if name not in kept and name != DATA and _splits(settings, [*kept, *found], name):
            found.append(name)
    return found


def _splits(settings: Sequence[Settings], kept: Sequence[str], name: str) -> bool:
    """Return whether a setting tells runs apart that others do not."""
    parts = {values_of(one, kept) for one in settings}
    return len({values_of(one, [*kept, name]) for one in settings}) > len(parts)


def unnamed(groups: Mapping[str, Sequence[Settings]], named: Sequence[str]) -> list[str]:
    """Return the settings that differ between groups without being named, with the values that they have there.

    Each is equal in the runs of a group. A group that lacks one does not count: other methods have other settings.
    """
    found = []
    for name in sorted({name for runs in groups.values() for one in runs for name in one}):
        if name in named or name in FINGERPRINTS:
            continue
        where: dict[str, str] = {}
        for label, runs in groups.items():
            texts = {one.get(name) for one in runs}
            if len(texts) == 1 and (text := texts.pop()) is not None:
                where.setdefault(text, label)
        if len(where) > 1:
            told = [f"{text} in {label}" for text, label in list(where.items())[:MOST_NAMED]]
            found.append(f"{name} ({', '.join(told)}{', ...' * (len(where) > MOST_NAMED)})")
    return found


def label_of(names: Sequence[str], values: Sequence[str]) -> str:
    """Return the label of the runs that have these values."""
    told = [value if name in LABELLED else f"{name}={value}" for name, value in zip(names, values, strict=True)]
    return ", ".join(told)


def in_order(*texts: str) -> list[list[Any]]:
    """Return the key that sorts texts as a person does, with their numbers by size: 2, 3, 12."""
    return [[float(part) if index % 2 else part for index, part in enumerate(NUMBER.split(text))] for text in texts]
