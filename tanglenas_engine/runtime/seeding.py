"""The global random generators: seeding them for a while, saving and restoring their state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tanglenas_engine.errors import at_least

MOST_SEED = 2**63 - 1
"""The largest seed, a whole number of 64 bits with a sign."""


def checked_seed(name: str, seed: int) -> int:
    """Return the seed of an option.

    Raises:
        TangleNASError: It is no whole number from 0 to `MOST_SEED`.
    """
    return at_least(name, seed, 0, MOST_SEED)


@contextmanager
def seeded(seed: int, accelerators: bool = True) -> Iterator[None]:
    """Seed the global generators of torch, Python and NumPy inside the block, and restore their state afterwards.

    With `accelerators=False`, the generators of GPUs are neither seeded nor restored, because restoring them is slow.
    """
    devices = range(torch.cuda.device_count()) if accelerators and torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            # torch.manual_seed also seeds every accelerator.
            (torch.manual_seed if accelerators else torch.default_generator.manual_seed)(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def rng_state() -> dict[str, Any]:
    """Return the state of the global generators of torch, Python, NumPy and this process's GPU, if it is in use.

    NumPy's generator is included because augmentations of other libraries draw from it.
    """
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy["state"] = {**numpy["state"], "key": numpy["state"]["key"].tolist()}  # weights_only refuses arrays
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # asking earlier would claim GPU memory
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the generators to the state that `rng_state` returned. A GPU's state is skipped if there is no GPU."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
