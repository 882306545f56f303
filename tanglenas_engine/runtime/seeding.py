"""The global random generators: seeded for a while, or saved and restored."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int, accelerators: bool = True) -> Iterator[None]:
    """Seed the global generators of torch, Python and NumPy inside, and leave them outside as they were.

    Without `accelerators` those of GPUs are left alone: putting them back takes long.
    """
    devices = range(torch.cuda.device_count()) if accelerators and torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            # torch.manual_seed would go on to seed every accelerator.
            (torch.manual_seed if accelerators else torch.default_generator.manual_seed)(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def rng_state() -> dict[str, Any]:
    """Where the global generators stand: torch, this process's GPU if it is in use, Python's and NumPy's.

    NumPy's is there because augmentations of other libraries draw from it.
    """
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy["state"] = {**numpy["state"], "key": numpy["state"]["key"].tolist()}  # weights_only refuses arrays
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # asking earlier would claim GPU memory
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to where `rng_state` found them; a GPU's is skipped where there is none."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
