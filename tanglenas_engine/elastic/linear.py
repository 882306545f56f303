"""Elastic Linear and Embedding layers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Dimension, Elastic
from tanglenas_engine.elastic.masked import LinearProduct, masked
from tanglenas_engine.superposition.size import Assignment, Axis, Size


class Linear(Elastic, nn.Linear):
    """`nn.Linear` with elastic features: `(*, in_features) -> (*, out_features)`.

    Attributes:
        positions: The part of the number of positions `*` that varies, such as the channels where a layer mixes tokens.
            Costs are counted with it.
    """

    positions: Size = Size.of(1)

    def __init__(self, in_features: Dimension, out_features: Dimension, bias: bool = True):
        inputs, outputs = Axis.of(in_features, "read"), Axis.of(out_features, "write")
        nn.Linear.__init__(self, inputs.length, outputs.length, bias)
        self.declare(weight=(outputs, inputs), bias=(outputs,))

    def forward(self, x: Tensor) -> Tensor:
        weight, factors = self.unmasked("weight")
        assert weight is not None
        return masked(LinearProduct(), x, weight, self.current("bias"), factors)

    def plain(self, assignment: Assignment) -> nn.Linear:
        outputs, inputs = (axis.entries(assignment) for axis in self.axes["weight"])
        return nn.Linear(inputs, outputs, self.bias is not None)

    def macs(self, output: Any) -> list[tuple[int, tuple[Size, ...]]]:
        outputs, inputs = self.axes["weight"]
        tokens = output.numel() // output.shape[-1] // self.positions.max
        return [(tokens * outputs.blocks * inputs.blocks, (outputs.size, inputs.size, self.positions))]


class Embedding(Elastic, nn.Embedding):
    """`nn.Embedding` with an elastic dimension: `(*) -> (*, embedding_dim)`."""

    def __init__(self, num_embeddings: int, embedding_dim: Dimension):
        columns = Axis.of(embedding_dim, "write")
        nn.Embedding.__init__(self, num_embeddings, columns.length)
        self.declare(weight=(None, columns), output=(columns,))

    def forward(self, indices: Tensor) -> Tensor:
        table = self.weight if self.assignment is None else self.sliced("weight", self.assignment)
        # Masking the rows that were looked up gives the same as masking the table, and costs less.
        return self.covered("output", F.embedding(indices, table, self.padding_idx))

    def plain(self, assignment: Assignment) -> nn.Embedding:
        return nn.Embedding(self.num_embeddings, self.axes["output"][0].entries(assignment), self.padding_idx)
