"""Weights as safetensors files. Equal input gives equal bytes."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.files import write_atomic


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
        return safetensors.torch.load_file(path)


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
    except (SafetensorError, OSError) as error:
        raise TangleNASError(
            f"cannot read {path} as a safetensors file: {error}. It is truncated or was never one: "
            "delete it and run the stage that writes it again."
        ) from error
