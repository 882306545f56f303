"""Products with a masked weight. The mask is applied where that costs least.

The plain form is three lines. Every other form gives the same numbers:

    for factor in factors:
        weight = weight * factor.whole()
    return op.output(x, weight, bias)

`masked` saves memory and time against the plain form:

- The backward pass keeps the weight and the small factors. It does not keep the masked weight, which is as large as the
  weight and cheap to compute again.
- With constant weights, the gradient of a mask `m` over the input channels needs no gradient of the weight. It is
  `sum(x * g)` with `g = dy W`, and `dx = g * m` needs `g` anyway. A mask over both input and output channels is a mask
  over the input channels for each band of rows; then `dy W` is the sum over the bands. So an architecture step computes
  only forwards and input gradients. A mask over a kernel's window still needs the gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tanglenas_engine.superposition.mixture import Factor, expanded

MIN_ROWS_PER_BAND = 64
"""The mean number of rows per band from which bands cost less than the gradient of the weight."""
MIN_ROWS_PER_BAND_ON_GPU = 1024
"""The same on a GPU, where a product is cheap against what a band reads and writes besides, and against launches."""


class Product(Protocol):
    """A product of an input and a weight, linear in both. `channels` is the channel dimension of input and output.

    The weight is `(out, in, ...)`, or `(in, out, ...)` if the product is transposed.

    The methods have names, because torch's tracer up to 2.11 cannot call an instance of a frozen dataclass.
    """

    @property
    def channels(self) -> int: ...

    @property
    def groups(self) -> int: ...

    @property
    def transposed(self) -> bool: ...

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def input_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor: ...

    def weight_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LinearProduct:
    """The product of `F.linear`."""

    channels: int = -1
    groups: int = 1
    transposed: bool = False

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return dy @ weight

    def weight_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class ConvolutionProduct:
    """The product of `F.conv1d`, `F.conv2d` or `F.conv_transpose2d`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channels: int = -3
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0)

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.transposed:
            more = (self.output_padding, self.groups, self.dilation)
            return F.conv_transpose2d(x, weight, bias, self.stride, self.padding, *more)
        convolution = F.conv2d if self.channels == -3 else F.conv1d
        return convolution(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return self._gradients(x, weight, dy, 0)

    def weight_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return self._gradients(x, weight, dy, 1)

    def cropped(self, margin: int) -> ConvolutionProduct:
        """Return the convolution for a kernel without its outer `margin` pixels."""
        return replace(self, padding=tuple(p - margin * d for p, d in zip(self.padding, self.dilation, strict=True)))

    def _gradients(self, x: Tensor, weight: Tensor, dy: Tensor, wanted: int) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        # A single image (C, H, W) becomes a batch of one.
        x, dy, single = (x, dy, False) if x.dim() == weight.dim() else (x[None], dy[None], wanted == 0)
        gradients = torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, [wanted == i for i in range(3)])
        return gradients[wanted][0] if single else gradients[wanted]  # type: ignore[no-any-return]


def masked(op: Product, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Factor]) -> Tensor:
    """Return `op.output(x, weight * mask, bias)`. No other code multiplies an input with a masked weight.

    Args:
        op: The product.
        x: The input.
        weight: The unmasked weight, `(out, in, ...)`; `(in, out, ...)` for a transposed product.
        bias: The bias `(out,)`, or None.
        factors: The factors of the mask, as `Elastic.unmasked` returns them.
    """
    if not factors:
        return op.output(x, weight, bias)
    depthwise = 1 < op.groups == len(weight) == x.shape[op.channels] and not op.transposed
    bands: tuple[int, ...] = (len(weight),)
    rows = rest = windows = None
    for factor in factors:
        mask = factor.mask
        in_rows = mask.numel() == mask.shape[0] * mask.shape[1] and (factor.bands or len(mask) == 1)
        if in_rows and (op.groups == 1 or depthwise) and not factor.windows and not op.transposed:
            if factor.bands:  # at most one factor covers the first dimension
                bands = factor.bands
            rows = mask.flatten(1) if rows is None else rows * mask.flatten(1)
        else:
            windows = factor.windows if rest is None else None
            rest = factor.whole() if rest is None else rest * factor.whole()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Masked.apply(_Form(op, depthwise, bands, windows), x, weight, bias, rows, rest)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Form:
    """The static form of a product with a masked weight."""

    op: Product
    depthwise: bool
    bands: tuple[int, ...]
    windows: tuple[int, ...] | None = None

    def mask(self, rows: Tensor | None, rest: Tensor | None, dim: int) -> Tensor | None:
        """Return the mask of a weight with `dim` dimensions: `rows`, `(bands, in or 1)`, times `rest`."""
        if rows is None:
            return rest
        whole = expanded(rows, self.bands) if len(self.bands) > 1 else rows
        whole = whole.view(*whole.shape, *[1] * (dim - 2))
        return whole if rest is None else whole * rest

    def splits(self, weight: Tensor, rest: Tensor | None, rest_learns: bool, need_x: bool) -> bool:
        """Return True if parts of `dy W` give the masks' gradients at lower cost than the gradient of the weight."""
        if self.depthwise:
            return rest is None or self.windows is not None
        # If x needs no gradient, as in the first layer, only the masks would need `dy W`.
        least = MIN_ROWS_PER_BAND_ON_GPU if weight.is_cuda else MIN_ROWS_PER_BAND
        return need_x and not rest_learns and len(weight) >= least * (len(self.bands) - 1)


class _Masked(torch.autograd.Function):
    """The product with a masked weight and its gradients."""

    # With a separate `setup_context`, torch would look up the signature of `forward` in every call.
    @staticmethod
    def forward(
        ctx: Any, form: _Form, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, rest: Tensor | None
    ) -> Tensor:
        ctx.form, ctx.bias_type = form, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, rows, rest)
        # Weight and mask are multiplied in the weight's precision. The product has one type, so autocast changes none.
        mixed = _times(weight, form.mask(rows, rest, weight.dim())).to(x.dtype)
        return form.op.output(x, mixed, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        x, weight, rows, rest = ctx.saved_tensors
        form, op = ctx.form, ctx.form.op
        _, need_x, need_weight, need_bias, need_rows, need_rest = ctx.needs_input_grad
        dx = dweight = dbias = drows = drest = None
        with without_autocast(x.device.type):
            if need_bias:
                dbias = _sum_but(dy, op.channels).to(ctx.bias_type)
            if (need_rows or need_rest) and not need_weight and form.splits(weight, rest, need_rest, need_x):
                parts = _by_windows if form.depthwise else _by_bands
                dx, drows, drest = parts(form, x, weight, rows, rest, dy, need_x)
                return None, dx, None, dbias, drows, drest
            mask = form.mask(rows, rest, weight.dim())
            mixed = _times(weight, mask).to(x.dtype)
            if need_x:
                dx = op.input_gradient(x, mixed, dy)
            if need_weight or need_rows or need_rest:
                dmixed = op.weight_gradient(x, mixed, dy).to(weight.dtype)
                if need_rows:
                    terms = _times(dmixed * weight, rest)
                    terms = terms.reshape(*terms.shape[:2], -1).sum(2)  # (out, in)
                    by_band = [term.sum(0) for term in torch.split(terms, list(form.bands))]
                    drows = torch.stack(by_band).sum_to_size(rows.shape)
                if need_rest:
                    drest = _times(dmixed * weight, form.mask(rows, None, weight.dim())).sum_to_size(rest.shape)
                dweight = _times_(dmixed, mask) if need_weight else None
        return None, dx, dweight, dbias, drows, drest


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a block without autocast. Most callers are outside of any, and torch's block takes longer than a sum."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _times(weight: Tensor, mask: Tensor | None) -> Tensor:
    return weight if mask is None else weight * mask


def _times_(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the product. It overwrites `tensor` if no graph is kept, which takes half the time."""
    return _times(tensor, mask) if mask is None or torch.is_grad_enabled() else tensor.mul_(mask)


def _by_bands(
    form: _Form, x: Tensor, weight: Tensor, rows: Tensor, rest: Tensor | None, dy: Tensor, need_x: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, rows and rest for a constant weight, from `g = dy W` of each band of rows."""
    op, bands = form.op, form.bands
    dx, drows = None, []
    weights = torch.split(_times(weight, rest).to(x.dtype), list(bands))
    for part, row, dpart in zip(weights, rows.unbind(0), torch.split(dy, list(bands), op.channels), strict=True):
        g = op.input_gradient(x, part, dpart)
        drows.append(_sum_but(x * g, op.channels).to(rows.dtype).sum_to_size(row.shape))
        if need_x:
            row = _along(row, op).to(g.dtype)
            dx = _times_(g, row) if dx is None else dx.addcmul_(g, row)
    return dx, torch.stack(drows), None


def _by_windows(
    form: _Form,
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    rest: Tensor | None,
    dy: Tensor,
    need_x: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, rows and rest for a depthwise convolution, ring by ring.

    A ring is the part that a window adds to the next smaller one. On a CPU the gradient of a depthwise weight takes
    some ten times as long as that of the input.
    """
    op, largest, positions = form.op, weight.shape[-1], weight.dim() - 2
    channel = None if rows is None else expanded(rows, form.bands)[:, 0]
    total, by_channel = None, torch.zeros((), dtype=weight.dtype, device=weight.device)
    drest = None if rest is None else torch.zeros_like(rest)
    inner = 0
    for window in form.windows or (largest,):
        low, hole = (largest - window) // 2, (window - inner) // 2
        ring = weight
        for dim in range(2, weight.dim()) if form.windows else ():  # without windows the ring is the whole kernel
            ring = ring.narrow(dim, low, window)
        if inner:
            ring = ring * F.pad(ring.new_zeros([inner] * positions), [hole] * 2 * positions, value=1.0)
        g = op.cropped(low).input_gradient(x, ring.to(x.dtype), dy)  # type: ignore[attr-defined]
        sums = _sum_but(x * g, op.channels).to(weight.dtype)
        share = None
        if rest is not None and drest is not None:
            # The mask is constant on the ring, so one entry gives its value.
            share = rest[(0, 0, *[low] * positions)]
            ringed = (sums if channel is None else sums * channel).sum()
            drest = drest + F.pad(ringed.view([1] * rest.dim()), [low, largest - 1 - low] * positions)
        by_channel = by_channel + _times(sums, share)
        g = _times_(g, None if share is None else share.to(g.dtype))
        total = g if total is None else total + g
        inner = window
    drows = None if rows is None else torch.stack([b.sum() for b in torch.split(by_channel, list(form.bands))])[:, None]
    dx = None
    if need_x and total is not None:
        dx = total if channel is None else _times_(total, _along(channel, op).to(total.dtype))
    return dx, drows, drest


def _along(row: Tensor, op: Product) -> Tensor:
    """Return a vector over the channels in a shape that broadcasts against an input."""
    return row.view(-1, *[1] * (-op.channels - 1))


def _sum_but(tensor: Tensor, dim: int) -> Tensor:
    """Return the sum over all dimensions except `dim`."""
    others = [d for d in range(tensor.dim()) if d != dim % tensor.dim()]
    return tensor.sum(others) if others else tensor
