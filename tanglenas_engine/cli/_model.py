"""A trained network in one of the forms that this project writes: what is known of its inputs, and how it is opened."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanglenas_engine.errors import TangleNASError, closest, describe, quoted
from tanglenas_engine.runtime import strict_json

from ._console import read_text
from ._space import read_architecture

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
IMAGES = ("num_classes", "label_names", "input_size", "mean", "std", "crop_pct", "interpolation", "eval_transform")
TEXTS = ("vocab_size", "block_size")
SIZES = ("num_classes", "image_size", "in_channels", *TEXTS)
"""The options of a space that the data decide."""
OWN_TRANSFORM = (
    "If its dataset has a transform of its own (create_dataset.eval_transform), which no file holds, or data that are "
    "no images or text, make the inputs as the dataset does; docs/serving.md shows how. Otherwise export the network "
    "again from the files of its run"
)
"""The remedy for a network whose files do not say how its inputs are made."""
RETRAINED = ("", "model", "retrain/model", "out/retrain/model")
"""The folders in which a network may lie, from where a person points: itself, a stage's, `out/` or a project's."""


@dataclass(frozen=True)
class Known:
    """The known description of a network's inputs and outputs: a `Described` of the engine.

    Attributes:
        config: The entries of `IMAGES` or `TEXTS` that are known.
        tokenizer: The content of a tokenizer.json, or "".
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""

    def input_config(self) -> dict[str, Any]:
        return dict(self.config)

    def files(self) -> dict[str, str]:
        return {TOKENIZER: self.tokenizer} if self.tokenizer else {}


@dataclass(frozen=True)
class Model:
    """A network, opened.

    Attributes:
        forward: A function from inputs (B, ...) to outputs (B, ...).
        known: What is known of both.
        length: The number of tokens that a graph was traced for and takes alone, or None.
    """

    path: Path
    forward: Callable[[Tensor], Tensor]
    known: Known
    length: int | None = None


def known_beside(weights: Path) -> Known | None:
    """Return what the config.json beside a file of weights says, or None if there is none or it says nothing.

    Raises:
        TangleNASError: A file is damaged.
    """
    path = weights.with_name(CONFIG)
    if not path.is_file():
        return None
    tokenizer = _tokenizer(weights.parent)
    if tokenizer:  # that of a run of an earlier version may have a post-processor
        tokenizer = open_tokenizer(tokenizer, weights.parent).to_str(pretty=True)
    known = Known(_entries(_json(path)), tokenizer)
    return known if {"input_size", "block_size"} & set(known.config) else None


def sizes_beside(weights: Path) -> dict[str, Any]:
    """Return the options of a space that the config.json beside a file of weights says; {} where there is none.

    A network may be retrained on larger images than those of the search, so that the architecture's stage has others.

    Raises:
        TangleNASError: The file is damaged, or a size is not a positive whole number.
    """
    path = weights.with_name(CONFIG)
    config = _json(path) if path.is_file() else {}
    if isinstance(config.get("options"), dict):
        sizes = {name: config["options"][name] for name in SIZES if name in config["options"]}
    else:
        size = _entries(config).get("input_size")
        if not (isinstance(size, list) and len(size) == 3 and size[1] == size[2]):
            return {}
        classes = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
        sizes = {"in_channels": size[0], "image_size": size[1], **classes}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise TangleNASError(
                f"{path} is damaged: the {name} of the network is {quoted(value, 80)}, expected a positive whole "
                "number. Run retrain again, or `dvc repro`"
            )
    return sizes


def open_tokenizer(content: str, place: Path) -> Tokenizer:
    """Open the content of a tokenizer.json without its truncation, padding and post-processor.

    Networks are trained on windows from everywhere in a text, without tokens that begin or end it.

    Raises:
        TangleNASError: The content is damaged.
    """
    from tokenizers import Tokenizer

    from tanglenas_datasets.tokenizer_file import refusals

    with refusals(f"the tokenizer.json of {place} is none", "Copy it again"):
        tokenizer = Tokenizer.from_str(content)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.post_processor = None
    return tokenizer


def open_model(path: Path) -> Model:
    """Open an exported file or folder, or the network in the output folder of a run.

    Raises:
        TangleNASError: There is no network, it is damaged, or it needs a package that is not installed.
    """
    if path.is_dir():
        for inner in RETRAINED:
            for name, way in (("config.json", _folder), ("model.pt2", _torch_export), ("model.onnx", _onnx)):
                if (found := path / inner / name).is_file():
                    return way(found)
        raise TangleNASError(
            f"{path} holds no network: expected config.json, model.pt2 or model.onnx, as `tanglenas export` writes "
            "them, or the output of retrain. Export a network, or run `dvc repro`"
        )
    if not path.exists():
        raise TangleNASError(f"there is no file or folder {path}.{closest(path.name, _names(path.parent))}")
    ways = {".onnx": _onnx, ".pt2": _torch_export, ".safetensors": _folder, ".json": _folder}
    if path.suffix not in ways:
        raise TangleNASError(
            f"{path} is no network that can be opened: expected a folder, or a file that ends in {', '.join(ways)}"
        )
    return ways[path.suffix](path)


def _folder(path: Path) -> Model:
    """Open the folder in which a file lies: timm's form, that of a space, or that of transformers alone."""
    folder = path.parent
    config = _json(folder / CONFIG)
    if "model_type" in config and "options" not in config:
        return _transformers(folder, config)
    if not (folder / "model.safetensors").is_file():
        raise TangleNASError(f"{folder} has no model.safetensors: export the network again, or run `dvc repro`")
    return _timm(folder, config) if "architecture" in config else _space(folder, config)


def _timm(folder: Path, config: Mapping[str, Any]) -> Model:
    import timm

    from ..plugins import manager

    name = config["architecture"]
    if not timm.is_model(str(name)):
        for registration in manager().registrations("space"):
            with suppress(Exception):  # a broken plugin is none of this network's business
                registration.load()  # its module may tell timm about networks of its own
            if timm.is_model(str(name)):
                break
    try:
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm raises whatever its parts raise
        raise TangleNASError(f"timm cannot open {folder}: {describe(error)}. Export the network again") from None
    return Model(folder, network, Known(_entries(config)))  # network.pretrained_cfg has ImageNet's values for others


def _space(folder: Path, config: Mapping[str, Any]) -> Model:
    from tanglenas_engine.runtime.weights import load_into

    from ..plugins import create_space

    architecture = read_architecture(folder / "architecture.json")
    options = config.get("options")
    if not isinstance(options, dict):
        files = shlex.join([f"{folder / 'architecture.json'}", "--weights", f"{folder / 'model.safetensors'}"])
        raise TangleNASError(
            f"{folder / CONFIG} does not say with which options the space {architecture.space!r} was made. Export the "
            f"network from the output of its run, and use that: tanglenas export {files} --format torch-export "
            "--output exported"
        )
    try:
        space = create_space(architecture.space, **options)
        network = space.standalone(space.architecture_of(space.assignment_of(architecture))).eval()
    except TangleNASError:
        raise
    except Exception as error:  # options that make no network
        raise TangleNASError(
            f"{folder / CONFIG}: the space {architecture.space!r} cannot be made with its options: {describe(error)}. "
            "Export the network again"
        ) from None
    load_into(network, folder / "model.safetensors", space.converted)  # names may be transformers'
    return Model(folder, network, Known(_mapping(config.get("pretrained_cfg")), _tokenizer(folder)))


def _transformers(folder: Path, config: Mapping[str, Any]) -> Model:
    """Open a language model of transformers. Code that lies in the folder does not run."""
    import torch

    AutoModelForCausalLM = transformers_model()
    try:
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    except Exception as error:  # transformers raises whatever its parts raise
        raise TangleNASError(
            f"transformers cannot open {folder} as a language model: {describe(error)}. Download or export it again"
        ) from None

    def forward(inputs: Tensor) -> Tensor:
        logits: Tensor = network(inputs).logits
        return logits

    block = config.get("max_position_embeddings", config.get("n_positions"))
    known = {"vocab_size": config.get("vocab_size"), "block_size": block}
    return Model(folder, forward, Known(known, _tokenizer(folder)))


def transformers_model() -> Any:
    """Return transformers' `AutoModelForCausalLM`, with its bars of progress off.

    Raises:
        TangleNASError: transformers is not installed.
    """
    try:
        transformers: Any = importlib.import_module("transformers")  # slow to import
    except ImportError as error:
        raise TangleNASError(
            f"networks of transformers need more than is installed ({error}): pip install 'tanglenas[hf]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM


def _torch_export(path: Path) -> Model:
    import torch

    files: dict[str, Any] = {CONFIG: ""}
    try:
        program = torch.export.load(path, extra_files=files)
        network, (name,) = program.module(), program.graph_signature.user_inputs
        (shape,) = (node.meta["val"].shape for node in program.graph.nodes if node.name == name)
    except Exception as error:  # the archive may hold anything
        raise TangleNASError(f"torch cannot open {path}: {describe(error)}. Export the network again") from None
    known = Known(_parsed(files[CONFIG] or "{}", path), _tokenizer(path.parent))
    return Model(path, network, known, _length(shape))


def _onnx(path: Path) -> Model:
    import torch

    try:
        import onnxruntime
    except ImportError as error:
        raise TangleNASError(f"ONNX needs more than is installed ({error}): pip install 'tanglenas[onnx]'") from None
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an error for each of its codes
        raise TangleNASError(f"onnxruntime cannot open {path}: {describe(error)}. Export the network again") from None
    name, shape = session.get_inputs()[0].name, session.get_inputs()[0].shape
    stored = session.get_modelmeta().custom_metadata_map

    def forward(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])

    known = {name: _value(stored[name], path) for name in (*IMAGES, *TEXTS) if name in stored}
    return Model(path, forward, Known(known, _tokenizer(path.parent)), _length(shape))


def _length(shape: Sequence[Any]) -> int | None:
    """Return the length of texts (B, length) that a graph takes alone. That of an axis that varies is no int."""
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None


def _tokenizer(folder: Path) -> str:
    path = folder / TOKENIZER
    return read_text(path, "the tokenizer of a text") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    return _parsed(read_text(path, f"the {CONFIG} of an exported network"), path)


def _parsed(text: str | bytes, path: Path) -> dict[str, Any]:
    content = _value(text, path)
    if not isinstance(content, dict):
        raise TangleNASError(f"{path}: what it says of the network is {quoted(content, 80)}, expected an object")
    return content


def _value(text: str | bytes, path: Path) -> Any:
    try:
        return strict_json.loads(text)
    except ValueError as error:
        raise TangleNASError(f"{path}: what it says of the network is no JSON ({error}). Export it again") from None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json says of inputs and outputs, under `pretrained_cfg` or, in older ones, beside it."""
    entries = {**config, **_mapping(config.get("pretrained_cfg"))}
    return {name: entries[name] for name in (*IMAGES, *TEXTS) if entries.get(name) is not None}


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
