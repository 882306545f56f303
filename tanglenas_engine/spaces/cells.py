"""Parts of cell spaces: DARTS' operations (Liu et al., 2019, arXiv:1806.09055), and the wiring of a cell.

Operations map `(B, C, H, W)` to `(B, C', H / stride, W / stride)`. Operations with a choice of kernels are elastic.
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
        partial_channels: The numbers of channels that were declared with `partial`.
    """

    sharings = ("superposed", "entangled", "separate")

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.partial_channels: list[int] = []

    def partial(self, channels: int) -> Size:
        """Return a Size of all these channels. An optimizer with partial channels can limit it for a while."""
        self.partial_channels.append(channels)
        return PartialSize(channels, self.superposition)

    def nodes(self) -> list[list[Row]]:
        """Return for each node the rows of the edges into it. A node is the sum of these edges' outputs."""
        raise NotImplementedError(f"{type(self).__name__} must say which edges lead into its nodes: nodes()")

    @property
    def edge_rows(self) -> list[Row]:
        """The rows of all edges, in the order of the nodes."""
        return list(itertools.chain(*self.nodes()))


class PartialSize(Size):
    """A dimension that is the same in every architecture. A search may use only the first `1 / channel_divisor` of it.

    `channel_divisor` is an attribute of the superposition. Sizes computed from this one are partial too.
    """

    def __init__(self, whole: int, superposition: Superposition):
        super().__init__((), (whole,))
        self.superposition = superposition

    @property
    def used(self) -> int:
        """The number of channels that the search uses now."""
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


def cell_nodes(inputs: Sequence[Tensor], edges: Iterable[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """Return all nodes of a cell: its inputs, then each further node as the sum of one edge from every earlier node.

    Args:
        inputs: The inputs of the cell.
        edges: The edges, sorted by the node that they lead to and then by the node that they come from.
    """
    found, left = list(inputs), list(edges)
    while left:
        terms = [edge(node) for edge, node in zip(left, found, strict=False)]
        left = left[len(found) :]
        found.append(sum(terms[1:], terms[0]))
    return found


def into_nodes(choices: Iterable[Choice], edges: Sequence[tuple[int, object]]) -> list[list[Row]]:
    """Return the rows of the edges into each node of each cell.

    Args:
        choices: One choice per kind of cell, with one layer per edge.
        edges: (node, source) of each edge.
    """
    ends = list(dict.fromkeys(node for node, _ in edges))
    return [
        [row for row, (node, _) in zip(choice.rows, edges, strict=True) if node == end]
        for choice in choices
        for end in ends
    ]


class Zero(nn.Module):
    """The operation of an absent edge. It returns zeros."""

    def __init__(self, stride: int = 1):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Separable(nn.Sequential):
    """Two passes of ReLU, depthwise convolution, pointwise convolution and BatchNorm. The first pass has the stride."""

    def __init__(self, channels: Size | int, kernel: Size | int, stride: int = 1, affine: bool = False):
        super().__init__(*(layer for s in (stride, 1) for layer in _stage(channels, kernel, s, 1, affine)))


class Dilated(nn.Sequential):
    """A sequence of ReLU, depthwise convolution with dilation 2, pointwise convolution and BatchNorm."""

    def __init__(self, channels: Size | int, kernel: Size | int, stride: int = 1, affine: bool = False):
        super().__init__(*_stage(channels, kernel, stride, 2, affine))


class Pointwise(nn.Sequential):
    """A sequence of ReLU, 1 x 1 convolution and BatchNorm."""

    def __init__(self, channels_in: int, channels: int, affine: bool = False):
        super().__init__(
            nn.ReLU(), nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=affine)
        )


class FactorizedReduce(nn.Module):
    """A pair of convolutions with stride 2, on even and on odd pixels: `(B, C, H, W) -> (B, C', H / 2, W / 2)`.

    Each one gives half of the output channels.
    """

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
    """Return the identity for stride 1, else `FactorizedReduce`."""
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


def pool(kind: str, channels: Size | int, stride: int = 1, norm: bool = True) -> nn.Module:
    """Return "max" or "avg" pooling over 3 x 3 pixels.

    A BatchNorm behind it matches its scale to that of the other operations.
    """
    layer = nn.MaxPool2d(3, stride, 1) if kind == "max" else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    return nn.Sequential(layer, elastic.BatchNorm2d(channels, affine=False)) if norm else layer


def _stage(channels: Size | int, kernel: Size | int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    return [
        nn.ReLU(),
        elastic.Conv2d(channels, channels, kernel, stride, dilation=dilation, groups=channels, bias=False),
        elastic.Conv2d(channels, channels, 1, bias=False),
        elastic.BatchNorm2d(channels, affine=affine),
    ]
