"""The settings of runs: which make groups, and which must be equal in runs that are compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tanglenas_engine.errors import TangleNASError, closest, shown
from tanglenas_engine.pipeline.config.reader import IMMATERIAL, OF_TABLE
from tanglenas_engine.pipeline.tracking.tracker import DATA, OBJECTIVES, TABLE, WEIGHTS

MOST_NAMED = 3
"""The most settings or runs that a note names."""

CONDITIONS = (
    "space", "dataset", "search.epochs", "search.seconds", "search.clock", "retrain.epochs", "search.objective",
    "search.target", "search.target_share", "search.targets", "discretize.max_params", "discretize.max_macs",
    "discretize.max_flops", "discretize.limits", "target.objective", "target.value", "target.share",
)  # fmt: skip
"""The settings without which runs are not comparable: what is searched, on which data, and within which budgets.

One that is bound in a scope, such as `size/target.share`, is a condition, too."""
OPTIONS = ("create_dataset.", "make_splits.samples", "make_splits.test_portion", "create_objective.")
"""Prefixes of further conditions: with other options, a dataset of one name has other data, and an objective counts
another cost."""
TABLE_METRICS = ("table_", "pool_", "kendall_tau", "spearman", "ranked_architectures")
"""The beginnings of metrics that depend on a benchmark table or a pool."""
FINGERPRINTS = {
    DATA: re.compile(r"dataset|create_dataset\..+"),
    TABLE: re.compile(rf"{re.escape(OF_TABLE)}path"),
    OBJECTIVES: re.compile(r"(.+/)?create_objective\.(?!fingerprint).+"),
    WEIGHTS: re.compile(r"search\.weights"),
}
"""Settings that are the fingerprint of a content, and the names of those that name it. Runs of earlier versions have no
fingerprint."""
LABELLED = ("optimizer", "space", "dataset")
"""Settings whose values need no name before them."""
NUMBER = re.compile(r"((?:(?<![\w.])-)?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
UNSET = "not set"
"""What stands for the value of a setting that a run does not have. Settings may be "none" or None."""

Settings = Mapping[str, str]


def all_settings(rows: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[Settings]:
    """Return the settings of runs that results depend on, by their names in params.yaml.

    One that is null there, or in a scope, is left out. A run without the fingerprint of a content has that of the
    others which name the content in the same way, if there is one alone.
    """
    nullable = {*names, *names.values()}
    found = []
    for row in rows:
        given = {
            _named(name, names): text for name, text in row["settings"].items() if not plain(name).endswith(IMMATERIAL)
        }
        given |= {name: row[name] for name in LABELLED if row[name] is not None}
        found.append(
            {n: text for n, text in given.items() if text and not (text == "None" and unscoped(n) in nullable)}
        )
    for fingerprint in sorted({name for one in found for name in one if plain(name) in FINGERPRINTS}):
        contents = [tuple((name, one[name]) for name in _content_of(fingerprint, one)) for one in found]
        seen: dict[Any, set[str]] = {}
        for one, content in zip(found, contents, strict=True):
            if fingerprint in one:
                seen.setdefault(content, set()).add(one[fingerprint])
        for one, content in zip(found, contents, strict=True):
            if fingerprint not in one and len(only := seen.get(content, set())) == 1:
                one[fingerprint] = next(iter(only))
    return list(found)


def _named(name: str, names: Mapping[str, str]) -> str:
    """Return the name of a setting in params.yaml, with the stage behind it if it has one."""
    bare = plain(name)
    return names.get(bare, bare) + name.removeprefix(bare)


def plain(name: str) -> str:
    """Return the name of a setting without the stage that `finished_runs` puts behind it where stages disagree."""
    return name.partition(" (")[0]


def unscoped(name: str) -> str:
    """Return the plain name of a setting without the scope that it is bound in."""
    return plain(name).rpartition("/")[2]


def _content_of(fingerprint: str, names: Iterable[str]) -> list[str]:
    """Return those settings that name the content of a fingerprint. That of one stage is named by the stage's own."""
    bare = plain(fingerprint)
    stages = {"", fingerprint.removeprefix(bare)}
    return sorted(
        name
        for name in names
        if FINGERPRINTS[bare].fullmatch(plain(name)) and (len(stages) == 1 or name.removeprefix(plain(name)) in stages)
    )


def fingerprints_of(named: Sequence[str], settings: Sequence[Settings]) -> list[str]:
    """Return the fingerprints of the contents that some settings name."""
    there = {name for one in settings for name in one if plain(name) in FINGERPRINTS}
    return sorted(name for name in there if _content_of(name, named))


def conditions_of(settings: Sequence[Settings], named: Sequence[str] = ()) -> list[str]:
    """Return the settings that differ and must be equal in comparable runs.

    The fingerprints of the data and of the objectives are among them where the others do not tell these apart.

    Args:
        settings: The settings of each run.
        named: The settings that a person took for groups. They are no conditions, nor are their fingerprints.
    """
    lifted = {*named, *fingerprints_of(named, settings)}
    there = {name for one in settings for name in one}
    bound = {name for name in there - set(CONDITIONS) if _is_condition(unscoped(name))}
    among = [*CONDITIONS, *sorted(bound)]
    found = [name for name in differing(settings, among) if name not in lifted]
    for name in sorted(there - lifted):
        if plain(name) in (DATA, OBJECTIVES) and _splits(settings, found, name):
            found.append(name)
    return found


def _is_condition(name: str) -> bool:
    """Return whether a setting without its scope must be equal in comparable runs. Fingerprints are looked at apart."""
    return name in CONDITIONS or (name.startswith(OPTIONS) and name not in FINGERPRINTS)


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

    The name of one that stages bind differently stands for it in each of them.

    Raises:
        TangleNASError: A setting is unknown, or is the seed.
    """
    there = {name for one in settings for name in one} | set(LABELLED)
    chosen: list[str] = []
    for name in (_named(name, names) for name in given):
        if name.lower() == "seed":
            raise TangleNASError(f"--{option} seed: a group is what differs by seed alone. Leave it out")
        stages = [] if name in there else sorted(one for one in there if plain(one) == name)
        if not stages and name not in there | set(names.values()):
            raise TangleNASError(
                f"--{option}: no run has a parameter {shown(name, 80)!r}.{closest(name, there)} Take the names of "
                "params.yaml, or those of the runs' parameters in MLflow"
            )
        chosen += stages or [name]
    return list(dict.fromkeys(chosen))


def fewest(settings: Sequence[Settings], names: Mapping[str, str], conditions: Sequence[str]) -> list[str]:
    """Return the fewest settings that tell apart all runs that differ, beside those that make tables of their own."""
    there = {name for one in settings for name in one} | set(LABELLED)
    people = [*LABELLED, *sorted(set(names.values()) - set(LABELLED))]
    others = sorted(there - set(people), key=lambda name: (plain(name) in FINGERPRINTS, name))
    found: list[str] = []
    for name in differing(settings, [*people, *others]):
        if _splits(settings, [*conditions, *found], name):
            found.append(name)
    return found


def _splits(settings: Sequence[Settings], kept: Sequence[str], name: str) -> bool:
    """Return whether a setting tells runs apart that others do not."""
    parts = {values_of(one, kept) for one in settings}
    return len({values_of(one, [*kept, name]) for one in settings}) > len(parts)


def unnamed(groups: Mapping[str, Sequence[Settings]], named: Sequence[str]) -> list[str]:
    """Return the settings that differ between groups without being named, with the values that they have there.

    Each is equal in the runs of a group. A group that lacks one does not count: other methods have other settings. A
    fingerprint says nothing more where the settings that name its content differ, too.
    """
    settings = [one for runs in groups.values() for one in runs]
    there, found = sorted({name for one in settings for name in one}), []
    for name in there:
        if name in named:
            continue
        if plain(name) in FINGERPRINTS and not _splits(settings, _content_of(name, there), name):
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
