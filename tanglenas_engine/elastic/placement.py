"""Where masks sit: `op(x, weight * mask)` and its gradients, at the least cost.

The numbers are those of the formula wherever a mask sits. What differs is what has to be computed and kept:

- Only the weight and small factors are kept for backward: neither the mask nor the masked weight, which are as
  large as the weight and made again in no time.
- A *gate* covers the dimension that is read. With constant weights its gradient is `sum(x * g)`, where
  `g = dy W` is needed for x anyway: the architecture step then costs no weight gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Masks(NamedTuple):
    """A mask of a weight `(out, in, ...)` as the product of up to three parts, None where one is 1 everywhere."""

    gate: Tensor | None = None
    """`(in,)`"""
    outer: Tensor | None = None
    """Broadcasts against the weight."""
    left: Tensor | None = None
    """`(S, out)`, which with `right` `(S, in)` makes the mask `left.T @ right`."""
    right: Tensor | None = None

    def times(self, weight: Tensor) -> Tensor:
        """`weight` times the mask."""
        for part in (self.outer, self.joint(weight.dim()), self.shaped_gate(weight.dim())):
            weight = weight if part is None else weight * part
        return weight

    def joint(self, dim: int) -> Tensor | None:
        """The joint mask of both sides, for a weight of `dim` dimensions."""
        if self.left is None or self.right is None:
            return None
        return (self.left.T @ self.right).reshape(self.left.shape[1], self.right.shape[1], *[1] * (dim - 2))

    def shaped_gate(self, dim: int) -> Tensor | None:
        return None if self.gate is None else self.gate.view(-1, *[1] * (dim - 2))


class Operation(Protocol):
    """A product of an input and a weight, linear in both. Channels of the input and the output are at `channels`."""

    @property
    def channels(self) -> int: ...

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def input_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor: ...

    def weight_gradient(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """`F.linear`."""

    channels: int = -1

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

    def _gradients(self, x: Tensor, weight: Tensor, dy: Tensor, of: int) -> Tensor:
        arguments = ([0], self.stride, [self.padding] * 2, self.dilation, False, [0], self.groups)
        wanted = [i == of for i in range(3)]
        gradients = torch.ops.aten.convolution_backward(dy, x, weight, *arguments, wanted)
        return gradients[of]  # type: ignore[no-any-return]


def masked(
    op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[tuple[Tensor, ...]]
) -> Tensor:
    """`op(x, weight * mask, bias)`: the one way in which masks meet weights that multiply an input.

    Args:
        factors: Of the mask, as `Elastic.parts` gives them.
    """
    if not factors:
        return op(x, weight, bias)
    gate = outer = left = right = None
    for factor in factors:
        if len(factor) == 2:
            left, right = (side.flatten(1) for side in factor)
        elif factor[0].numel() == factor[0].shape[1] == x.shape[op.channels]:
            gate = factor[0].flatten()
        else:
            outer = factor[0] if outer is None else outer * factor[0]
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Masked.apply(op, x, weight, bias, gate, outer, left, right)  # type: ignore[no-any-return,no-untyped-call]


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, *masks: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # masks stay in the weights' precision
            mixed = Masks(*masks).times(weight).to(x.dtype)
            return op(x, mixed, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, x, weight, ctx.bias, *masks = inputs
        ctx.bias = None if ctx.bias is None else ctx.bias.dtype
        ctx.save_for_backward(x, weight, *masks)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        x, weight, *parts = ctx.saved_tensors
        op, masks = ctx.op, Masks(*parts)
        _, need_x, need_weight, need_bias, need_gate, need_outer, need_left, need_right = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            dx = dweight = dbias = dgate = douter = dleft = dright = None
            if need_bias:
                dbias = _sum_but(dy, op.channels).to(ctx.bias)
            if need_weight or need_outer or need_left or need_right:
                whole = masks.times(weight)
                dmixed = op.weight_gradient(x, whole.to(x.dtype), dy).to(weight.dtype)
                if need_x:
                    dx = op.input_gradient(x, whole.to(x.dtype), dy)
                if need_weight:
                    dweight = masks.times(dmixed)
                if any(ctx.needs_input_grad[4:]):
                    dgate, douter, dleft, dright = _mask_gradients(dmixed * weight, masks, ctx.needs_input_grad[4:])
            elif need_gate:
                inner = masks._replace(gate=None).times(weight)
                g = op.input_gradient(x, inner.to(x.dtype), dy)
                dgate = _sum_but(x * g, op.channels).to(weight.dtype)
                dx = g * masks.gate.to(x.dtype).view(-1, *[1] * (-op.channels - 1)) if need_x else None  # type: ignore[union-attr]
            elif need_x:
                dx = op.input_gradient(x, masks.times(weight).to(x.dtype), dy)
            return None, dx, dweight, dbias, dgate, douter, dleft, dright


def _mask_gradients(dmask: Tensor, masks: Masks, need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of the parts of a mask, from that of the mask: each is the sum of it times the other parts."""
    need_gate, need_outer, need_left, need_right = need
    dim = dmask.dim()
    dgate = douter = dleft = dright = None
    if need_gate:
        dgate = _sum_but(masks._replace(gate=None).times(dmask), 1)
    if need_outer and masks.outer is not None:
        douter = masks._replace(outer=None).times(dmask).sum_to_size(masks.outer.shape)
    if (need_left or need_right) and masks.left is not None and masks.right is not None:
        djoint = masks._replace(left=None, right=None).times(dmask)
        djoint = djoint.flatten(2).sum(2) if dim > 2 else djoint
        dleft = masks.right @ djoint.T if need_left else None
        dright = masks.left @ djoint if need_right else None
    return dgate, douter, dleft, dright


def _sum_but(tensor: Tensor, dim: int) -> Tensor:
    """Summed over all dimensions but one."""
    others = [d for d in range(tensor.dim()) if d != dim % tensor.dim()]
    return tensor.sum(others) if others else tensor
