"""Weights as safetensors files. Equal input gives equal bytes."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime import strict_json
from tanglenas_engine.runtime.files import write_atomic

PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes of names that torch's DistributedDataParallel and compile, and wrappers such as Lightning's, add."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of weights that a network takes. Integers and 8-bit floats are quantised, and need scales to be read."""


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


def load_into(network: nn.Module, path: str | Path) -> str:
    """Load the weights of a file into a network, and return the prefix that was cut from all names, mostly "".

    Raises:
        OtherWeightsError: Names or shapes are not those of the network.
        TangleNASError: The file is missing or damaged, or a tensor is quantised, complex or not finite.
    """
    own = network.state_dict()
    state, prefix = _without_prefix(load_weights(path), own)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[-1].split())
        raise OtherWeightsError(f"{path} holds the weights of another network ({reason[:500]})") from None
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
    return prefix


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _without_prefix(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
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
        raise TangleNASError(
            f"cannot read {path} as a safetensors file: {' '.join(str(error).split())[:300]}. {_advice(path)}"
        ) from error


def _advice(path: Path) -> str:
    """Return what to do about a file that is no safetensors file."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(2) in (b"PK", b"\x80\x02"):
            return (
                "It is a file of torch.save. Convert it where you trust it: "
                "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
            )
    return (
        "It is truncated or was never one. Run the stage that writes it again, or copy it again if no stage of this "
        "project wrote it"
    )
