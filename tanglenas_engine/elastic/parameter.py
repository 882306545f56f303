"""An elastic parameter that is no layer's weight: a class token, position embeddings, the gain of a LayerScale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.superposition.size import Size


class Parameter(Elastic):
    """A parameter with elastic dimensions. A call returns it for the next operation: `() -> shape`.

        self.token = elastic.Parameter(1, 1, width)  # x = torch.cat([self.token().expand(len(x), -1, -1), x], 1)
        self.scale = elastic.Parameter(width, init=1e-5)  # x = x + self.scale() * self.block(x)

    The tensor is named `weight`: `token.weight` in a `state_dict`. A module that must keep a parameter under its own
    name, as timm's `cls_token`, derives from `Elastic` and declares it: `self.declare(cls_token=(None, None, width))`.

    Args:
        shape: The dimensions. A mixture covers those that vary.
        init: The number that fills the parameter at the start, or a function that fills a tensor in place. By default,
            numbers are drawn as a vision transformer's tokens are: normal, with standard deviation 0.02.
    """

    def __init__(self, *shape: Size | int, init: float | Callable[[Tensor], object] | None = None):
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty([Size.of(size).max for size in shape]))
        self.declare(weight=shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if callable(self.init):
            self.init(self.weight)
        elif self.init is None:
            nn.init.trunc_normal_(self.weight, std=0.02)
        else:
            nn.init.constant_(self.weight, self.init)

    def forward(self) -> Tensor:
        weight = self.current("weight")
        assert weight is not None
        return weight
