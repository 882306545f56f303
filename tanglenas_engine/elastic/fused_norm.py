"""The weighted layer norm of `norm.py` as two kernels for a GPU, which read the input once each.

torch takes some ten operations each way. On a GPU every one of them reads and writes the whole activation, and costs
the host a launch: the norms of a GPT then take longer than its matrix products. The formulas are those of `norm.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

MAX_WIDTH = 16384
"""The largest width that a program holds at once."""
PROGRAMS = 512
"""The number of programs of the backward pass, each of which adds up the gradients of some positions."""


def fuses(x: Tensor, coverage: Tensor) -> bool:
    """Return True if the kernels can normalise `x`. Compiled code fuses the operations of torch by itself."""
    return (
        x.is_cuda
        and coverage.dtype == torch.float32
        and x.shape[-1] <= MAX_WIDTH
        and not torch.compiler.is_compiling()
        and _kernels() is not None
    )


def forward(
    x: Tensor, coverage: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output `(*, width)` in the type of `coverage`, the mean `(*, 1)` and 1 / deviation `(*, 1)`."""
    x, width = x.contiguous(), x.shape[-1]
    positions = x.numel() // width
    y = torch.empty_like(x, dtype=coverage.dtype)
    mean, scale = (coverage.new_empty(*x.shape[:-1], 1) for _ in range(2))
    # A missing weight or bias is never read.
    pointers = (x, coverage.contiguous(), coverage if weight is None else weight, coverage if bias is None else bias)
    with _on(x.device):
        _kernels().forward_kernel[(positions,)](
            *pointers, y, mean, scale, width, eps, weight is not None, bias is not None, **_form(width)
        )
    return y, mean, scale


def backward(
    dy: Tensor, x: Tensor, coverage: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, coverage, weight and bias."""
    x, dy, width = x.contiguous(), dy.contiguous(), x.shape[-1]
    positions = x.numel() // width
    programs = min(PROGRAMS, positions)
    dx = torch.empty_like(x)
    sums = coverage.new_empty(3, programs, width)
    pointers = (dy, x, coverage.contiguous(), coverage if weight is None else weight, mean, scale)
    with _on(x.device):
        _kernels().backward_kernel[(programs,)](
            *pointers, dx, sums, positions, programs, width, eps, weight is not None, **_form(width)
        )
    dcoverage, dweight, dbias = sums.sum(1).unbind(0)
    return dx, dcoverage, dweight, dbias


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Return a block that launches on a device. In Triton's interpreter, which needs no GPU, that is any."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _form(width: int) -> dict[str, int]:
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


@cache
def _kernels() -> Any:
    """Return the module of the kernels, or None where there is no Triton. torch brings it where it can be had."""
    try:
        from tanglenas_engine.elastic import norm_kernels
    except ImportError:
        return None
    return norm_kernels
