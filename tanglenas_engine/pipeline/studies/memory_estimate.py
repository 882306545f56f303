"""Estimates of the memory that a search needs, before a study starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tanglenas_engine.errors import TangleNASError, shown
from tanglenas_engine.pipeline.config.configurables import create
from tanglenas_engine.pipeline.config.reader import configured
from tanglenas_engine.pipeline.config.values import resolved
from tanglenas_engine.pipeline.studies.run import arguments_of
from tanglenas_engine.training.bytes import saved_bytes

BASE = 900 * 2**20
"""Bytes of a stage's process before it trains: Python, torch, MLflow and timm."""
SAMPLES = 2
"""Samples of the batch that is tried: the least with which a batch norm can train."""
STATES = 4
"""Copies of the weights in a training: the weights, their gradients, and the two moments of Adam."""


@dataclass(frozen=True)
class Need:
    """The memory of a search in bytes: of the weights with gradients and moments, and of what a step keeps.

    Attributes:
        samples: Those that a step takes at a time.
        advice: The options that lower it, for a message.
    """

    weights: int
    kept: int
    samples: int
    advice: str = "a smaller search.batch_size with -S, more `search.accumulate` with --bind"

    @property
    def total(self) -> int:
        return BASE + self.weights + self.kept


def estimate() -> Need:
    """Return what a search of the run in the current folder needs, by a step of the largest network on two samples.

    A search step keeps about as much for its backward pass as a step of the largest network. Data in memory and what a
    GPU's libraries take are not counted.

    Raises:
        TangleNASError: The config is wrong, or the data are missing.
    """
    import gin

    with configured(arguments_of("search")):
        _, space, _ = create()
        bound = {name: resolved(value) for name, value in gin.get_bindings("search").items()}
    piece = math.ceil(bound["batch_size"] / bound.get("accumulate", 1))
    inputs = space.example_input(SAMPLES)
    weights = {parameter.untyped_storage().data_ptr() for parameter in space.parameters()}
    with space.as_largest():
        kept = saved_bytes(lambda: space(inputs), weights)
    parameters = sum(parameter.nbytes for parameter in space.parameters())
    return Need(STATES * parameters, kept * piece // SAMPLES, piece)


def available() -> tuple[int, str]:
    """Return the free memory of the device that stages take, in bytes, and its name."""
    import os

    device = os.environ.get("TANGLENAS_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0], device
    import psutil

    return int(psutil.virtual_memory().available), "this machine"


def check(need: Need) -> str:
    """Return a sentence about the memory that a search needs.

    Raises:
        TangleNASError: There is less.
    """
    free, where = available()
    amount = (
        f"a search needs about {_size(need.total)}: {_size(need.weights)} for weights, gradients and moments, "
        f"{_size(need.kept)} for what a step with {need.samples} samples at a time keeps"
    )
    if need.total > free:
        raise TangleNASError(
            f"{amount}. {shown(where)} has {_size(free)} free. Take {need.advice}, or --scale cpu; --no-run lays the "
            "study out for another machine"
        )
    return f"{amount}; {shown(where)} has {_size(free)} free"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
