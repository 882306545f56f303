"""Elastic multi-head self-attention."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.elastic.linear import Linear
from tanglenas_engine.superposition.size import Size, stacked


class Attention(Elastic):
    """Self-attention with an elastic number of heads of fixed dimension: `(B, N, width) -> (B, N, width)`.

    Parameter names and shapes are those of timm's `Attention` with `attn_head_dim`. Heads are independent, so
    `sum_h P(heads > h) head_h` behind the output projection is the exact expectation. So a mixture covers the heads
    once, at the input of the projection.

    Differs from the paper's code in two ways. The paper's code covers the heads three times; `relaxation="paper"` keeps
    this. It also pads the concatenation of q, k and v at its end, which puts rows into the wrong third; no relaxation
    keeps this.

    Args:
        width: The number of input and output features.
        num_heads: The number of heads.
        head_dim: The dimension of one head.
        qkv_bias: True if the projection to q, k and v has a bias.
        proj_bias: True if the output projection has a bias.
        attn_drop: The dropout probability of attention weights.
        proj_drop: The dropout probability of the output.
        causal: True if a position attends only to itself and earlier positions.
        relative_position: A module that is called as `(q, k, v)`, each `(B, H, N, head_dim)`, and replaces scaled
            dot-product attention.
    """

    def __init__(
        self,
        width: Size | int,
        num_heads: Size | int,
        head_dim: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        causal: bool = False,
        relative_position: nn.Module | None = None,
    ):
        super().__init__()
        heads = Size.of(num_heads)
        self.head_dim, self.causal, self.attn_drop = head_dim, causal, attn_drop
        self.qkv = Linear(width, stacked(heads * head_dim, 3, unit=head_dim), qkv_bias)
        self.proj = Linear(heads * head_dim, width, proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position = relative_position
        self.heads = heads
        self.declare(role="again", heads=(heads, None))

    def forward(self, x: Tensor) -> Tensor:
        # (B, N, 3 * H * D) -> 3 x (B, H, N, D); the size of the projection's output gives the number of heads H.
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = self.covered("heads", qkv).permute(2, 0, 3, 1, 4).unbind(0)
        if self.relative_position is not None:
            x = self.relative_position(q, k, v)
        else:
            dropout = self.attn_drop if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        x = x.transpose(1, 2).flatten(2)  # (B, N, H * D)
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]

    def macs(self, output: Any) -> list[tuple[int, tuple[Size, ...]]]:
        # Each pair of tokens costs q k^T and the weighted sum of v. Relative positions cost the same again.
        batch, tokens = output.shape[:2]
        products = 2 if self.relative_position is None else 4
        return [(products * batch * tokens * tokens * self.head_dim, (self.heads,))]
