"""The kernels of Once-for-All: a smaller kernel is a learned transform of the centre of the next larger one."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine import Assignment, Axis, Size, elastic


class TransformedConv2d(elastic.Conv2d):
    """An elastic `Conv2d` whose kernel of size k is `T_k(W) = M_k centre_k(T_next(W))`, with M_k a `(k^2, k^2)` matrix.

    The matrices start as identities, which makes the kernels nested windows. All channels share them. Under a mixture
    the kernel is `sum_k p(k) pad(T_k(W))`, with channels covered as in any convolution. The kernel size must
    not share a choice with the channels. An extracted network has the transformed kernel itself, and no matrices.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        outputs, per_group, window, _ = self.axes["weight"]
        sizes = sorted({int(size) for size in window.size.values}, reverse=True)
        self.steps = [(f"{larger}to{smaller}", smaller) for larger, smaller in itertools.pairwise(sizes)]
        self.transforms = nn.ParameterDict({name: torch.eye(size**2) for name, size in self.steps})
        self.declare(kernels=(Axis(window.size, "value", role="value"),), channels=(outputs, per_group, None, None))

    def gate(self, child: str) -> Size:
        return Size.of(0)  # only the supernet has the matrices

    def unmasked(self, name: str) -> tuple[Tensor | None, list[elastic.Factor]]:
        kinds = self.factors("kernels") if name == "weight" else []
        if not kinds:
            return super().unmasked(name)
        probabilities = kinds[0].whole()
        if self.assignment is not None:
            return self.sliced(name, self.assignment) * probabilities, self.factors("channels")
        kernels = reversed(self.kernels())  # from the smallest, like the probabilities
        largest = self.weight.shape[-1]
        total = sum(p * _resized(kernel, largest) for p, kernel in zip(probabilities, kernels, strict=True))
        return total, self.factors("channels")

    def sliced(self, name: str, assignment: Assignment) -> Tensor:
        if name != "weight":
            return super().sliced(name, assignment)
        outputs, per_group, size, _ = (axis.size.value(assignment) for axis in self.axes["weight"])
        (kernel,) = (kernel for kernel in self.kernels() if kernel.shape[-1] == size)
        return kernel[:outputs, :per_group]

    def kernels(self) -> list[Tensor]:
        """Return the full weight, `(C', C, k, k)`, at every kernel size, the largest first."""
        kernels = [self.weight]
        for name, size in self.steps:
            centre = _resized(kernels[-1], size)
            kernels.append((centre.flatten(2) @ self.transforms[name].T).view_as(centre))
        return kernels


def _resized(kernel: Tensor, size: int) -> Tensor:
    """Pad a kernel with zeros, or cut it, on all four sides."""
    return F.pad(kernel, [(size - kernel.shape[-1]) // 2] * 4)
