"""Elastic attention with fewer heads of keys and values than of queries, to itself or to a context."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.elastic.linear import Linear
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.size import Axis, Size, divided


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): `(B, H, N, D) -> (B, H, N, D)`, for an even D.

    Entries i and i + D/2 of a head at position n turn by the angle `n * base ** (-2 i / D)`, as in Llama.
    """

    def __init__(self, base: float = 10000.0):
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[-2:]
        precision = x.dtype if x.dtype == torch.float64 else torch.float32  # angles of long texts need it
        index = torch.arange(0, width, 2, dtype=precision, device=x.device)
        positions = torch.arange(tokens, dtype=precision, device=x.device)
        # The order of operations is that of `transformers`, for equal bits.
        angles = positions[:, None] * (1.0 / self.base ** (index / width))  # (N, D / 2)
        cos, sin = angles.cos(), angles.sin()
        x, given = x.to(precision), x.dtype
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(given)


class GroupedAttention(Elastic):
    """Grouped-query attention to x itself or to a context: `(B, N, width) -> (B, N, width)`.

    Query head i reads the keys and values of head `i // group`, where `group = num_heads / num_kv_heads` (Ainslie et
    al. 2023, arXiv:2305.13245). Parameter names and shapes are those of Llama in `transformers`. Query heads are
    independent given keys and values, so a mixture covers them once, at the input of `o_proj`.

    Args:
        width: The number of input and output features.
        num_heads: The number of query heads.
        num_kv_heads: The number of heads of keys and values. It grows with `num_heads`, so that the size of a group is
            fixed and the first query heads read the first heads of keys; or it is 1.
        head_dim: The dimension of one head.
        context_width: The number of features of the context; None for attention of x to itself.
        bias: True if the projections have a bias.
        dropout: The dropout probability of attention weights.
        causal: True if a position attends only to itself and earlier positions.
        rotary: A module that turns queries and keys by their positions, such as `Rotary()`.

    Raises:
        TangleNASError: The heads do not divide into the heads of keys, or the size of a group varies.
    """

    def __init__(
        self,
        width: Size | int,
        num_heads: Size | int,
        num_kv_heads: Size | int,
        head_dim: int,
        context_width: Size | int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        causal: bool = False,
        rotary: nn.Module | None = None,
    ):
        super().__init__()
        heads, kv_heads = Size.of(num_heads), Size.of(num_kv_heads)
        if len(set(divided(heads, kv_heads).values)) > 1 and set(kv_heads.values) != {1}:
            raise TangleNASError(
                f"the query heads of one head of keys are fixed in number, but {heads!r} to {kv_heads!r} are not: let "
                "both grow together, as in num_heads=kv * 4, or use one head of keys"
            )
        source = width if context_width is None else context_width
        # Query heads may change places among those that read the same keys, or together with their keys.
        unit = head_dim if set(kv_heads.values) == {1} else head_dim * divided(heads, kv_heads).max
        queries = Axis(heads * head_dim, role="unit", unit=unit)
        keys = Axis(kv_heads * head_dim, role="unit", unit=head_dim)
        self.heads, self.head_dim, self.dropout, self.causal = heads, head_dim, dropout, causal
        self.q_proj = Linear(width, queries, bias)
        self.k_proj = Linear(source, keys, bias)
        self.v_proj = Linear(source, keys, bias)
        self.o_proj = Linear(Axis(heads * head_dim, unit=unit), width, bias)
        self.rotary = rotary
        self._keys = 0  # the number of tokens that `macs` counts

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            projection(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, N, D)
            for projection, tokens in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        if x.is_meta:  # where costs are counted
            self._keys = k.shape[2]
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.o_proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def macs(self, output: Any) -> list[tuple[int, tuple[Size, ...]]]:
        batch, tokens = output.shape[:2]
        return [(2 * batch * tokens * self._keys * self.head_dim, (self.heads,))]
