"""Elastic multi-head self-attention."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.elastic.linear import Linear
from tanglenas_engine.superposition.size import Size, stacked


class Attention(Elastic):
    """Self-attention whose heads are slices of a fixed head dimension: `(B, N, width) -> (B, N, width)`.

    Parameter names and shapes are those of timm's `Attention` with `attn_head_dim`. Heads are independent
    units: `sum_h P(heads > h) head_h` behind the output projection is the exact expectation, so a mixture
    covers them once, where the projection reads them.
    Differs from the paper's code, which covers them three times (kept as `relaxation="paper"`) and pads the
    concatenation of q, k and v at its end, so that rows land in the wrong third (kept nowhere).

    Args:
        causal: Whether a position sees only those before it.
        relative_position: A module called as `(q, k, v)`, each `(B, H, N, head_dim)`, in place of plain
            scaled dot-product attention.
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
        self.qkv = Linear(width, stacked(heads * head_dim, 3), qkv_bias)
        self.proj = Linear(heads * head_dim, width, proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position = relative_position
        self.heads = heads
        self.declare(role="again", heads=(heads, None))

    def forward(self, x: Tensor) -> Tensor:
        # (B, N, 3 * H * D) -> 3 x (B, H, N, D); the number of heads follows from what the projection gave.
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
        # q k^T and the weighted sum of v for every pair of tokens, and as much again for relative positions.
        batch, tokens = output.shape[:2]
        products = 2 if self.relative_position is None else 4
        return [(products * batch * tokens * tokens * self.head_dim, (self.heads,))]
