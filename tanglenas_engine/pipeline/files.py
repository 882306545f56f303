"""The files that the stages leave for each other: where they lie, and how they are read."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gin
from torch import Tensor, nn

from tanglenas_engine.data import Splits
from tanglenas_engine.errors import TangleNASError, positive
from tanglenas_engine.runtime import strict_json, weights
from tanglenas_engine.spaces.cells import CellSpace
from tanglenas_engine.spaces.space import SearchSpace

if TYPE_CHECKING:
    from tanglenas_engine.superposition.mixture import Mixture

STAGES = ("search", "discretize", "retrain", "evaluate")
OUT = Path("out")
METRICS = Path("metrics")
SUPERNET = OUT / "search" / "supernet.safetensors"
MIXTURE = OUT / "search" / "mixture.safetensors"
SPLITS = OUT / "search" / "splits.json"
ARCHITECTURE = OUT / "discretize" / "architecture.json"
FRONT = OUT / "discretize" / "pareto"
WEIGHTS = OUT / "retrain" / "model" / "model.safetensors"
CHANNEL_DIVISOR = "channel_divisor"
"""The metadata of a supernet whose weights were trained with a share of their channels: the reciprocal of the share."""


def read_splits() -> Splits:
    """Read the splits that search wrote.

    Raises:
        TangleNASError: The file holds no splits, or one of them is empty.
    """
    splits = Splits.from_json(SPLITS.read_text("utf-8", errors="replace"))
    if empty := [name for name, count in splits.sizes().items() if not count]:
        raise TangleNASError(
            f"{SPLITS}: the split {empty[0]!r} has no sample, but every stage needs one or more: search writes none "
            "like this. Run search again, or `dvc repro`"
        )
    return splits


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Return what a stage wrote for people, or {} if it is missing or damaged, as no result depends on it."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_mixture(space: SearchSpace, derivations: Mapping[str, Any]) -> tuple[Mixture | None, str]:
    """Read the mixture that a search ended with, or None after a sampled search, and the method that derives from it.

    Raises:
        TangleNASError: The mixture is of another space, or its method is not in `derivations`.
    """
    mixing, derivation = weights.load_weights(MIXTURE), weights.weights_metadata(MIXTURE).get("derivation", "")
    try:
        if derivation not in derivations:
            raise TangleNASError(
                f"its metadata has the derivation {derivation!r}, expected one of {', '.join(derivations)}"
            )
        if foreign := [name for name, tensor in mixing.items() if tensor.dtype not in weights.FLOATS]:
            raise TangleNASError(f"{foreign[0]!r} is of type {mixing[foreign[0]].dtype}, expected mixing weights")
        return space.mixture(mixing) if mixing else None, derivation
    except (TangleNASError, RuntimeError, ValueError) as error:
        raise TangleNASError(
            f"{MIXTURE} is not what search writes for {space.name!r}: {error}. Run search again, or `dvc repro`"
        ) from None


def read_targets() -> dict[str, float]:
    """Read the costs that a search aimed for, by name.

    Raises:
        TangleNASError: The mixture's file does not hold positive numbers by name.
    """
    try:
        targets = strict_json.loads(weights.weights_metadata(MIXTURE).get("targets", "{}"))
        return {name: positive(f"the target for {name}", value) for name, value in targets.items()}
    except (TangleNASError, ValueError, AttributeError) as error:
        raise TangleNASError(
            f"{MIXTURE} has targets that search does not write: {error}. Run search again, or `dvc repro`"
        ) from None


def load_into(network: nn.Module, path: Path, advice: str = "", space: SearchSpace | None = None) -> None:
    """Load the weights that an earlier stage wrote into a network.

    A space also learns with which share of the channels the weights of its supernet were trained.
    The images may have another size than in that stage where the space resamples position embeddings.

    Args:
        network: The network, or a space.
        path: The file.
        advice: The remedy where the file has the weights of another network; "" for running its stage again.
        space: The space of a standalone network.

    Raises:
        TangleNASError: The file holds the weights of another network, or none that a network can have, or its metadata
            has a share of the channels that search does not write.
    """
    convert = getattr(space or network, "converted", None)
    try:
        if prefix := weights.load_into(network, path, convert):
            print(f"{path}: all names begin with {prefix!r}, which was left out", file=sys.stderr)
    except weights.OtherWeightsError as error:
        found, _, reason = str(error).partition(" (")
        advice = advice or _run_again(space or network)
        raise TangleNASError(f"{found} than the config and {ARCHITECTURE.name} say ({reason}. {advice}") from None
    if isinstance(network, SearchSpace):
        network.superposition.trained_divisor = trained_divisor(network, path)


def _run_again(space: nn.Module) -> str:
    """Return the remedy for weights that do not fit a space, or a standalone network, which the config explains."""
    again = "Run the stage that writes it again, or `dvc repro`"
    if not isinstance(space, SearchSpace):  # this version's evaluate passes the space
        return f"{again}. If pipelines/evaluate.py is of an earlier version, run `tanglenas init --upgrade .` before"
    if "image_size" not in (space.created_with or {}):
        return again
    kind = type(space)
    resamples = kind.converted is not SearchSpace.converted and "patch_size" in inspect.signature(kind).parameters
    return f"{again}. If the config has another image_size than that stage had, " + (
        "bind create_space.patch_size as it was there"
        if resamples
        else "go back to that one: networks of this space have the image size of their training"
    )


def trained_divisor(space: SearchSpace, path: Path) -> int:
    """Return the `channel_divisor` with which the weights of a file were trained; 1 if its metadata has none.

    Raises:
        TangleNASError: It is none that search writes for this space.
    """
    given = weights.weights_metadata(path).get(CHANNEL_DIVISOR, "1")
    channels = space.partial_channels if isinstance(space, CellSpace) else []
    if given.isdecimal() and len(given) < 10 and int(given) and not any(count % int(given) for count in channels):
        return int(given)
    raise TangleNASError(
        f"{path}: its metadata has the {CHANNEL_DIVISOR} {given[:60]!r}, expected a whole number that divides the "
        f"channels of {space.label}. Run search again, or `dvc repro`"
    )


def inherits() -> bool:
    """Return whether retrain takes the supernet's weights: for the network, or for its teacher."""
    bound = gin.get_bindings("retrain")
    return bound.get("mode", "scratch") != "scratch" or bound.get("teacher") is not None


def load_inherited(space: SearchSpace) -> None:
    """Load the weights of the search into the space, if retrain takes them.

    Raises:
        TangleNASError: The space was created otherwise than in the search.
    """
    if inherits():
        load_into(space, SUPERNET, inherited_advice())


def inherited_advice() -> str:
    """Return what a person can do where the space of retrain is another than that of the search."""
    mode = gin.get_bindings("retrain").get("mode", "scratch")
    if mode == "scratch":
        return "retrain.teacher takes the weights of the search: create the space as there, or use no teacher"
    return (
        f"retrain.mode {mode!r} takes the weights of the search: create the space as there, or use 'scratch', which "
        "may build a larger network"
    )


def state_before_search(space: SearchSpace) -> dict[str, Tensor] | None:
    """Return a copy of the state of a space as it was created; None if the search started from other weights."""
    if "weights_sha256" in weights.weights_metadata(SUPERNET):
        return None
    return {name: tensor.clone() for name, tensor in space.state_dict().items()}
