"""Elastic norms. At a one-hot mixture they compute exactly what the sliced layers compute."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.elastic import fused_norm
from tanglenas_engine.elastic.base import Dimension, Elastic, copied
from tanglenas_engine.elastic.masked import without_autocast
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.size import Assignment, Axis, Size, divided


def weighted_layer_norm(
    x: Tensor, coverage: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool = True
) -> Tensor:
    """Return the layer norm of x, `(*, width)`, with statistics weighted by `coverage`, `(width,)`.

    Without `centre` the mean counts as 0, which gives the RMS norm.
    """
    fused = centre and fused_norm.fuses(x, coverage)
    x = x if fused else x.to(coverage.dtype)
    return _WeightedLayerNorm.apply(x, coverage, weight, bias, eps, fused, centre)  # type: ignore[no-any-return]


class _WeightedLayerNorm(torch.autograd.Function):
    """A layer norm that saves the same for backward as torch's: the input, and mean and deviation per position."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coverage: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        fused: bool,
        centre: bool,
    ) -> Tensor:
        ctx.eps, ctx.fused, ctx.centre = eps, fused, centre
        if fused:
            y, mean, scale = fused_norm.forward(x, coverage, weight, bias, eps)
            ctx.save_for_backward(x, coverage, weight, mean, scale)
            return y
        with without_autocast(x.device.type):
            centred, mean, scale = _statistics(x, coverage, eps, centre)
        ctx.save_for_backward(x, coverage, weight, mean, scale)
        # The last operation makes a new tensor. An output that was overwritten has no gradient in code that torch up to
        # 2.11 compiles. Without a mean, `centred` is the input itself.
        y = centred.mul_(scale) if centre and not (weight is None and bias is None) else centred * scale
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

        Without a mean, s is 0.
        """
        (dy,) = gradients
        x, c, weight, mean, scale = ctx.saved_tensors
        need_x, need_c, need_weight, need_bias, *_ = ctx.needs_input_grad
        if ctx.fused and not torch.is_grad_enabled():
            found = fused_norm.backward(dy, x, c, weight, mean, scale, ctx.eps)
            needs = (need_x, need_c, need_weight, need_bias)
            return (
                *(gradient if needed else None for gradient, needed in zip(found, needs, strict=True)),
                None,
                None,
                None,
            )
        with without_autocast(x.device.type):
            x = x.to(c.dtype)
            if torch.is_grad_enabled():  # second derivatives need the statistics as functions of x and c
                _, mean, scale = _statistics(x, c, ctx.eps, ctx.centre)
            y = torch.addcmul(-mean * scale, x, scale)
            gain = c.new_ones(c.shape) if weight is None else weight
            product, n = dy * y, c.sum()
            t = (product @ gain)[..., None]
            s = (dy @ gain)[..., None] if ctx.centre else torch.zeros_like(t)
            dx = dc = None
            if need_x:
                dx = torch.addcmul(s, t, y).mul_(-c / n).addcmul_(dy, gain).mul_(scale)
            if need_c:
                rest = (t * (1 - ctx.eps * scale.square())).sum()  # var * scale^2 = 1 - eps * scale^2
                dc = (rest / 2 - _over_positions(s, y) - _over_positions(t, y.square()) / 2) / n
            dweight = _sum_to(product, c) if need_weight else None
            return dx, dc, dweight, _sum_to(dy, c) if need_bias else None, None, None, None


def _statistics(x: Tensor, coverage: Tensor, eps: float, centre: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centred input `(*, width)`, the weighted mean `(*, 1)` and 1 / deviation `(*, 1)`."""
    share = coverage / coverage.sum()
    mean = (x @ share)[..., None] if centre else x.new_zeros(*x.shape[:-1], 1)
    centred = x - mean if centre else x
    return centred, mean, ((centred * centred @ share)[..., None] + eps).rsqrt()


def _over_positions(factor: Tensor, y: Tensor) -> Tensor:
    """Return the sum over all positions of `(*, 1)` times `(*, width)`: `(width,)`."""
    return factor.reshape(-1) @ y.reshape(-1, y.shape[-1])


def _sum_to(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.reshape(-1, *like.shape).sum(0)


def default_eps(x: Tensor) -> float:
    """Return the number that `torch.rms_norm` adds by default: the precision of the type in which it computes."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps


class _WidthNorm(Elastic):
    """A norm over an elastic last dimension, with statistics that are weighted by the dimension's coverage."""

    elementwise_affine: bool

    def __init__(self, width: Dimension, *options: Any):
        axis = Axis.of(width, "write")
        super().__init__(axis.length, *options)
        self.declare(weight=(axis,), bias=(axis,))
        self.declare(statistics=(axis.in_role("statistics"),))

    def forward(self, x: Tensor) -> Tensor:
        coverage = self.factors("statistics")
        x = self.normalised(x, coverage[0].whole() if coverage else None)
        return x if self.elementwise_affine else self.covered("weight", x)

    def normalised(self, x: Tensor, coverage: Tensor | None) -> Tensor:
        """Return the norm of x with gain and bias, weighted by `coverage`, `(width,)`, or by ones."""
        raise NotImplementedError

    def width(self, assignment: Assignment) -> int:
        """Return the number of features that an architecture normalises."""
        return self.axes["weight"][0].entries(assignment)


class LayerNorm(_WidthNorm, nn.LayerNorm):
    """`nn.LayerNorm` over an elastic last dimension: `(*, width) -> (*, width)`.

    Under a mixture with coverage `c`, gain and bias are covered, and the statistics are weighted:

        mean = sum(c x) / sum(c)
        var = sum(c (x - mean)^2) / sum(c)

    Differs from the paper's code, whose statistics run over the full width and include the zeros of the tail.
    `relaxation="paper"` keeps that form.
    """

    def __init__(self, width: Dimension, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True):
        super().__init__(width, eps, elementwise_affine, bias)

    def normalised(self, x: Tensor, coverage: Tensor | None) -> Tensor:
        weight, bias = self.current("weight"), self.current("bias")
        if coverage is None:
            return F.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)
        return weighted_layer_norm(x, coverage, weight, bias, self.eps)

    def plain(self, assignment: Assignment) -> nn.LayerNorm:
        return nn.LayerNorm(self.width(assignment), self.eps, self.elementwise_affine, self.bias is not None)


class LayerNorm2d(LayerNorm):
    """A LayerNorm over the channels of each pixel, as timm's ConvNeXt has it: `(B, C, H, W) -> (B, C, H, W)`.

    torch has no such layer. So the network of an architecture has this one, with a fixed width.
    """

    def __init__(self, width: Dimension, eps: float = 1e-6, elementwise_affine: bool = True, bias: bool = True):
        super().__init__(width, eps, elementwise_affine, bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, H, W, C) inside

    def plain(self, assignment: Assignment) -> nn.LayerNorm:
        layer = copied(self, assignment)
        layer.normalized_shape = (self.width(assignment),)  # type: ignore[assignment]
        return layer  # type: ignore[return-value]


class RMSNorm(_WidthNorm, nn.RMSNorm):
    """`nn.RMSNorm` over an elastic last dimension: `(*, width) -> (*, width)`.

    Under a mixture with coverage `c`, the gain is covered, and the mean square is weighted: `sum(c x^2) / sum(c)`.
    `relaxation="paper"` takes the mean over the full width. `eps` None is `default_eps`.
    """

    def __init__(self, width: Dimension, eps: float | None = None, elementwise_affine: bool = True):
        super().__init__(width, eps, elementwise_affine)

    def normalised(self, x: Tensor, coverage: Tensor | None) -> Tensor:
        weight = self.current("weight")
        if coverage is None:
            return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
        eps = default_eps(x) if self.eps is None else self.eps
        return weighted_layer_norm(x, coverage, weight, None, eps, centre=False)

    def plain(self, assignment: Assignment) -> nn.RMSNorm:
        return nn.RMSNorm(self.width(assignment), self.eps, self.elementwise_affine)


class GroupNorm(Elastic, nn.GroupNorm):
    """`nn.GroupNorm` over elastic channels: `(B, C, *) -> (B, C, *)`.

    The number of channels per group is fixed, so that the first channels are the first groups. All channels of a group
    then have the same coverage, which cancels in the group's statistics. So the coverage is applied to gain and bias,
    or to the output if the layer has none. A single group may have any number of channels: its statistics are weighted
    by their coverage, as those of `LayerNorm`.

    Args:
        num_groups: The number of groups, which grows with the channels (`width // 8`), or 1.
        num_channels: The number of channels C.
        eps: The number added to the variance.
        affine: True if the layer has a gain and a bias for each channel.

    Raises:
        TangleNASError: The channels do not divide into the groups, or the number of channels per group varies.
    """

    def __init__(self, num_groups: Size | int, num_channels: Size | int, eps: float = 1e-5, affine: bool = True):
        groups, channels = Size.of(num_groups), Size.of(num_channels)
        single = set(groups.values) == {1}
        per_group = divided(channels, groups)
        if not single and len(set(per_group.values)) > 1:
            raise TangleNASError(
                f"a group norm keeps the channels of one group fixed, but {channels!r} in groups of {groups!r} does "
                "not: let the number of groups grow with the channels, as in GroupNorm(width // 8, width)"
            )
        nn.GroupNorm.__init__(self, groups.max, channels.max, eps, affine)
        self._groups = groups
        axis = Axis(channels, role="write", unit=1 if single else per_group.max)
        self.declare(weight=(axis,), bias=(axis,))
        self.declare(role="statistics" if single else "buffer", statistics=(channels,))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, coverage = self.current("weight"), self.current("bias"), self.factors("statistics")
        if not coverage:
            groups = self.num_groups if self.assignment is None else self._groups.value(self.assignment)
            x = F.group_norm(x, groups, weight, bias, self.eps)
        else:
            entries = coverage[0].whole().repeat_interleave(x[0, 0].numel())  # of all positions of a channel
            x = weighted_layer_norm(x.flatten(1), entries, None, None, self.eps).view_as(x)
            if weight is not None and bias is not None:
                x = torch.addcmul(_per_channel(bias, x), x, _per_channel(weight, x))
        return x if self.affine else _covered_channels(self, x)

    def plain(self, assignment: Assignment) -> nn.GroupNorm:
        channels = self.axes["weight"][0].entries(assignment)
        return nn.GroupNorm(self._groups.value(assignment), channels, self.eps, self.affine)


class _BatchNorm(Elastic, nn.modules.batchnorm._BatchNorm):
    """A batch norm over elastic channels, in any number of dimensions."""

    shapes: ClassVar[Mapping[int, str]]
    """The shapes of inputs, by their number of dimensions."""
    plain_class: ClassVar[type[nn.modules.batchnorm._BatchNorm]]

    def __init__(
        self,
        num_features: Dimension,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        axis = Axis.of(num_features, "write")
        super().__init__(axis.length, eps, momentum, affine, track_running_stats)
        self.declare(weight=(axis,), bias=(axis,))
        statistics = axis.in_role("buffer")
        self.declare(running_mean=(statistics,), running_var=(statistics,))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in self.shapes:
            raise ValueError(f"expected a {' or '.join(self.shapes.values())} input, got {tuple(x.shape)}")
        momentum = 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            # Momentum None means the plain average over batches, as in torch.
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        mean, variance = self.current("running_mean"), self.current("running_var")
        weight, bias = self.current("weight"), self.current("bias")
        of_batch = self.training or self.running_mean is None
        x = F.batch_norm(x, mean, variance, weight, bias, of_batch, momentum, self.eps)
        if of_batch:
            self.write_back("running_mean", mean)
            self.write_back("running_var", variance)
        return x if self.affine else _covered_channels(self, x)

    def plain(self, assignment: Assignment) -> nn.Module:
        channels = self.axes["weight"][0].entries(assignment)
        return self.plain_class(channels, self.eps, self.momentum, self.affine, self.track_running_stats)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` over elastic channels: `(B, C) -> (B, C)` or `(B, C, L) -> (B, C, L)`. See `BatchNorm2d`."""

    shapes = MappingProxyType({2: "(B, C)", 3: "(B, C, L)"})
    plain_class = nn.BatchNorm1d


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` over elastic channels: `(B, C, H, W) -> (B, C, H, W)`.

    Normalising a channel removes any factor in front of it. So the coverage is applied after the normalisation: to gain
    and bias, or to the output if the layer has no gain and bias.
    """

    shapes = MappingProxyType({4: "(B, C, H, W)"})
    plain_class = nn.BatchNorm2d


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """Return a vector over the channels in a shape that broadcasts against x, `(B, C, *)`."""
    return vector.view(-1, *[1] * (x.dim() - 2))


def _covered_channels(layer: Elastic, x: Tensor) -> Tensor:
    """Return x, `(B, C, *)`, times the mask of the layer's channels."""
    for factor in layer.factors("weight"):
        x = x * _per_channel(factor.whole(), x)
    return x
