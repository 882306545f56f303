"""The cell space of NAS-Bench-201 (Dong and Yang, 2020, arXiv:2001.00326): six edges in a residual network."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine import Architecture, Choice, Row, Size, TangleNASError, cells, elastic, unknown

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = tuple((node, source) for node in range(1, 4) for source in range(node))
"""The edges of a cell, (node, source), in the order of the official notation; node 0 is the input."""


class Convolution(nn.Sequential):
    """A ReLU, a convolution and a BatchNorm; the convolution has a bias where the BatchNorm has none."""

    def __init__(
        self, channels_in: Size | int, channels: Size | int, kernel: Size | int, stride: int = 1, affine: bool = True
    ):
        super().__init__(
            nn.ReLU(),
            elastic.Conv2d(channels_in, channels, kernel, stride, bias=not affine),
            elastic.BatchNorm2d(channels, affine=affine),
        )


class Cell(nn.Module):
    """A cell of four nodes, each the sum of an operation on every node before it: `(B, C, H, W) -> (B, C, H, W)`.

    The first node is the input, the last node the output.
    """

    def __init__(self, channels: Size, operation: Choice, affine: bool, sharing: str):
        super().__init__()
        families = {
            "none": elastic.Family({"none": 1}, lambda _: cells.Zero()),
            "skip_connect": elastic.Family({"skip_connect": 1}, lambda _: nn.Identity()),
            "nor_conv": elastic.Family(
                {"nor_conv_1x1": 1, "nor_conv_3x3": 3},
                partial(Convolution, channels, channels, affine=affine),
            ),
            "avg_pool_3x3": elastic.Family(
                {"avg_pool_3x3": 3}, lambda _: nn.AvgPool2d(3, 1, 1, count_include_pad=False)
            ),
        }
        self.edges = nn.ModuleList(elastic.MixedOperation.of(edge, families, sharing, channels) for edge in operation)

    def forward(self, x: Tensor) -> Tensor:
        return cells.cell_nodes([x], self.edges)[-1]


class Reduction(nn.Module):
    """A basic block of ResNet with stride 2: `(B, C, H, W) -> (B, 2 C, H / 2, W / 2)`, halves rounded up."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_a, self.conv_b = Convolution(channels, 2 * channels, 3, 2), Convolution(2 * channels, 2 * channels, 3)
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(channels, 2 * channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv_b(self.conv_a(x))


class NB201(cells.CellSpace):
    """A space with one of five operations on each of six edges: 15,625 architectures.

    The network is a stem, three stages of equal cells with a `Reduction` between them, and a classifier. Kernels of 1
    are the centres of those of 3, and share bias and BatchNorm with them.

    Args:
        channels: Channels of the first stage; each further stage has twice as many.
        cells: The number of cells in a stage.
        affine: Give the BatchNorms in cells a gain and a bias, as in the tabulated networks. Otherwise the convolutions
            have a bias, as in the paper's supernet.
    """

    def __init__(
        self,
        channels: int = 16,
        cells: int = 5,
        affine: bool = True,
        num_classes: int = 10,
        image_size: int = 32,
        in_channels: int = 3,
        **options: Any,
    ):
        super().__init__(**options)
        self.input_shape = in_channels, image_size, image_size
        operation = self.choice("operation", OPERATIONS, per=len(EDGES))
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        widths = [channels, 2 * channels, 4 * channels]
        self.stages = nn.ModuleList(
            nn.Sequential(*(Cell(self.partial(width), operation, affine, self.sharing) for _ in range(cells)))
            for width in widths
        )
        self.reductions = nn.ModuleList(map(Reduction, widths[:-1]))
        self.head = nn.Sequential(
            nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(widths[-1], num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        first, second, third = self.stages
        x = self.reductions[0](first(self.stem(x)))
        return self.head(third(self.reductions[1](second(x))))

    def nodes(self) -> list[list[Row]]:
        return cells.into_nodes(self.choices.values(), EDGES)

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.input_shape)

    def to_string(self, architecture: Architecture) -> str:
        """Return the official notation, which lists for each node the operation on every source.

        It reads `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`.

        Raises:
            TangleNASError: The architecture is not of this space.
        """
        self.assignment_of(architecture)
        return _notation(architecture.choices["operation"])

    def from_string(self, text: str) -> Architecture:
        """Return the architecture that the official notation describes.

        Raises:
            TangleNASError: The text is not in this notation, or it has an unknown operation.
        """
        operations = re.findall(r"(\w+)~\d", text)
        if len(operations) != len(EDGES) or _notation(operations) != "".join(text.split()):
            raise TangleNASError(
                f"{text!r} is not an architecture of {self.label}: expected |op~0|+|op~0|op~1|+|op~0|op~1|op~2| "
                f"with the operations {', '.join(OPERATIONS)}"
            )
        for operation in operations:
            if operation not in OPERATIONS:
                raise unknown(f"operation of {self.label}", operation, OPERATIONS)
        return self.architecture(operation=operations)


def _notation(operations: tuple[str, ...] | list[str]) -> str:
    edges = [f"{operation}~{source}|" for operation, (_, source) in zip(operations, EDGES, strict=True)]
    return "+".join(
        "|" + "".join(edge for edge, (n, _) in zip(edges, EDGES, strict=True) if n == node) for node in (1, 2, 3)
    )
