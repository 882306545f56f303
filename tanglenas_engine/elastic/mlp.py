"""An elastic MLP with a gate."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.elastic.linear import Linear
from tanglenas_engine.superposition.size import Axis, Size


class GatedMLP(Elastic):
    """A gated linear unit, `fc2(activation(fc1_g(x)) * fc1_x(x))`: `(*, width) -> (*, out_width)`.

    With SiLU it is SwiGLU (Shazeer 2020, arXiv:2002.05202), with GELU GEGLU, with a sigmoid GLU. Parameter names and
    shapes are those of timm's `SwiGLU`. Hidden units are independent, so a mixture covers them once, at the input of
    `fc2`: this is the exact expectation over the hidden width.

    Args:
        width: The number of input features.
        hidden: The number of hidden features.
        out_width: The number of output features; None is `width`.
        activation: The function of the gate.
        bias: True if the three projections have a bias.
    """

    def __init__(
        self,
        width: Size | int,
        hidden: Size | int,
        out_width: Size | int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = True,
    ):
        super().__init__()
        units = Axis(Size.of(hidden), role="unit")
        self.activation = activation
        self.fc1_g = Linear(width, units, bias)
        self.fc1_x = Linear(width, units, bias)
        self.fc2 = Linear(hidden, width if out_width is None else out_width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1_g(x)) * self.fc1_x(x))  # type: ignore[no-any-return]
