"""The paper's Algorithm 1 to the letter, against which the engine's masks are measured.

For every combination of the options of a layer's choices, it cuts the slice out of each parameter, pads it with zeros
to the full shape, multiplies it by the combination's probability, and adds it up. Everything else in a space is
unchanged: attention, weighted norms, and the mixture over depths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

from tanglenas_engine import elastic
from tanglenas_engine.elastic import Elastic
from tanglenas_engine.superposition.mixture import COVERED
from tanglenas_engine.superposition.size import Axis, combinations


@contextmanager
def pad_and_sum() -> Iterator[None]:
    """Let spaces on the soft path add up padded slices within the block."""
    with (
        _replaced(Elastic, "current", _current),
        _replaced(elastic.Linear, "forward", _linear),
        _replaced(elastic.Conv2d, "forward", _conv2d),
    ):
        yield


def _current(self: Elastic, name: str) -> Tensor | None:
    tensor: Tensor | None = getattr(self, name)
    state = self._superposition
    if tensor is None or state is None or state.mixture is None:
        return tensor
    axes = self.axes[name]
    covered = [axis.role in COVERED[state.relaxation] for axis in axes]
    rows = dict.fromkeys(row for axis, mixed in zip(axes, covered, strict=True) if mixed for row in axis.size.rows)
    if not rows:
        return tensor
    total = None
    for picks in combinations(rows):
        weights = (state.mixture.stacks[len(row.options)][row.slot, i] for row, i in picks.items())
        part = tensor
        for dim, (axis, mixed) in enumerate(zip(axes, covered, strict=True)):
            if mixed and axis.size.rows:
                part = _padded_slice(part, dim, axis, axis.size.value(picks))
        part = math.prod(weights) * part
        total = part if total is None else total + part
    return total


def _padded_slice(tensor: Tensor, dim: int, axis: Axis, size: int) -> Tensor:
    rest = axis.size.max - size
    before = rest // 2 if axis.layout == "window" else 0
    blocks = tensor.unflatten(dim, (axis.blocks, -1))
    padding = [0, 0] * (blocks.dim() - dim - 2) + [before, rest - before]
    return F.pad(blocks.narrow(dim + 1, before, size), padding).flatten(dim, dim + 1)


def _linear(self: elastic.Linear, x: Tensor) -> Tensor:
    return F.linear(x, self.current("weight"), self.current("bias"))


def _conv2d(self: elastic.Conv2d, x: Tensor) -> Tensor:
    weight, bias = self.current("weight"), self.current("bias")
    return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


@contextmanager
def _replaced(owner: type, name: str, function: Callable[..., object]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)
