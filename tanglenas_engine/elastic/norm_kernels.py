"""The kernels of `fused_norm.py`, in Triton. A program holds one position: a row of `width` numbers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    x, coverage, weight, bias, y, mean, scale, width, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + position * width + columns, mask=inside, other=0.0).to(tl.float32)
    covered = tl.load(coverage + columns, mask=inside, other=0.0)
    total = tl.sum(covered, 0)
    centre = tl.sum(values * covered, 0) / total
    centred = tl.where(inside, values - centre, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred * covered, 0) / total + eps)
    result = centred * inverse
    if HAS_WEIGHT:
        result = result * tl.load(weight + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        result = result + tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(y + position * width + columns, result, mask=inside)
    tl.store(mean + position, centre)
    tl.store(scale + position, inverse)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    dy, x, coverage, weight, mean, scale, dx, sums, positions, programs, width, eps,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    covered = tl.load(coverage + columns, mask=inside, other=0.0)
    total = tl.sum(covered, 0)
    dcoverage = tl.zeros([BLOCK], dtype=tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    dbias = tl.zeros([BLOCK], dtype=tl.float32)
    first = program.to(tl.int64) * width + columns
    dy_row, x_row, dx_row = dy + first, x + first, dx + first
    for position in range(program, positions, programs):
        values = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy_row, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(scale + position)
        normal = tl.where(inside, (values - tl.load(mean + position)) * inverse, 0.0)
        dweight += gradient * normal
        dbias += gradient
        if HAS_WEIGHT:
            gradient = gradient * tl.load(weight + columns, mask=inside, other=0.0)
        s = tl.sum(gradient, 0)
        t = tl.sum(gradient * normal, 0)
        result = inverse * (gradient - covered / total * (s + t * normal))
        tl.store(dx_row, result, mask=inside)
        dy_row += programs * width
        x_row += programs * width
        dx_row += programs * width
        dcoverage -= s * normal + t / 2 * (normal * normal - (1 - eps * inverse * inverse))
    # `sums` is (3, programs, width).
    place = sums + first
    tl.store(place, dcoverage / total, mask=inside)
    tl.store(place + programs * width, dweight, mask=inside)
    tl.store(place + 2 * programs * width, dbias, mask=inside)
