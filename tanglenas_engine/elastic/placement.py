"""Where masks sit: `op(x, weight * mask)` and its gradients, at the least cost.

The numbers are those of the formula wherever a mask sits. What differs is what has to be computed and kept:

- For backward the weight and small factors are kept, not the masked weight: it is as large, and soon made again.
- With constant weights, the gradient of a mask `m` over what is read needs no gradient of the weight. With
  `g = dy W`, which x needs anyway, it is `sum(x * g)`, and `dx = g * m`. A mask over both sides is one over what is
  read for each band of rows, and `dy W` the sum over the bands. So an architecture step has forward and input gradients
  only. A mask over a kernel's window still needs the gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tanglenas_engine.mixture import Factor, expanded

LEAST_ROWS = 32
"""Rows of a band, on average, from which bands cost less than the gradient of the weight."""


class Operation(Protocol):
    """A product of an input and a weight, linear in both, whose channels are at `channels` of input and output."""

    @property
    def channels(self) -> int: ...

    @property
    def groups(self) -> int: ...

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def input_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor: ...

    def weight_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """`F.linear`."""

    channels: int = -1
    groups: int = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return dy @ weight

    def weight_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Convolution:
    """`F.conv2d`."""

    stride: tuple[int, ...]
    padding: int
    dilation: tuple[int, ...]
    groups: int
    channels: int = -3

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return self._gradients(x, weight, dy, 0)

    def weight_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return self._gradients(x, weight, dy, 1)

    def _gradients(self, x: Tensor, weight: Tensor, dy: Tensor, wanted: int) -> Tensor:
        geometry = (self.stride, [self.padding] * 2, self.dilation, False, [0, 0], self.groups)
        # An image without a batch is a batch of one.
        x, dy, single = (x, dy, False) if x.dim() == 4 else (x[None], dy[None], wanted == 0)
        gradients = torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, [wanted == i for i in range(3)])
        return gradients[wanted][0] if single else gradients[wanted]  # type: ignore[no-any-return]


def masked(op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Factor]) -> Tensor:
    """`op(x, weight * mask, bias)`: the one way in which masks meet weights that multiply an input.

    Args:
        factors: Of the mask, as `Elastic.parts` gives them.
    """
    if not factors:
        return op(x, weight, bias)
    rows = rest = None
    bands: tuple[int, ...] = (len(weight),)
    for factor in factors:
        mask = factor.mask
        if op.groups == 1 and mask.numel() == mask.shape[0] * mask.shape[1] and (factor.bands or len(mask) == 1):
            bands = factor.bands or bands  # one factor at most has the first dimension
            rows = mask.flatten(1) if rows is None else rows * mask.flatten(1)
        else:
            rest = factor.whole() if rest is None else rest * factor.whole()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Masked.apply(op, bands, x, weight, bias, rows, rest)  # type: ignore[no-any-return]


def _times(weight: Tensor, rows: Tensor | None, bands: tuple[int, ...], rest: Tensor | None) -> Tensor:
    """`weight` times its mask."""
    if rest is not None:
        weight = weight * rest
    if rows is not None:
        weight = weight * _over(expanded(rows, bands) if len(bands) > 1 else rows, weight.dim())
    return weight


def _over(rows: Tensor, dim: int) -> Tensor:
    """`(out, in)` over a weight of `dim` dimensions."""
    return rows.view(*rows.shape, *[1] * (dim - 2))


class _Masked(torch.autograd.Function):
    """`op(x, weight * mask)` with the mask `rows`, `(bands, in or 1)`, times `rest`, which broadcasts."""

    @staticmethod
    def forward(
        op: Operation,
        bands: tuple[int, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        rest: Tensor | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # masks stay in the weights' precision
            mixed = _times(weight, rows, bands, rest).to(x.dtype)
            return op(x, mixed, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, ctx.bands, x, weight, bias, rows, rest = inputs
        ctx.bias_type = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, rows, rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        x, weight, rows, rest = ctx.saved_tensors
        op, bands = ctx.op, ctx.bands
        _, _, need_x, need_weight, need_bias, need_rows, need_rest = ctx.needs_input_grad
        dx = dweight = dbias = drows = drest = None
        with torch.autocast(x.device.type, enabled=False):
            if need_bias:
                dbias = _sum_but(dy, op.channels).to(ctx.bias_type)
            if need_rows and not (need_weight or need_rest) and len(weight) >= LEAST_ROWS * (len(bands) - 1):
                dx, drows = _by_bands(op, bands, x, _times(weight, None, bands, rest), rows, dy, need_x)
            else:
                mixed = _times(weight, rows, bands, rest).to(x.dtype)
                if need_x:
                    dx = op.input_gradient(x, mixed, dy)
                if need_weight or need_rows or need_rest:
                    dmixed = op.weight_gradient(x, mixed, dy).to(weight.dtype)
                    dweight = _times(dmixed, rows, bands, rest) if need_weight else None
                    dmask = dmixed * weight if need_rows or need_rest else None
                    if need_rows:
                        parts = _times(dmask, None, bands, rest).flatten(2).sum(2) if weight.dim() > 2 else dmask
                        parts = parts if weight.dim() > 2 or rest is None else parts * rest
                        drows = torch.stack([part.sum(0) for part in parts.split(bands)]).sum_to_size(rows.shape)
                    if need_rest:
                        drest = _times(dmask, rows, bands, None).sum_to_size(rest.shape)
        return None, None, dx, dweight, dbias, drows, drest


def _by_bands(
    op: Operation, bands: tuple[int, ...], x: Tensor, weight: Tensor, rows: Tensor, dy: Tensor, need_x: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients of the input and of `rows` for a constant weight."""
    dx, gradients = None, []
    for part, row, dpart in zip(weight.split(bands), rows.unbind(0), dy.split(bands, op.channels), strict=True):
        g = op.input_gradient(x, part.to(x.dtype), dpart)
        gradients.append(_sum_but(x * g, op.channels).to(rows.dtype).sum_to_size(row.shape))
        if need_x:
            row = row.to(g.dtype).view(-1, *[1] * (-op.channels - 1))
            dx = g * row if dx is None else torch.addcmul(dx, g, row)
    return dx, torch.stack(gradients)


def _sum_but(tensor: Tensor, dim: int) -> Tensor:
    """Summed over all dimensions but one."""
    others = [d for d in range(tensor.dim()) if d != dim % tensor.dim()]
    return tensor.sum(others) if others else tensor
