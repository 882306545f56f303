"""Counts of the bytes of a step: those that it keeps for its backward pass, and those that it allocates."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def saved_bytes(step: Callable[[], object], known: set[int]) -> int:
    """Return the bytes that a step saves for backward: each storage once, without those at the addresses `known`."""
    # The storages are kept until the end, because a freed address would be used again.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that the device's allocator gives out during a step, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _hushed(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
    results = profile.profiler.kineto_results
    now = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep from the terminal what torch's profiler writes about itself to the file descriptor of standard error."""
    sys.stderr.flush()
    terminal, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nothing)
