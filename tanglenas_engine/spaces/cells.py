"""What cell spaces are made of: DARTS' operations (Liu et al., 2019, arXiv:1806.09055), and the wiring of a cell.

Operations take `(B, C, H, W)` to `(B, C', H / stride, W / stride)`. Those with a kernel to choose are elastic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine import elastic
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.choice import Choice
from tanglenas_engine.superposition.mixture import Superposition
from tanglenas_engine.superposition.size import Number, Row, Size


class CellSpace(SearchSpace):
    """A search space whose choices are the operations on the edges of cells.

    Attributes:
        partial_channels: The channels of which an optimizer with partial channels uses the first few for a while.
    """

    sharings = ("superposed", "entangled", "separate")

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.partial_channels: list[int] = []

    def partial(self, channels: int) -> Size:
        """Return channels of which an optimizer with partial channels uses the first few for a while."""
        self.partial_channels.append(channels)
        return PartialSize(channels, self.superposition)

    def nodes(self) -> list[list[Row]]:
        """Return for each node the rows of choices of the edges into it, of which the node is the sum."""
        raise NotImplementedError(f"{type(self).__name__} must say which edges lead into its nodes: nodes()")

    @property
    def edge_rows(self) -> list[Row]:
        return list(itertools.chain(*self.nodes()))


class PartialSize(Size):
    """A dimension that every architecture has whole, and of which a search may use the first `1 / channel_divisor`.

    The superposition's `channel_divisor` says how many parts there are. Sizes made from it by arithmetic follow it.
    """

    def __init__(self, whole: int, superposition: Superposition):
        super().__init__((), (whole,))
        self.superposition = superposition

    @property
    def used(self) -> int:
        return self.max // self.superposition.channel_divisor

    def map(self, function: Callable[..., Number], *others: Size | Number) -> Size:
        return _PartialResult(function, (self, *map(Size.of, others)))


class _PartialResult(PartialSize):
    def __init__(self, function: Callable[..., Number], operands: tuple[Size, ...]):
        if rows := [row for operand in operands for row in operand.rows]:
            raise TangleNASError(f"partial channels cannot be combined with the choice {rows[0]!r} in one dimension")
        Size.__init__(self, (), (function(*(operand.values[0] for operand in operands)),))
        self.function, self.operands = function, operands

    @property
    def used(self) -> int:
        return int(self.function(*(operand.used for operand in self.operands)))


def nodes(inputs: Sequence[Tensor], edges: Iterable[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """All nodes of a cell: its inputs, then each the sum of an edge from every node before it.

    Edges come in the order of the nodes that they lead to, and of those that they come from.
    """
    found, left = list(inputs), list(edges)
    while left:
        terms = [edge(node) for edge, node in zip(left, found, strict=False)]
        left = left[len(found) :]
        found.append(sum(terms[1:], terms[0]))
    return found


def into_nodes(choices: Iterable[Choice], edges: Sequence[tuple[int, object]]) -> list[list[Row]]:
    """For each node of each cell the rows of the edges into it.

    Args:
        choices: One for each kind of cell, with a layer for each edge.
        edges: (node, source) of each edge.
    """
    ends = list(dict.fromkeys(node for node, _ in edges))
    return [
        [row for row, (node, _) in zip(choice.layer_rows, edges, strict=True) if node == end]
        for choice in choices
        for end in ends
    ]


class Nothing(nn.Module):
    """The operation of an edge that is not there: zeros."""

    def __init__(self, stride: int = 1):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Separable(nn.Sequential):
    """ReLU, depthwise and pointwise convolution, BatchNorm, twice; the first depthwise one has the stride."""

    def __init__(self, channels: Size | int, kernel: Size | int, stride: int = 1, affine: bool = False):
        super().__init__(*(layer for s in (stride, 1) for layer in _stage(channels, kernel, s, 1, affine)))


class Dilated(nn.Sequential):
    """ReLU, depthwise convolution with dilation 2, pointwise convolution, BatchNorm."""

    def __init__(self, channels: Size | int, kernel: Size | int, stride: int = 1, affine: bool = False):
        super().__init__(*_stage(channels, kernel, stride, 2, affine))


class Pointwise(nn.Sequential):
    """ReLU, convolution, BatchNorm."""

    def __init__(self, channels_in: int, channels: int, affine: bool = False):
        super().__init__(
            nn.ReLU(), nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=affine)
        )


class FactorizedReduce(nn.Module):
    """Half of the channels from the even pixels, half from the odd ones: `(B, C, H, W) -> (B, C', H / 2, W / 2)`."""

    def __init__(self, channels_in: Size | int, channels: Size | int, affine: bool = False):
        super().__init__()
        channels = Size.of(channels)
        self.conv1 = elastic.Conv2d(channels_in, channels // 2, 1, stride=2, bias=False)
        self.conv2 = elastic.Conv2d(channels_in, channels - channels // 2, 1, stride=2, bias=False)
        self.norm = elastic.BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        y: Tensor = self.norm(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], 1))
        return y


def skip(channels: Size | int, stride: int = 1, affine: bool = False) -> nn.Module:
    """The identity, or what comes closest to it with a stride."""
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


def pool(kind: str, channels: Size | int, stride: int = 1, norm: bool = True) -> nn.Module:
    """ "max" or "avg" pooling over 3 x 3 pixels, with a BatchNorm behind it that keeps it in scale with the others."""
    layer = nn.MaxPool2d(3, stride, 1) if kind == "max" else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    return nn.Sequential(layer, elastic.BatchNorm2d(channels, affine=False)) if norm else layer


def _stage(channels: Size | int, kernel: Size | int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    return [
        nn.ReLU(),
        elastic.Conv2d(channels, channels, kernel, stride, dilation=dilation, groups=channels, bias=False),
        elastic.Conv2d(channels, channels, 1, bias=False),
        elastic.BatchNorm2d(channels, affine=affine),
    ]
