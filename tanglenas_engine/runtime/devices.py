"""Devices, and batches on them."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from tanglenas_engine.errors import TangleNASError


def device_of(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one (of several ranks each has its own), else the CPU."""
    if name is None or (name == "cuda" and torch.cuda.is_available()):
        return own_device()
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TangleNASError(f"device {name!r} cannot be used: {reason}. Use 'cpu', or leave it out") from None
    return device


def to(batch: Iterable[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets on a device; pinned memory is copied without waiting."""
    inputs, targets = batch
    return laid_out(inputs.to(device, non_blocking=True)), targets.to(device, non_blocking=True)


def laid_out(inputs: Tensor) -> Tensor:
    """The same inputs; images on a CPU with the channels last in memory, as a network of convolutions then keeps them.

    Depthwise convolutions and batch norms take up to half the time so: benchmarks/README.md has the figures.
    """
    if inputs.dim() != 4 or inputs.device.type != "cpu":
        return inputs
    # Of a single channel torch takes either layout for the other, and would hand back what it got.
    return torch.empty_like(inputs, memory_format=torch.channels_last).copy_(inputs)


def own_device() -> torch.device:
    """CUDA where there is one, to each process of a machine its own, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        raise TangleNASError(
            f"process {index + 1} of this machine has no GPU: there are {count}. Start at most {count} processes, "
            "or set TANGLENAS_DEVICE=cpu"
        )
    return torch.device("cuda", index)
