"""Elastic LayerNorm and BatchNorm2d, exact at the corners."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Dimension, Elastic
from tanglenas_engine.size import Assignment, Axis


class LayerNorm(Elastic, nn.LayerNorm):
    """`nn.LayerNorm` over an elastic last dimension: `(*, width) -> (*, width)`.

    Under a mixture with coverage `c` the statistics are weighted by it, `mean = sum(c x) / sum(c)` and
    `var = sum(c (x - mean)^2) / sum(c)`, and gain and bias are covered.
    Differs from the paper's code, whose statistics run over the full width, zeros of the tail included; that
    form is `relaxation="paper"`.
    """

    def __init__(self, width: Dimension, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True):
        axis = Axis.of(width, "write")
        nn.LayerNorm.__init__(self, axis.length, eps, elementwise_affine, bias)
        self.declare(weight=(axis,), bias=(axis,))
        self.declare(role="statistics", statistics=(width,))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.current("weight"), self.current("bias")
        coverage = self.masks("statistics")
        if coverage:
            (c,) = coverage
            count = c.sum()
            x = x - (x * c).sum(-1, keepdim=True) / count
            x = x * ((x.square() * c).sum(-1, keepdim=True) / count + self.eps).rsqrt()
            x = x if weight is None else x * weight
            x = x if bias is None else x + bias
        else:
            x = F.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)
        return x if self.elementwise_affine else self.covered("weight", x)

    def plain(self, assignment: Assignment) -> nn.LayerNorm:
        width = self.axes["weight"][0].entries(assignment)
        return nn.LayerNorm(width, self.eps, self.elementwise_affine, self.bias is not None)


class BatchNorm2d(Elastic, nn.BatchNorm2d):
    """`nn.BatchNorm2d` over elastic channels: `(B, C, H, W) -> (B, C, H, W)`.

    Normalising a channel removes any factor in front of it, so the coverage is applied behind: to gain and
    bias, or to the output where there are none.
    """

    def __init__(
        self,
        num_features: Dimension,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        axis = Axis.of(num_features, "write")
        nn.BatchNorm2d.__init__(self, axis.length, eps, momentum, affine, track_running_stats)
        self.declare(weight=(axis,), bias=(axis,))
        self.declare(role="buffer", running_mean=(num_features,), running_var=(num_features,))
        self.declare(output=(None, axis, None, None))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected a (B, C, H, W) input, got {tuple(x.shape)}")
        momentum = 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            # Without a momentum the running statistics are the plain average over batches.
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        x = F.batch_norm(
            x,
            self.current("running_mean"),
            self.current("running_var"),
            self.current("weight"),
            self.current("bias"),
            self.training or self.running_mean is None,
            momentum,
            self.eps,
        )
        return x if self.affine else self.covered("output", x)

    def plain(self, assignment: Assignment) -> nn.BatchNorm2d:
        channels = self.axes["output"][1].entries(assignment)
        return nn.BatchNorm2d(channels, self.eps, self.momentum, self.affine, self.track_running_stats)
