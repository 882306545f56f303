"""Elastic attention whose heads partition the width, as in GPT-2 and the paper's GPT space."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine import Assignment, Axis, Size, TangleNASError, combinations, elastic, stacked


class PartitionedAttention(elastic.Elastic):
    """A causal self-attention whose head dimension is `width / heads`: `(B, T, width) -> (B, T, width)`.

    The number of heads changes no weight here, only how the rows of q, k and v are grouped. So no mask on a weight can
    mix it. q, k and v are projected once, and the mixture is over the attention itself,

        y = proj( sum_{e,h} p(e) p(h) pad(attention with h heads over the first e of q, k and v) ),

    its exact expectation given q, k and v. Two pairs (e, h) with the same head dimension d share their heads. So the
    sum takes one attention for each distinct d, over the largest e that has it, and multiplies row i of its output by
    `P(head dimension = d and width > i)` (relaxation "gated": by the product of the two probabilities). At a corner one
    attention has weight 1, on the rows below the width. A mixture covers heads once, as in `elastic.Attention`.

    `relaxation="paper"` runs one attention for each h, as the authors do. There q, k and v are each a sum over e of
    padded heads, scaled by the padded head dimension (arXiv:2312.10440, appendix). It is exact at no corner below the
    largest.
    """

    def __init__(self, width: Size | int, num_heads: Size | int, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.width, self.heads = Size.of(width), Size.of(num_heads)
        head_dim = self.width.map(_divided, self.heads)
        self.num_heads, self.dropout = self.heads.max, dropout
        # Which entries form a head depends on their place, so they never move.
        self.qkv = elastic.Linear(width, stacked(width, 3, unit=None), bias)
        self.proj = elastic.Linear(Axis(self.width, role="unit", unit=None), width, bias)
        self.proj_drop = nn.Dropout(dropout)
        self._widths: dict[int, int] = {}  # the largest width for each head dimension
        for picks in combinations(head_dim.rows):
            d = head_dim.value(picks)
            self._widths[d] = max(self._widths.get(d, 0), self.width.value(picks))
        self.declare(role="read", dims=(Axis(head_dim, layout="value"), self.width))
        pairs = (Axis(size, layout="value", role="again") for size in (self.heads, self.width))
        self.declare(pairs=tuple(pairs))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)  # (B, T, 3 * width)
        pairs, dims = ([factor.whole() for factor in self.factors(name)] for name in ("pairs", "dims"))
        if self.assignment is not None:
            y = self._attention(qkv.unflatten(-1, (3, self.heads.value(self.assignment), -1)))
            y = math.prod([*pairs, *dims], start=y)
        elif pairs:
            y = self._as_published(qkv, math.prod(pairs))
        elif dims:
            y = self._expected(qkv, math.prod(dims))
        else:
            y = self._attention(qkv.unflatten(-1, (3, self.num_heads, -1)))
        return self.proj_drop(self.proj(y))

    def _attention(self, qkv: Tensor) -> Tensor:
        """Attend: `(B, T, 3, H, D) -> (B, T, H * D)`."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return x.transpose(1, 2).flatten(2)

    def _expected(self, qkv: Tensor, coverage: Tensor) -> Tensor:
        """Sum the attentions of all head dimensions, with `coverage` `(head dimensions, width)`."""
        qkv = qkv.unflatten(-1, (3, -1))
        outputs = []
        for d, covered in zip(sorted(self._widths), coverage.expand(-1, qkv.shape[-1]), strict=True):
            width = self._widths[d]
            y = self._attention(qkv[..., :width].unflatten(-1, (-1, d))) * covered[:width]
            outputs.append(F.pad(y, (0, qkv.shape[-1] - width)))
        return sum(outputs[1:], outputs[0])

    def _as_published(self, qkv: Tensor, probabilities: Tensor) -> Tensor:
        """Sum the attentions of all numbers of heads, with `probabilities` `(numbers of heads, widths)`."""
        qkv = qkv.unflatten(-1, (3, -1))
        heads, widths = (sorted(set(size.values)) for size in (self.heads, self.width))
        total = qkv.new_zeros(())
        for h, row in zip(heads, probabilities.expand(len(heads), len(widths)), strict=True):
            superposed = qkv.new_zeros(())
            for e, p in zip(widths, row, strict=True):
                part = qkv[..., :e].unflatten(-1, (h, -1))
                superposed = superposed + p * F.pad(part, (0, (qkv.shape[-1] - e) // h))
            total = total + self._attention(superposed)
        return total

    def plain(self, assignment: Assignment) -> nn.Module:
        attention: Any = elastic.copied(self, assignment)
        attention.num_heads = self.heads.value(assignment)
        return attention

    def macs(self, output: Any) -> list[tuple[int, tuple[Size, ...]]]:
        batch, tokens = output.shape[:2]
        return [(2 * batch * tokens * tokens, (self.width,))]


def _divided(width: float, heads: float) -> int:
    if width % heads:
        raise TangleNASError(
            f"{heads} heads do not partition a width of {width}: choose numbers of heads that divide every width, or "
            "heads of a fixed dimension (heads='slices')"
        )
    return int(width // heads)
