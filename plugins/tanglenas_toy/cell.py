"""The toy cell space on Fashion-MNIST; its authors published a full table (Sukthanker et al. 2023)."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine import Architecture, Choice, Row, Size, TangleNASError, cells, elastic

OPERATIONS = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
EDGES = ((0, "in"), (1, "in"), (1, 0))
"""The edges of a cell, (node, source), in the order of the table's columns."""


FAMILIES: dict[str, type[nn.Module]] = {"sep_conv": cells.Separable, "dil_conv": cells.Dilated}


class Cell(nn.Module):
    """A cell of two nodes and three edges: `(B, channels_in, H, W) -> (B, 2 * channels, H', W')`.

    The output is both nodes.
    """

    def __init__(self, channels_in: int, channels: Size, reduction: bool, choice: Choice, sharing: str):
        super().__init__()
        self.preprocess = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels_in, channels.max, 1, bias=False), nn.BatchNorm2d(channels.max, affine=False)
        )
        self.edges = nn.ModuleList(
            mixed(choice[i], channels, 2 if reduction and source == "in" else 1, sharing)
            for i, (_, source) in enumerate(EDGES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(cells.cell_nodes([self.preprocess(x)], self.edges)[1:], 1)


class ToyCell(cells.CellSpace):
    """A space with an operation on each of three edges, in a normal and in a reduction cell: 4,096 architectures.

    Kernels of 3 are the centres of those of 5, for separable and for dilated convolutions. The network is a
    reduction cell, a normal one and a reduction cell again; both reduction cells follow the same choices.

    Args:
        channels: Channels of the first two cells; the third has twice as many.
        dropout: Dropout behind every cell and in the classifier; 0.2 in the paper.
    """

    table_columns = tuple(f"{cell}_{node}_{source}" for cell in ("normal", "reduce") for node, source in EDGES)

    def __init__(
        self,
        channels: int = 32,
        num_classes: int = 10,
        image_size: int = 28,
        in_channels: int = 1,
        dropout: float = 0.0,
        **options: Any,
    ):
        super().__init__(**options)
        if image_size < 8:
            raise TangleNASError(f"image_size is {image_size}, but three halvings need at least 8 pixels")
        self.input_shape = in_channels, image_size, image_size
        normal, reduce = (self.choice(name, OPERATIONS, per=len(EDGES)) for name in ("normal", "reduce"))
        C = channels
        self.cells = nn.ModuleList([
            Cell(in_channels, self.partial(C), True, reduce, self.sharing),
            Cell(2 * C, self.partial(C), False, normal, self.sharing),
            Cell(2 * C, self.partial(2 * C), True, reduce, self.sharing),
        ])  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        side = (((image_size + 1) // 2 + 1) // 2) // 2  # two reductions, one pooling
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(4 * C * side**2, 128), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(128, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        for cell in self.cells:
            x = self.dropout(cell(x))
        return self.classifier(F.max_pool2d(x, 2))

    def nodes(self) -> list[list[Row]]:
        return cells.into_nodes(self.choices.values(), EDGES)

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.input_shape)

    def to_string(self, architecture: Architecture) -> str:
        """Return the operations of the six edges, separated by commas, in the order of the table's columns."""
        return ", ".join([*architecture.choices["normal"], *architecture.choices["reduce"]])

    def from_string(self, text: str) -> Architecture:
        """Return the architecture of six operations, or of the authors' `Genotype(...)`.

        Raises:
            TangleNASError: The text does not name six of the four operations.
        """
        found = re.findall(r"\w+_conv_\w+", text)
        if len(found) != 2 * len(EDGES):
            raise TangleNASError(
                f"{text!r} names {len(found)} operations, expected {2 * len(EDGES)} such as sep_conv_3x3"
            )
        return self.architecture(normal=found[: len(EDGES)], reduce=found[len(EDGES) :])


def mixed(operation: Size, channels: Size, stride: int, sharing: str) -> elastic.MixedOperation:
    """Return the mixed operation of an edge."""
    families = {
        family: elastic.Family(
            {name: int(name[-1]) for name in OPERATIONS if name.startswith(family)},
            partial(layer, channels, stride=stride),
        )
        for family, layer in FAMILIES.items()
    }
    return elastic.MixedOperation.of(operation, families, sharing, channels)
