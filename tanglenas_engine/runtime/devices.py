"""Choosing a device, and moving batches to it."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from tanglenas_engine.errors import TangleNASError


def device_of(name: str | None) -> torch.device:
    """Return the named device. None stands for this process's CUDA device, or the CPU if there is no CUDA.

    "cuda" stands for this process's CUDA device.

    Raises:
        TangleNASError: The device cannot be used, or this machine has fewer GPUs than processes.
    """
    if name is None or (name == "cuda" and torch.cuda.is_available()):
        return own_device()
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TangleNASError(f"device {name!r} cannot be used: {reason}. Use 'cpu', or leave it out") from None
    return device


def to_device(batch: Iterable[Tensor], device: torch.device, last: bool = True) -> tuple[Tensor, Tensor]:
    """Return inputs and targets on a device. A copy to a GPU does not wait for what the GPU computes.

    Args:
        last: Whether the channels of images are last in memory on a CPU.
    """
    if device.type == "cuda":  # a copy from memory that is not pinned would wait
        batch = [tensor.pin_memory() if tensor.device.type == "cpu" else tensor for tensor in batch]
    inputs, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    return channels_last(inputs) if last else inputs, targets


def channels_last(inputs: Tensor) -> Tensor:
    """Return the same inputs, with the channels of images `(B, C, H, W)` last in memory on a CPU.

    Networks of convolutions keep this layout. Depthwise convolutions and batch norms then take as little as half the
    time; benchmarks/README.md has the measurements.
    """
    if inputs.dim() != 4 or inputs.device.type != "cpu":
        return inputs
    # With one channel, torch treats both layouts as equal and `contiguous` would return the inputs unchanged.
    return torch.empty_like(inputs, memory_format=torch.channels_last).copy_(inputs)


def own_device() -> torch.device:
    """Return this process's own CUDA device, or the CPU if there is no CUDA.

    Raises:
        TangleNASError: This machine has fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        raise TangleNASError(
            f"process {index + 1} of this machine has no GPU: there are {count}. Start at most {count} processes, "
            "or set TANGLENAS_DEVICE=cpu"
        )
    return torch.device("cuda", index)
