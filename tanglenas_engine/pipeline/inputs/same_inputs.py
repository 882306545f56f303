"""How inputs were made for the weights that a stage takes from an earlier one, and a check that it makes them alike.

Splits serve every resolution and augmentation, so their fingerprint tells nothing of these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from tanglenas_engine.data import Dataset
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.files import SUPERNET, WEIGHTS, inherits, read_json_or_empty
from tanglenas_engine.runtime.progress import Progress
from tanglenas_engine.runtime.weights import weights_metadata

NORMALISED = ("mean", "std", "interpolation", "eval_transform", "in_channels")
"""What a training that goes on from weights must keep. It may have larger images, as in progressive resizing."""
TOLD = ("mean", "eval_transform")
"""What says how inputs are normalised: one or the other. A dataset may leave out further options."""
SHAPED = ("crop_pct", "image_size")
"""What counts, too, for weights that are taken as they are. Evaluate may have other sizes on purpose, and says so."""
ALIKE = 1e-4
"""The difference up to which numbers are equal. A mean of images has other last digits on another machine."""


def input_options(dataset: Dataset) -> dict[str, Any]:
    """Return how a dataset makes inputs of images, by the names of its options and as JSON has it; {} for other data.

    What a dataset does not say is left out. A transform of one's own is described by `eval_transform`, without a mean.
    """
    described: dict[str, Any] = json.loads(json.dumps(dataset.input_config(), default=str))
    return _options(described)


def inputs_metadata(dataset: Dataset) -> dict[str, str]:
    """Return what the metadata of weights have of the inputs of a dataset; {} for data that are no images."""
    options = input_options(dataset)
    return {"inputs": json.dumps(options)} if options else {}


def check_same_inputs(stage: str, dataset: Dataset, inputs: Sequence[Path], progress: Progress) -> None:
    """Refuse inputs of a stage that are made otherwise than those on which its weights were trained.

    Weights whose files say nothing of their inputs are taken, as earlier versions wrote such supernets.

    Args:
        stage: The name of the stage.
        dataset: Its dataset.
        inputs: The files of earlier stages that it starts from.
        progress: Gets a note where evaluate has other sizes.

    Raises:
        TangleNASError: The mean, the standard deviation, the interpolation or the channels differ, or, for weights that
            discretize or a retrain with mode "inherit" takes as they are, the crop or the size of the image.
    """
    if WEIGHTS in inputs:
        config = read_json_or_empty(WEIGHTS.with_name("config.json"))
        described = {**config, **_mapping(config.get("pretrained_cfg"))}  # timm's form has few of the names inside
        compare(stage, dataset, _options(described), f"the network in {WEIGHTS.parent}", progress)
    elif SUPERNET in inputs and (stage != "retrain" or inherits()):
        try:
            made = json.loads(weights_metadata(SUPERNET).get("inputs", "{}"))
        except ValueError:
            made = {}
        compare(stage, dataset, made, f"the supernet in {SUPERNET}", progress)


def compare(stage: str, dataset: Dataset, made: Mapping[str, Any], weights: str, progress: Progress) -> None:
    """Refuse inputs of a stage that differ from those on which weights were trained; see `check_same_inputs`.

    Args:
        stage: The name of the stage, by whose config gin is configured.
        dataset: Its dataset.
        made: The `input_options` of the training.
        weights: The weights, in the words of the error.
        progress: Gets a note where evaluate has other sizes.
    """
    further = stage == "retrain" and gin.get_bindings("retrain").get("mode", "scratch") != "inherit"
    here, there = input_options(dataset), _mapping(made)
    known = here.keys() & there.keys()
    if _told(here) and _told(there):  # one side may have a transform of its own, and the other one none
        known |= (here.keys() | there.keys()) & set(TOLD)
    names = [it for it in (*NORMALISED, *(() if further else SHAPED)) if it in known]
    other = [it for it in names if not _alike(here.get(it), there.get(it))]
    if not other:
        return
    trained, found = (
        " and ".join(f"{it} {_text(options[it])}" for it in other if it in options) or f"no {' and no '.join(other)}"
        for options in (there, here)
    )
    told = f"{weights} was trained on inputs with {trained}, and {stage} has {found}"
    if stage == "evaluate" and not {*other} & {*NORMALISED}:
        progress.note(told)
        return
    raise TangleNASError(
        f"{told}: make them alike, by options in gin/datasets/{dataset.name}.gin, which all stages read, and in no "
        "file of one stage alone"
    )


def _told(options: Mapping[str, Any]) -> bool:
    """Return whether options say how inputs are normalised. Earlier versions left out a transform of one's own."""
    return any(name in options for name in TOLD)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a dataset that an `input_config` says."""
    options = {name: config[name] for name in (*NORMALISED, "crop_pct") if name in config}
    size = config.get("input_size")
    if isinstance(size, Sequence) and len(size) == 3:
        options |= {"in_channels": size[0], "image_size": size[1] if size[1] == size[2] else list(size[1:])}
    return options


def _alike(one: Any, other: Any) -> bool:
    """Return whether two values of an option are equal, numbers up to `ALIKE`."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=ALIKE, abs_tol=ALIKE)
    return bool(one == other)


def _text(value: object) -> str:
    """Return an option for a person: one number where all channels have the same."""
    if isinstance(value, list) and value and all(it == value[0] for it in value):
        value = value[0]
    return str(value)
