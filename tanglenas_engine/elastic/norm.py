"""Elastic LayerNorm and BatchNorm2d. At a one-hot mixture they compute exactly what the sliced layers compute."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.elastic import fused_norm
from tanglenas_engine.elastic.base import Dimension, Elastic
from tanglenas_engine.elastic.masked import without_autocast
from tanglenas_engine.superposition.size import Assignment, Axis


def weighted_layer_norm(x: Tensor, coverage: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return the layer norm of x, `(*, width)`, with statistics weighted by `coverage`, `(width,)`."""
    fused = fused_norm.fuses(x, coverage)
    x = x if fused else x.to(coverage.dtype)
    return _WeightedLayerNorm.apply(x, coverage, weight, bias, eps, fused)  # type: ignore[no-any-return]


class _WeightedLayerNorm(torch.autograd.Function):
    """A layer norm that saves the same for backward as torch's: the input, and mean and deviation per position."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, coverage: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, fused: bool
    ) -> Tensor:
        ctx.eps, ctx.fused = eps, fused
        if fused:
            y, mean, scale = fused_norm.forward(x, coverage, weight, bias, eps)
            ctx.save_for_backward(x, coverage, weight, mean, scale)
            return y
        with without_autocast(x.device.type):
            centred, mean, scale = _statistics(x, coverage, eps)
        ctx.save_for_backward(x, coverage, weight, mean, scale)
        # The last operation makes a new tensor. An output that was overwritten has no gradient in code that torch up to
        # 2.11 compiles.
        y = centred * scale if weight is None and bias is None else centred.mul_(scale)
        if weight is not None and bias is not None:
            return torch.addcmul(bias, y, weight)
        if weight is not None:
            return y * weight
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradients of x, coverage, weight and bias.

        Let y = (x - mean) * scale, let g be its gradient, and let s = sum(g) and t = sum(g y) over the width of a
        position. Then:

            dx = scale * (g - c/n * (s + t y))
            dc = sum over positions of -1/n * (s y + t/2 (y^2 - var * scale^2))
        """
        (dy,) = gradients
        x, c, weight, mean, scale = ctx.saved_tensors
        need_x, need_c, need_weight, need_bias, *_ = ctx.needs_input_grad
        if ctx.fused and not torch.is_grad_enabled():
            found = fused_norm.backward(dy, x, c, weight, mean, scale, ctx.eps)
            needs = (need_x, need_c, need_weight, need_bias)
            return *(gradient if needed else None for gradient, needed in zip(found, needs, strict=True)), None, None
        with without_autocast(x.device.type):
            x = x.to(c.dtype)
            if torch.is_grad_enabled():  # second derivatives need the statistics as functions of x and c
                _, mean, scale = _statistics(x, c, ctx.eps)
            y = torch.addcmul(-mean * scale, x, scale)
            gain = c.new_ones(c.shape) if weight is None else weight
            product, n = dy * y, c.sum()
            s, t = (dy @ gain)[..., None], (product @ gain)[..., None]
            dx = dc = None
            if need_x:
                dx = torch.addcmul(s, t, y).mul_(-c / n).addcmul_(dy, gain).mul_(scale)
            if need_c:
                rest = (t * (1 - ctx.eps * scale.square())).sum()  # var * scale^2 = 1 - eps * scale^2
                dc = (rest / 2 - _over_positions(s, y) - _over_positions(t, y.square()) / 2) / n
            dweight = _sum_to(product, c) if need_weight else None
            return dx, dc, dweight, _sum_to(dy, c) if need_bias else None, None, None


def _statistics(x: Tensor, coverage: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centred input `(*, width)`, the weighted mean `(*, 1)` and 1 / deviation `(*, 1)`."""
    share = coverage / coverage.sum()
    mean = (x @ share)[..., None]
    centred = x - mean
    return centred, mean, ((centred * centred @ share)[..., None] + eps).rsqrt()


def _over_positions(factor: Tensor, y: Tensor) -> Tensor:
    """Return the sum over all positions of `(*, 1)` times `(*, width)`: `(width,)`."""
    return factor.reshape(-1) @ y.reshape(-1, y.shape[-1])


def _sum_to(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.reshape(-1, *like.shape).sum(0)


class LayerNorm(Elastic, nn.LayerNorm):
    """`nn.LayerNorm` over an elastic last dimension: `(*, width) -> (*, width)`.

    Under a mixture with coverage `c`, gain and bias are covered, and the statistics are weighted:

        mean = sum(c x) / sum(c)
        var = sum(c (x - mean)^2) / sum(c)

    Differs from the paper's code, whose statistics run over the full width and include the zeros of the tail.
    `relaxation="paper"` keeps that form.
    """

    def __init__(self, width: Dimension, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True):
        axis = Axis.of(width, "write")
        nn.LayerNorm.__init__(self, axis.length, eps, elementwise_affine, bias)
        self.declare(weight=(axis,), bias=(axis,))
        self.declare(role="statistics", statistics=(width,))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.current("weight"), self.current("bias")
        coverage = self.factors("statistics")
        if coverage:
            x = weighted_layer_norm(x, coverage[0].whole(), weight, bias, self.eps)
        else:
            x = F.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)
        return x if self.elementwise_affine else self.covered("weight", x)

    def plain(self, assignment: Assignment) -> nn.LayerNorm:
        width = self.axes["weight"][0].entries(assignment)
        return nn.LayerNorm(width, self.eps, self.elementwise_affine, self.bias is not None)


class BatchNorm2d(Elastic, nn.BatchNorm2d):
    """`nn.BatchNorm2d` over elastic channels: `(B, C, H, W) -> (B, C, H, W)`.

    Normalising a channel removes any factor in front of it. So the coverage is applied after the normalisation: to gain
    and bias, or to the output if the layer has no gain and bias.
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
            # Momentum None means the plain average over batches, as in torch.
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
