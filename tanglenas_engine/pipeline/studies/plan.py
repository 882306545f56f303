"""The settings of a study at a scale: the content of its params.yaml."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tanglenas_engine.errors import TangleNASError, closest, positive, unknown
from tanglenas_engine.pipeline.studies import load
from tanglenas_engine.pipeline.studies.run_folder import GROUPS
from tanglenas_engine.pipeline.studies.study import BUDGET, SCALES, Arm, Scale, Study

PAPER = {
    "toy_cell": "paper/toy_cell", "toy_conv_macro": "paper/toy_conv_macro", "nb201": "paper/nb201",
    "darts": "paper/darts", "autoformer_t": "paper/autoformer", "autoformer_s": "paper/autoformer",
    "autoformer_b": "paper/autoformer", "mobilenetv3": "paper/mobilenetv3", "gpt": "paper/gpt_tinystories",
}  # fmt: skip
"""The recipes of the paper by space."""
PAPER_DATASETS = {
    "toy_cell": "fashion_mnist", "toy_conv_macro": "cifar10", "nb201": "cifar10", "darts": "cifar10",
    "mobilenetv3": "imagenet", "gpt": "text",
}  # fmt: skip
"""The dataset of the paper by space; the others have CIFAR-10."""
PAPER_EPOCHS = {
    "toy_cell": {"darts": 50, "drnas": 100, "gdas": 250, "spos": 250},
    "toy_conv_macro": {"darts": 50, "drnas": 100, "gdas": 250, "spos": 250},
    "nb201": {"darts": 50, "drnas": 100, "gdas": 250, "spos": 250},
    "darts": {"darts": 50, "drnas": 50, "gdas": 250, "spos": 250},
}
"""The epochs of a search that the paper gives a method on a space."""

OPTIONS = ("space", "dataset", "seeds", "arms", "scale", "seconds", "table", "metric")
"""Values of params.yaml that the command has options for."""


@dataclass(frozen=True)
class Plan:
    """A study with its settings.

    Attributes:
        name: The name of the study.
        params: The content of params.yaml.
        notes: Sentences for the person who gave the settings.
    """

    name: str
    params: Mapping[str, Any]
    notes: Sequence[str] = ()

    @property
    def study(self) -> Study:
        return load(self.name)


def plan(
    name: str,
    template: Mapping[str, Any],
    *,
    command: str,
    scale: str = "cpu",
    space: str | None = None,
    dataset: str | None = None,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    seconds: float | None = None,
    table: str | None = None,
    metric: str | None = None,
    changes: Mapping[str, Any] | None = None,
    bindings: Sequence[str] = (),
) -> Plan:
    """Return the settings of a study at a scale.

    Args:
        name: The name of the study.
        template: The values of the params.yaml that the package ships.
        command: The command that a person typed.
        scale: One of SCALES.
        space, dataset: Names of plugins; None takes those of the scale.
        seeds: The seeds; None takes those of the scale.
        arms: Names of arms; None takes all. One whose supernet another arm trains brings that arm.
        seconds: The time that the longest search takes with its derivation; None takes that of the scale.
        table: A file with networks of known worth, below the folder of the study.
        metric: The metric of the table. None takes the test accuracy, and the test loss of a pool, which is finer.
        changes: Values by their names in the study's params.yaml, such as `search.epochs`.
        bindings: gin bindings for all runs.

    Raises:
        TangleNASError: A name is unknown, the scale does not fit the space, a seed is there twice, or the study has no
            searches that end by time.
    """
    study = load(name)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    sizes = _timed(name, study.scales[scale], scale, seconds)
    params: dict[str, Any] = {
        "study": name, "command": command, "scale": scale,
        "space": space or sizes.params.get("space") or ("toy_cell" if scale == "paper" else template["space"]),
        "dataset": "", "recipe": "cpu",
    }  # fmt: skip
    params["dataset"] = dataset or sizes.params.get("dataset") or template["dataset"]
    if scale == "paper":
        if params["space"] not in PAPER:
            raise TangleNASError(
                f"--scale paper has no recipe for the space {params['space']!r}. The paper's spaces are "
                f"{', '.join(PAPER)}; for another one, use --scale cpu and change its sizes in params.yaml"
            )
        params["recipe"] = PAPER[params["space"]]
        params["dataset"] = dataset or PAPER_DATASETS.get(params["space"], "cifar10")
    params["seeds"] = _seeds(seeds if seeds is not None else sizes.seeds)
    if metric is not None and not table and study.table != "pool":
        raise TangleNASError(
            f"--metric {metric} is a column of a table, but {name} has none here: it trains what it finds. Give the "
            "table with --table, or leave --metric out"
        )
    known = "test_loss" if study.table == "pool" and not table else "test_acc"
    params |= {"table": table, "metric": metric or known, "bindings": [*sizes.bindings, *bindings]}
    for group in GROUPS:
        params[group] = {**template[group], **sizes.params.get(group, {})}
    params["measure"] = dict(sizes.params.get("measure", {}))
    chosen, given = _chosen(study, arms, sizes.without), dict(changes or {})
    params["arms"] = {}
    for key in [key for key in given if key.startswith("measure.")]:  # arms may depend on them
        _change(study, params, key, given.pop(key))
    paper = PAPER_EPOCHS.get(params["space"], {}) if scale == "paper" and "search.epochs" not in (changes or {}) else {}
    params["arms"] = {arm: _arm(arm, study.arms[arm], sizes, params, paper) for arm in chosen}
    notes = [_change(study, params, key, value) for key, value in given.items()]
    if banded := [arm for arm in chosen if BUDGET in study.arms[arm].params.get("search", {}).values()]:
        if params["measure"].get("budget") is None:
            notes.append(f"{BUDGET} is none, so {', '.join(banded)} has no band and draws from the whole space")
    return Plan(name, params, [note for note in notes if note])


def _timed(name: str, sizes: Scale, scale: str, seconds: float | None) -> Scale:
    """Return the sizes of a scale with the seconds of each arm.

    Raises:
        TangleNASError: Seconds are given, but searches count epochs here.
    """
    if sizes.timed is None or sizes.seconds is None:
        if seconds is not None:
            raise TangleNASError(
                f"--seconds {seconds:g}: searches of {name} count epochs at --scale {scale}. Give -S search.epochs=N"
            )
        return sizes
    timed = sizes.timed(sizes.seconds if seconds is None else positive("--seconds", seconds))
    return replace(sizes, arms={**sizes.arms, **timed})


def _chosen(study: Study, arms: Sequence[str] | None, without: Sequence[str]) -> list[str]:
    """Return the names of the arms that were asked for, in the order of the study, and of those that they need.

    Raises:
        TangleNASError: There is no such arm.
    """
    if arms is None:
        return [arm for arm in study.arms if arm not in without]
    for arm in arms:
        if arm not in study.arms:
            raise unknown("arm of the study", arm, study.arms)
    wanted = {*arms}
    for _ in study.arms:
        wanted |= {
            needed
            for own in (study.arms[arm] for arm in wanted)
            for needed in (own.supernet, own.as_long_as, own.beside)
            if needed
        }
    return [arm for arm in study.arms if arm in wanted]


def _seeds(seeds: Sequence[int]) -> list[int]:
    if not seeds:
        raise TangleNASError("--seeds is empty, expected numbers such as 0,1,2")
    if len(set(seeds)) < len(seeds):
        raise TangleNASError(f"--seeds has a number twice: {', '.join(map(str, seeds))}")
    if bad := [seed for seed in seeds if not 0 <= seed < 2**63]:
        raise TangleNASError(f"--seeds has {bad[0]}, expected whole numbers from 0 to 2**63 - 1")
    return list(seeds)


def _arm(name: str, arm: Arm, sizes: Scale, params: Mapping[str, Any], paper: Mapping[str, int]) -> dict[str, Any]:
    """Return the values of an arm: all groups, though they may be empty, as DVC tracks each by itself.

    Args:
        paper: The epochs that the paper gives a method, which `pc_` methods share.
    """
    own: dict[str, Any] = {"optimizer": "drnas", **copy.deepcopy(dict(arm.params))}
    for group in GROUPS:
        own[group] = dict(own.get(group, {}))
    own["search"] = {k: params["measure"]["budget"] if v == BUDGET else v for k, v in own["search"].items()}
    for group, values in sizes.arms.get(name, {}).items():
        own[group] = {**own[group], **values} if isinstance(values, Mapping) else values
    epochs = paper.get(own["optimizer"].removeprefix("pc_"))
    seconds = arm.as_long_as or {**params["search"], **own["search"]}.get("seconds")
    if epochs is not None and not (seconds or arm.supernet):
        own["search"] = {"epochs": epochs, **own["search"]}
    own |= {name: other for name in ("as_long_as", "beside") if (other := getattr(arm, name))}
    own["bindings"] = [*arm.bindings, *sizes.arms.get(name, {}).get("bindings", ())]
    return own


def _change(study: Study, params: dict[str, Any], key: str, value: Any) -> str:
    """Change a value by its dotted name. Return a sentence about arms that keep their own, or "".

    Raises:
        TangleNASError: There is no such value, or it would have no effect.
    """
    places: dict[str, tuple[dict[str, Any], set[str]]] = {  # what can be changed, and the names in it
        group: (params[group], {*params[group]}) for group in (*GROUPS, "measure")
    }
    for arm, own in params["arms"].items():
        places[f"arms.{arm}"] = own, {"optimizer", "bindings"}
        places |= {f"arms.{arm}.{group}": (own[group], {*params[group], *own[group]}) for group in GROUPS}
    place, _, name = key.rpartition(".")
    values, names = places.get(place, ({}, set()))
    if name not in names:
        known = [f"{outer}.{inner}" for outer, (_, several) in places.items() for inner in several]
        advice = f"--{key} gives it." if key in OPTIONS else f"{closest(key, known).strip()} Look at its params.yaml"
        raise TangleNASError(f"-S {key}: a study has no such value to change. {advice.strip()}")
    if place.startswith("arms."):
        _check_effect(study, place.split(".")[1], key, place.split(".")[2:] or [name])
    values[name] = value
    apart = {arm: own[place][name] for arm, own in params["arms"].items() if name in own.get(place, {})}
    told = ", ".join(f"{arm} ({one})" for arm, one in apart.items())
    first = next(iter(apart), "")
    return f"{key} is not for {told}, which have their own. -S arms.{first}.{key}=VALUE changes it." if apart else ""


def _check_effect(study: Study, arm: str, key: str, group: Sequence[str]) -> None:
    """Check that an arm searches, where a setting of its search is given, and for as long as that says.

    Raises:
        TangleNASError: The setting would have no effect.
    """
    own = study.arms[arm]
    if own.supernet and group[0] in ("search", "optimizer"):
        raise TangleNASError(
            f"-S {key}: {arm} takes the supernet of {own.supernet}, so it has no search of its own. Change "
            f"arms.{own.supernet}.{key.removeprefix(f'arms.{arm}.')}"
        )
    if own.as_long_as and key.endswith((".search.epochs", ".search.seconds")):
        raise TangleNASError(
            f"-S {key}: {arm} searches for as long as {own.as_long_as} took. Change the time of that arm"
        )
