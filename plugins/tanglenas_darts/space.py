"""The cell space of DARTS (Liu et al., 2019, arXiv:1806.09055, section 3.1 and appendix A)."""

from __future__ import annotations

import ast
import itertools
import math
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
"""The number of nodes of a cell, and of the edges that an architecture keeps into each node."""
EDGES = tuple((node, source) for node in range(NODES) for source in range(2 + node))
"""The edges as (node, source). Sources 0 and 1 are the outputs of the two cells before; source 2 + n is node n."""


class Cell(nn.Module):
    """A cell of four nodes on the outputs of two cells: `2 x (B, C', H', W') -> (B, 4 * channels, H, W)`."""

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
        return torch.cat(cells.cell_nodes(inputs, [partial(self._through, edge) for edge in self.edges])[2:], 1)

    def _through(self, edge: nn.Module, x: Tensor) -> Tensor:
        y = edge(x)
        return y if y is x else self.drop_path(y)  # the identity is never dropped


class Darts(cells.CellSpace):
    """A normal and a reduction cell, with two edges into each of four nodes and an operation on each edge.

    The supernet has all 14 edges of a cell. An architecture gives each edge an operation, and an absent edge `none`.
    An assignment is an architecture if exactly two edges into every node are present. Kernels of 3 are the centres of
    those of 5, for separable and for dilated convolutions.

    Args:
        channels: Channels of a node in the first cells; each of the two reductions doubles them.
        layers: The number of cells; reduction cells stand after one third and two thirds of them.
        stem_multiplier: Channels of the stem, as a multiple of `channels`.
        affine: Give the BatchNorms in cells a gain and a bias. The paper's search does not; its final networks do.
        pool_norm: Put a BatchNorm behind every pooling. The paper's search does; its final networks do not.
        drop_path: Probability of dropping the output of an edge at the end of a network's training, 0.2 in the paper.
            The probability rises from 0. A search drops nothing.
        image_size: Height and width of the images: a multiple of 4, because two reductions halve them.
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
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        (last,) = deque(self.features(x), maxlen=1)
        return self.head(last)

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the output of each cell, `(B, 4 * channels, H, W)`."""
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
            yield last

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.input_shape)

    # The set of architectures.

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
        """Yield the changes of one edge: another operation, or another source of the same node."""
        for rows in self.nodes():
            for row in (row for row in rows if assignment[row] != NONE):
                for option in range(1, len(OPERATIONS)):
                    if option != assignment[row]:
                        yield {row: option}
                    yield from ({row: NONE, other: option} for other in rows if assignment[other] == NONE)

    def decisions(self) -> Iterator[list[dict[Row, int]]]:
        """Yield for each node its alternatives: every pair of edges with every pair of operations."""
        for rows in self.nodes():
            absent = dict.fromkeys(rows, NONE)
            yield [
                {**absent, **dict(zip(kept, picks, strict=True))}
                for kept in itertools.combinations(rows, KEPT)
                for picks in itertools.product(range(1, len(OPERATIONS)), repeat=KEPT)
            ]

    def has_score(self, row: Row, option: int) -> bool:
        """Return whether an option is an operation: absent edges have no score."""
        return option != NONE

    def nodes(self) -> list[list[Row]]:
        return cells.into_nodes(self.choices.values(), EDGES)

    # The usual notation of architectures.

    def to_string(self, architecture: Architecture) -> str:
        """Return the notation of DARTS.

        It is `Genotype(normal=[(operation, source), ...], normal_concat=range(2, 6), reduce=..., reduce_concat=...)`.

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
        """Return the architecture that the notation of DARTS describes; the two edges of a node may come in any order.

        Raises:
            TangleNASError: The text is not in this notation, or it has an unknown operation or source.
        """
        fields, choices = _fields(text), {}
        for name in self.choices:
            edges = fields.get(name, [])
            if fields.get(f"{name}_concat") != [2, 3, 4, 5] or not all(map(_is_edge, edges)):
                continue
            operations = dict.fromkeys(EDGES, OPERATIONS[NONE])
            operations.update(((place // KEPT, source), o) for place, (o, source) in enumerate(edges))
            if len(edges) == KEPT * NODES and len(operations) == len(EDGES):
                choices[name] = list(operations.values())
        if choices.keys() != self.choices.keys() or len(fields) != 2 * len(choices):
            raise TangleNASError(
                f"{text[:1000]!r} is not an architecture of {self.label}: expected "
                "Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6), reduce=[...], "
                "reduce_concat=range(2, 6)) with two edges (operation, source) for each of four nodes, from sources "
                "before it"
            )
        return self.architecture(**choices)


def _fields(text: str) -> dict[str, list[Any]]:
    """Return the lists in a `Genotype(...)` by name, as Python reads it over any number of lines.

    Any other text gives no lists.
    """
    try:
        call = ast.parse(text.strip()[:10_000], mode="eval").body  # such a text has 600 characters
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Genotype"):
            return {}
        fields = {str(field.arg): _listed(field.value) for field in call.keywords}
        return fields if len(fields) == len(call.keywords) and not call.args else {}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return {}


def _listed(value: ast.expr) -> list[Any]:
    """Return the entries of a list, a tuple or `range(start, end)`."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "range":
        start, end = map(ast.literal_eval, value.args)
        return list(range(start, min(end, start + 10)))
    return list(ast.literal_eval(value))


def _is_edge(edge: Any) -> bool:
    return isinstance(edge, tuple) and [type(part) for part in edge] == [str, int]


def mixed(
    operation: Size, channels: Size, stride: int, affine: bool, pool_norm: bool, sharing: str
) -> elastic.MixedOperation:
    """Return the mixed operation of an edge."""
    families = {
        "none": elastic.Family({"none": 1}, lambda _: cells.Zero(stride)),
        "max_pool_3x3": elastic.Family({"max_pool_3x3": 3}, lambda _: cells.pool("max", channels, stride, pool_norm)),
        "avg_pool_3x3": elastic.Family({"avg_pool_3x3": 3}, lambda _: cells.pool("avg", channels, stride, pool_norm)),
        "skip_connect": elastic.Family({"skip_connect": 1}, lambda _: cells.skip(channels, stride, affine)),
        "sep_conv": elastic.Family(
            {"sep_conv_3x3": 3, "sep_conv_5x5": 5},
            partial(cells.Separable, channels, stride=stride, affine=affine),
        ),
        "dil_conv": elastic.Family(
            {"dil_conv_3x3": 3, "dil_conv_5x5": 5},
            partial(cells.Dilated, channels, stride=stride, affine=affine),
        ),
    }
    return elastic.MixedOperation.of(operation, families, sharing, channels)
