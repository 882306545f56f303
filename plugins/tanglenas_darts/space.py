"""The cell space of DARTS (Liu et al., 2019, arXiv:1806.09055, section 3.1 and appendix A)."""

from __future__ import annotations

import itertools
import math
import re
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_darts.training import ScheduledDropPath
from tanglenas_engine import (
    Architecture,
    Assignment,
    Choice,
    Mixture,
    Row,
    Size,
    TangleNASError,
    cells,
    elastic,
)

OPERATIONS = (
    "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
    "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
)  # fmt: skip
NONE = 0
NODES, KEPT = 4, 2
"""Nodes of a cell, and the edges that an architecture has into each of them."""
EDGES = tuple((node, source) for node in range(NODES) for source in range(2 + node))
"""(node, source): sources 0 and 1 are the outputs of the two cells before, then come the nodes."""


class Cell(nn.Module):
    """Four nodes on the outputs of two cells: `2 x (B, C', H', W') -> (B, 4 * channels, H, W)`."""

    def __init__(
        self, inputs: tuple[int, int], channels: Size, choice: Choice, reduction: bool, after_reduction: bool,
        affine: bool, pool_norm: bool, drop_path: float, sharing: str,
    ):  # fmt: skip
        super().__init__()
        first = cells.FactorizedReduce if after_reduction else cells.Pointwise
        width = channels.max
        self.preprocess = nn.ModuleList([first(inputs[0], width, affine), cells.Pointwise(inputs[1], width, affine)])
        self.edges = nn.ModuleList(
            mixed(choice[i], channels, 2 if reduction and source < 2 else 1, affine, pool_norm, sharing)
            for i, (_, source) in enumerate(EDGES)
        )
        self.drop_path = ScheduledDropPath(drop_path)

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        inputs = [layer(x) for layer, x in zip(self.preprocess, (before, last), strict=True)]
        return torch.cat(cells.nodes(inputs, [partial(self._through, edge) for edge in self.edges])[2:], 1)

    def _through(self, edge: nn.Module, x: Tensor) -> Tensor:
        y = edge(x)
        return y if y is x else self.drop_path(y)  # the identity is never dropped


class Darts(cells.CellSpace):
    """Two incoming edges for each of four nodes and an operation on each, in a normal and a reduction cell.

    The supernet has all edges. An architecture chooses an operation for each, `none` where there is no edge; those
    in which a node has not exactly two are none. Kernels of 3 are the centres of those of 5, for separable and for
    dilated convolutions.

    Args:
        channels: Of a node in the first cells; each of the two reductions doubles them.
        layers: Cells, with reductions after one and two thirds of them.
        stem_multiplier: Channels of the stem, as a multiple of `channels`.
        affine: Whether BatchNorms in cells have gain and bias: not in the paper's search, but in its networks.
        pool_norm: Whether a BatchNorm follows a pooling: so in the paper's search, not in its networks.
        drop_path: Probability with which a network loses the output of an edge at the end of its training, 0.2 in
            the paper; it rises from 0. A search drops none.
        image_size: A multiple of 4: two reductions halve the image.
    """

    def __init__(
        self,
        channels: int = 16,
        layers: int = 8,
        stem_multiplier: int = 3,
        affine: bool = False,
        pool_norm: bool = True,
        drop_path: float = 0.0,
        num_classes: int = 10,
        image_size: int = 32,
        in_channels: int = 3,
        **options: Any,
    ):
        super().__init__(**options)
        if image_size % 4:
            raise TangleNASError(f"image_size is {image_size}, but two reductions halve it: choose a multiple of 4")
        self.input_shape = in_channels, image_size, image_size
        normal, reduce = (self.choice(name, OPERATIONS, per=len(EDGES)) for name in ("normal", "reduce"))
        width = stem_multiplier * channels
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.cells = nn.ModuleList()
        before, last, reduced = width, width, False
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            channels *= 2 if reduction else 1
            choice = reduce if reduction else normal
            self.cells.append(
                Cell(
                    (before, last),
                    self.partial(channels),
                    choice,
                    reduction,
                    reduced,
                    affine,
                    pool_norm,
                    drop_path,
                    self.sharing,
                )
            )
            before, last, reduced = last, NODES * channels, reduction
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B, num_classes)`."""
        (last,) = deque(self.features(x), maxlen=1)
        return self.head(last)

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """The outputs of the cells, `(B, 4 * channels, H, W)` each."""
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
            yield last

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.input_shape)

    # Which assignments are architectures.

    @property
    def size(self) -> int:
        cell = math.prod(math.comb(2 + node, KEPT) * (len(OPERATIONS) - 1) ** KEPT for node in range(NODES))
        return cell ** len(self.choices)

    def architecture(self, **choices: Any) -> Architecture:
        architecture = super().architecture(**choices)
        for name, operations in architecture.choices.items():
            for node in range(NODES):
                edges = [o for o, (n, _) in zip(operations, EDGES, strict=True) if n == node and o != OPERATIONS[NONE]]
                if len(edges) != KEPT:
                    raise TangleNASError(
                        f"node {node} of the {name} cell has {len(edges)} edges that are not 'none', expected {KEPT}"
                    )
        return architecture

    def moves(self, assignment: Assignment) -> Iterator[dict[Row, int]]:
        """Another operation on an edge, or an edge from another source instead."""
        for rows in self.nodes():
            for row in (row for row in rows if assignment[row] != NONE):
                for option in range(1, len(OPERATIONS)):
                    if option != assignment[row]:
                        yield {row: option}
                    yield from ({row: NONE, other: option} for other in rows if assignment[other] == NONE)

    def decisions(self) -> Iterator[list[dict[Row, int]]]:
        """Which two edges a node has, and with which operations."""
        for rows in self.nodes():
            absent = dict.fromkeys(rows, NONE)
            yield [
                {**absent, **dict(zip(kept, picks, strict=True))}
                for kept in itertools.combinations(rows, KEPT)
                for picks in itertools.product(range(1, len(OPERATIONS)), repeat=KEPT)
            ]

    def scores(self, mixture: Mixture) -> dict[Row, list[float]]:
        """The log-probability of each operation; `none` has no say in which edges are kept."""
        return {row: [0.0, *scores[1:]] for row, scores in super().scores(mixture).items()}

    def nodes(self) -> list[list[Row]]:
        return cells.into_nodes(self.choices.values(), EDGES)

    # Their usual notation.

    def to_string(self, architecture: Architecture) -> str:
        """`Genotype(normal=[(operation, source), ...], normal_concat=range(2, 6), reduce=..., reduce_concat=...)`.

        Raises:
            TangleNASError: The architecture is not of this space.
        """
        self.assignment_of(architecture)
        fields = []
        for name, operations in architecture.choices.items():
            edges = [(o, source) for o, (_, source) in zip(operations, EDGES, strict=True) if o != OPERATIONS[NONE]]
            fields += [f"{name}={edges}", f"{name}_concat=range(2, 6)"]
        return f"Genotype({', '.join(fields)})"

    def from_string(self, text: str) -> Architecture:
        """The architecture of such a text; the two edges of a node may come in any order.

        Raises:
            TangleNASError: It is none, or has an operation or a source that there is not.
        """
        concat = r"(?:range\(2, ?6\)|\[2, ?3, ?4, ?5\])"
        cells = [rf"{name} ?= ?\[(.*)\], *{name}_concat ?= ?{concat}" for name in self.choices]
        found = re.fullmatch(rf"\s*Genotype\({', *'.join(cells)}\)\s*", text)
        listed = [re.findall(r"""\( ?["'](\w+)["'], ?(\d+) ?\)""", cell) for cell in found.groups()] if found else []
        choices = {}
        for name, edges in zip(self.choices, listed, strict=False):
            operations = dict.fromkeys(EDGES, OPERATIONS[NONE])
            operations.update(((place // KEPT, int(source)), o) for place, (o, source) in enumerate(edges))
            if len(edges) == KEPT * NODES and len(operations) == len(EDGES):
                choices[name] = list(operations.values())
        if choices.keys() != self.choices.keys():
            raise TangleNASError(
                f"{text!r} is not an architecture of {self.label}: expected Genotype(normal=[('sep_conv_3x3', 0), "
                "...], normal_concat=range(2, 6), reduce=[...], reduce_concat=range(2, 6)) with two edges (operation, "
                "source) for each of four nodes, from sources before it"
            )
        return self.architecture(**choices)


def mixed(
    operation: Size, channels: Size, stride: int, affine: bool, pool_norm: bool, sharing: str
) -> elastic.MixedOperation:
    """The mixed operation of an edge."""
    families: dict[str, elastic.Family] = {
        "none": ({"none": 1}, lambda _: cells.Nothing(stride)),
        "max_pool_3x3": ({"max_pool_3x3": 3}, lambda _: cells.pool("max", channels, stride, pool_norm)),
        "avg_pool_3x3": ({"avg_pool_3x3": 3}, lambda _: cells.pool("avg", channels, stride, pool_norm)),
        "skip_connect": ({"skip_connect": 1}, lambda _: cells.skip(channels, stride, affine)),
        "sep_conv": (
            {"sep_conv_3x3": 3, "sep_conv_5x5": 5},
            partial(cells.Separable, channels, stride=stride, affine=affine),
        ),
        "dil_conv": (
            {"dil_conv_3x3": 3, "dil_conv_5x5": 5},
            partial(cells.Dilated, channels, stride=stride, affine=affine),
        ),
    }
    return elastic.MixedOperation.of(operation, families, sharing, channels)
