"""Elastic multi-head attention under torch's names."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.elastic.linear import Linear
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.size import Assignment, Axis, Size, divided, stacked


class MultiheadAttention(Elastic, nn.MultiheadAttention):
    """`nn.MultiheadAttention` of elastic width: `(N, B, width) -> (N, B, width)` and the attention weights.

    In torch the heads divide the width. Here the dimension of a head is fixed, so that the first heads are the first
    features, and the number of heads grows with the width. A mixture covers the heads once, at the input of `out_proj`.
    The attention weights are an average over all heads of the largest network.

    Args:
        embed_dim: The number of input and output features.
        num_heads: The number of heads, `embed_dim // head_dim`.
        dropout: The dropout probability of attention weights.
        bias: True if the projections have a bias.
        batch_first: True if inputs are `(B, N, width)`.

    Raises:
        TangleNASError: The width does not divide into the heads, or the dimension of a head varies.
    """

    def __init__(
        self,
        embed_dim: Size | int,
        num_heads: Size | int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
    ):
        width, heads = Size.of(embed_dim), Size.of(num_heads)
        if len(set(divided(width, heads).values)) > 1:
            raise TangleNASError(
                f"the dimension of a head is fixed, but that of {heads!r} heads of {width!r} features is not: let the "
                "number of heads grow with the width, as in MultiheadAttention(width, width // 8)"
            )
        nn.MultiheadAttention.__init__(self, width.max, heads.max, dropout, bias, batch_first=batch_first)
        self.out_proj = Linear(width, width, bias)  # type: ignore[assignment]
        self._reset_parameters()
        self.heads = heads
        packed = stacked(width, 3, unit=self.head_dim)
        self.declare(in_proj_weight=(packed, Axis.of(width, "read")), in_proj_bias=(packed,))
        self._counted = (0, 0, 0)  # the numbers of queries, of keys and of pairs that `macs` counts

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and the attention weights, with torch's arguments.

        The weights are None unless `need_weights`.
        """
        swap = self.batch_first and query.dim() == 3
        if swap:
            # Equal inputs stay one tensor, which torch then projects at once.
            swapped = {id(tensor): tensor.transpose(0, 1) for tensor in (query, key, value)}
            query, key, value = (swapped[id(tensor)] for tensor in (query, key, value))
        if query.is_meta:  # where costs are counted
            queries, keys = (tensor.numel() // tensor.shape[-1] for tensor in (query, key))
            self._counted = (queries, keys, queries * len(key))
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            query.shape[-1],
            self.num_heads if self.assignment is None else self.heads.value(self.assignment),
            self.current("in_proj_weight"),
            self.current("in_proj_bias"),
            None,
            None,
            False,
            self.dropout,
            self.out_proj.current("weight"),  # type: ignore[operator]
            self.out_proj.current("bias"),  # type: ignore[operator]
            self.training,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (output.transpose(0, 1) if swap else output), weights

    def plain(self, assignment: Assignment) -> nn.MultiheadAttention:
        _, inputs = self.axes["in_proj_weight"]
        return nn.MultiheadAttention(
            inputs.entries(assignment),
            self.heads.value(assignment),
            self.dropout,
            self.in_proj_bias is not None,
            batch_first=self.batch_first,
        )

    def macs(self, output: Any) -> list[tuple[int, tuple[Size, ...]]]:
        width = self.axes["in_proj_weight"][1].size
        queries, keys, pairs = self._counted
        # Projections of q and of the output, those of k and v, and for each pair the logit and the weighted sum of v.
        return [(2 * queries + 2 * keys, (width, width)), (2 * pairs, (width,))]
