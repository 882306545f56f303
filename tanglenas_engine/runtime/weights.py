"""Weights as safetensors files. Equal input gives equal bytes."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tanglenas_engine.errors import TangleNASError, listed, shown
from tanglenas_engine.runtime import strict_json
from tanglenas_engine.runtime.files import write_atomic

PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes of names that torch's DistributedDataParallel and compile, and wrappers such as Lightning's, add."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of weights that a network takes. Integers and 8-bit floats are quantised, and need scales to be read."""
CONVERT = (
    "Convert it where you trust it: "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
)
"""Advice about a pickled file of weights."""


class OtherWeightsError(TangleNASError):
    """The error for a file with the weights of another network."""


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically. Equal input gives equal bytes.

    Slices are made contiguous. Tensors that share memory (tied weights) are each stored in full.

    Raises:
        TangleNASError: The file cannot be written.
    """
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    data = safetensors.torch.save(stored, dict(metadata or {}))
    write_atomic(path, _sort_header(data) if metadata and len(metadata) > 1 else data)


def _sort_header(data: bytes) -> bytes:
    """Sort a safetensors file's metadata. safetensors writes it in hash order, which differs between processes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the start of the tensors to 8 bytes
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[end:]))


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises:
        TangleNASError: The file is missing, truncated, or not a safetensors file.
    """
    with _reading(Path(path)):
        with open(path, "rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), 2**27)  # safetensors itself refuses a longer header
            strict_json.loads(file.read(length))
        return safetensors.torch.load_file(path)


def load_into(
    network: nn.Module, path: str | Path, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
) -> str:
    """Load the weights of a file into a network, and return the prefix that was cut from all names, mostly "".

    Args:
        network: The network.
        path: The file.
        convert: A function that gives tensors the network's names and shapes.

    Raises:
        OtherWeightsError: Names or shapes are not those of the network, or it ties what differs in the file.
        TangleNASError: The file is missing or damaged, or a tensor is quantised, complex or not finite.
    """
    own = network.state_dict()
    state, prefix = without_prefix(load_weights(path), own)
    state = convert(state) if convert else state
    load_state(network, state, path)
    check_values(path, state, own, prefix)
    return prefix


def load_state(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load tensors into a network. Where they do not fit, some of them may be loaded.

    Args:
        network: The network.
        state: The tensors.
        source: The file or option that the error names.

    Raises:
        OtherWeightsError: Names or shapes are not those of the network, or it ties tensors that differ.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = _difference(network, state, network.state_dict()) or shown(error)
        raise OtherWeightsError(f"{source} holds the weights of another network ({reason})") from None
    check_tied(network, state, source)


def check_tied(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse tensors that differ where the network has one parameter for them: it would take one and lose the others.

    Raises:
        OtherWeightsError: Two tensors of one parameter differ.
    """
    first: dict[nn.Parameter, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if name not in state:
            continue
        one = first.setdefault(parameter, name)
        if not _equal(state[one], state[name], parameter.dtype):
            raise OtherWeightsError(
                f"{source} has other numbers in {one} than in {name}, which are one tensor here: create the network "
                "without tied weights, or give weights that are tied"
            )


def _equal(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Return True for tensors of equal values in a type. Those that are no numbers are equal."""
    if one is other or one.shape != other.shape:
        return one is other
    one, other = one.to(dtype), other.to(dtype)
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _difference(network: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return how the names and shapes of tensors differ from those of a network, which takes what fits."""
    shapes = {name: tensor.shape for name, tensor in state.items() if name in own and tensor.shape != own[name].shape}
    fitting = {name: tensor for name, tensor in state.items() if name not in shapes}
    try:
        found = network.load_state_dict(fitting, strict=False)
    except RuntimeError:
        return ""
    missing = [name for name in found.missing_keys if name not in shapes]
    differing = [f"{name} is {tuple(shape)} there and {tuple(own[name].shape)} here" for name, shape in shapes.items()]
    parts = {"it lacks": missing, "the network has no": found.unexpected_keys, "the shapes differ:": differing}
    return "; ".join(f"{what} {listed(names)}" for what, names in parts.items() if names)


def check_values(path: str | Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuse values that no network can have.

    Args:
        path: The file or folder that the error names.
        state: The tensors, without the prefix of their names in the file.
        own: The network's own tensors. Only names in both are checked.
        prefix: The prefix that was cut.

    Raises:
        TangleNASError: A tensor is quantised, complex or not finite.
    """
    for name in (name for name in own if name in state):
        tensor, target = state[name], own[name].dtype
        if (tensor.dtype not in FLOATS) if target.is_floating_point else (tensor.dtype != target):
            raise TangleNASError(
                f"{path}: {prefix}{name} is of type {_type(tensor.dtype)}, expected {_type(target)}: the file is "
                "quantised or was made for another purpose. Give the weights that were trained"
            )
        wrong = int((~tensor.to(target).isfinite()).sum())
        if wrong:
            raise TangleNASError(
                f"{path}: {prefix}{name} has {wrong:,} of {tensor.numel():,} values that are not finite in "
                f"{_type(target)}: the training diverged, or the file is damaged. Train again, or copy the file again"
            )


INDEX = "model.safetensors.index.json"
"""The file of a folder that says which of several safetensors files has which tensor."""


def weight_files(path: str | Path) -> list[Path]:
    """Return the safetensors files of a path: the file itself, or those of a folder that a library wrote.

    A folder has `model.safetensors`, or several files and their index, as Hugging Face's libraries write them.

    Raises:
        TangleNASError: There are no such weights, a file that the index names is missing, or the weights are pickled.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise TangleNASError(f"no weights at {path}: expected a safetensors file, or a folder with one")
        return [path]
    if (path / INDEX).is_file():
        names = sorted(set(_index(path).values()))
        if missing := [name for name in names if not (path / name).is_file()]:
            raise TangleNASError(
                f"{path} lacks {len(missing)} of the {len(names)} files that {INDEX} names, such as {missing[0]}: "
                "copy or download the folder again, with all of its files"
            )
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if shards := sorted(path.glob("*-of-*.safetensors")):
        raise TangleNASError(
            f"{path} has {shards[0].name}, but lacks {INDEX}, which says what its files are: copy or download the "
            "folder again, with all of its files"
        )
    pickles = sorted(file for file in path.iterdir() if file.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    raise TangleNASError(
        f"{path} has no model.safetensors"
        + (f", only {pickles[0].name}, which may run code when it is read. {CONVERT}" if pickles else "")
        + ("" if pickles else ": expected a folder that `tanglenas export`, timm or transformers wrote")
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of a folder (see `weight_files`), on the CPU.

    Raises:
        TangleNASError: A file is missing or damaged, or lacks a tensor that the index says it has.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(path):
        state.update(load_weights(file))
    if Path(path, INDEX).is_file() and (lost := [name for name in _index(Path(path)) if name not in state]):
        raise TangleNASError(
            f"{path}: {INDEX} names {lost[0]!r}, which no file has: download the folder again, with all of its files"
        )
    return state


def weights_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file of weights, or of a folder's one. For several files, it is that of their digests."""
    digests = []
    for name in weight_files(path):
        with open(name, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor of a folder with several files."""
    try:
        index = strict_json.loads((folder / INDEX).read_text("utf-8", errors="replace"))["weight_map"]
        if index and all(isinstance(name, str) and Path(name).name == name for name in index.values()):
            return dict(index)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise TangleNASError(f"{folder / INDEX} has no weight_map of tensors to files beside it: download the folder again")


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def without_prefix(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Cut the prefixes of wrappers that all names have, where no name is one of the network's as it is."""
    prefix = ""
    while state and not any(name in own for name in state):
        found = next((it for it in PREFIXES if all(name.startswith(it) for name in state)), None)
        if found is None:
            break
        state = {name.removeprefix(found): tensor for name, tensor in state.items()}
        prefix += found
    return state, prefix


def weights_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata that `save_weights` stored beside the tensors. It reads only the file's header.

    Raises:
        TangleNASError: The file is missing, truncated, or not a safetensors file.
    """
    with _reading(Path(path)), safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors from reading a safetensors file into a TangleNASError."""
    if not path.is_file():
        raise TangleNASError(f"no weights at {path}. Run the stage that writes this file, or correct the path.")
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        with suppress(OSError), open(path, "rb") as file:
            if file.read(2) in (b"PK", b"\x80\x02"):
                raise TangleNASError(f"{path} is a file of torch.save, not a safetensors file. {CONVERT}") from None
        raise TangleNASError(
            f"cannot read {path} as a safetensors file: {' '.join(str(error).split())[:300]}. It is truncated or was "
            "never one. Run the stage that writes it again, or copy it again if no stage of this project wrote it"
        ) from error
