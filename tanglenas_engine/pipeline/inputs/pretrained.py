"""The weights that a search starts from: where they are, how they are downloaded, and what identifies them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tanglenas_engine.data import Dataset, data_path
from tanglenas_engine.errors import TangleNASError, closest, describe
from tanglenas_engine.pipeline.inputs.data_options import remedies
from tanglenas_engine.runtime import distributed, strict_json
from tanglenas_engine.runtime.weights import weights_digest
from tanglenas_engine.spaces.pretrained import load_pretrained
from tanglenas_engine.spaces.space import SearchSpace

SCRATCH = "scratch"
"""The source of a search whose weights are newly initialised."""
HUBS = ("timm", "hf")
NORMALISATION = 1e-3
"""The largest difference between means or deviations of pixels from 0 to 1 that does not matter."""


def pretrained(space: SearchSpace, dataset: Dataset, weights: str = SCRATCH) -> str:
    """Load the weights that a search starts from, and return their SHA-256, or "" for a search from scratch.

    What was done is printed, and whether the dataset normalises images in another way than that of the weights. Those
    may be the ones that a space of `elasticize` brings along.

    Bind `pretrained.weights` to a safetensors file, to a folder with config.json and model.safetensors, to `timm:NAME`
    for a network of timm, or to `hf:OWNER/NAME` for a repository of the Hugging Face hub.

    Raises:
        TangleNASError: The weights cannot be found or downloaded, or are not those of the space's largest network.
    """
    if weights == SCRATCH:
        _tell(space.name, _other_inputs(space.trained_on, dataset))
        return ""
    path = located(weights)
    _tell(weights, load_pretrained(space, path, partial(remedies, space, dataset)))
    _tell(weights, _other_inputs(_inputs_of(path), dataset))
    return weights_digest(path)


def _tell(source: str, notes: Iterable[str]) -> None:
    for note in notes:
        if distributed.rank() == 0:
            print(f"{source}: {note}", file=sys.stderr)


def _inputs_of(path: Path) -> Mapping[str, Any]:
    """Return what the config.json of a folder says of inputs, or nothing."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return dict(strict_json.loads((path / "config.json").read_text("utf-8"))["pretrained_cfg"])
    return {}


def _other_inputs(there: Mapping[str, Any], dataset: Dataset) -> Iterator[str]:
    """Yield a sentence if images were normalised otherwise for the weights than the dataset does it.

    Weights for RGB on grey images are compared by the mean over the channels, as timm adapts them.

    Args:
        there: The `mean` and `std` of the weights, if they are known.
        dataset: The dataset.
    """
    with suppress(ValueError, KeyError, TypeError):
        here = dataset.input_config()
        pairs = [(list(map(float, there[name])), here[name]) for name in ("mean", "std")]
        pairs = [([round(fmean(theirs), 4)] if len(ours) == 1 else theirs, ours) for theirs, ours in pairs]
        if any(abs(a - b) > NORMALISATION for theirs, ours in pairs for a, b in zip(theirs, ours, strict=True)):
            (mean, our_mean), (std, our_std) = pairs
            yield (
                f"the network was trained on images normalised with mean {mean} and std {std}, and the dataset "
                f"{dataset.name} has mean {our_mean} and std {our_std}. The weights fit better with the former: set "
                "create_dataset.mean and create_dataset.std, if the dataset has these options"
            )


def located(weights: str) -> Path:
    """Return the file or folder of a source of weights. Those of a hub are downloaded, unless they were before.

    Raises:
        TangleNASError: timm has no such weights, or they cannot be downloaded.
    """
    hub, colon, name = weights.partition(":")
    if not colon or hub not in HUBS:
        return data_path(weights)
    return _downloaded(weights, _repository_of_timm(name) if hub == "timm" else name)


def local_digest(weights: str) -> str:
    """Return the SHA-256 of weights on this machine, or "" where they are a hub's, or missing."""
    if weights == SCRATCH or weights.partition(":")[0] in HUBS:
        return ""
    path = data_path(weights)
    return weights_digest(path) if path.exists() else ""


def _repository_of_timm(name: str) -> str:
    """Return the repository on the Hugging Face hub with the weights of one of timm's networks."""
    import timm

    model = name.partition(".")[0]
    if not timm.is_model(model):
        raise TangleNASError(f"timm has no network {model!r}.{closest(model, timm.list_models())}")
    tags = timm.list_pretrained(f"{model}.*")
    config = timm.get_pretrained_cfg(name) if "." not in name or name in tags else None
    repository = config and config.hf_hub_id
    if not repository:
        listed = ", ".join(tags) or "none on the Hugging Face hub"
        raise TangleNASError(f"timm has no weights {name!r} to download: those of {model!r} are {listed}")
    return str(repository)


def _downloaded(weights: str, repository: str) -> Path:
    """Download a repository's config and safetensors files, or find them in the cache of huggingface_hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise TangleNASError(
            f"cannot download {weights} (the repository {repository} of the Hugging Face hub): {describe(error)}. "
            "Check the name and the network. Without a network, download it elsewhere "
            f"(`hf download {repository} --local-dir FOLDER`), copy the folder here, and give its path in place of the "
            "name"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise TangleNASError(
            f"{weights}: the repository {repository} has no safetensors file, only weights that may run code when they "
            "are read. Choose a repository with model.safetensors, or convert them where you trust them"
        )
    return folder
