"""Once-for-All's kernels: a smaller one is a learned transformation of the centre of the next larger one."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine import elastic
from tanglenas_engine.size import Assignment, Axis, Size


class TransformedConv2d(elastic.Conv2d):
    """An elastic `Conv2d` whose kernel of size k is `T_k(W) = M_k centre_k(T_next(W))`, with M_k a `(k^2, k^2)` matrix.

    The matrices start as identities, which makes the kernels nested windows, and are shared by all channels. Under
    a mixture the kernel is `sum_k p(k) pad(T_k(W))`, its channels covered as in any convolution; the kernel size has
    to be a choice apart from theirs. Networks that are extracted have the transformed kernel itself, and no matrices.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        outputs, per_group, window, _ = self.axes["weight"]
        sizes = sorted({int(size) for size in window.size.values}, reverse=True)
        self.transforms = nn.ParameterDict(
            {f"{larger}to{smaller}": torch.eye(smaller**2) for larger, smaller in itertools.pairwise(sizes)}
        )
        self.declare(kernels=(Axis(window.size, "value", role="value"),), channels=(outputs, per_group, None, None))

    def gate(self, child: str) -> Size:
        return Size.of(0)  # the matrices are the supernet's alone

    def current(self, name: str) -> Tensor | None:
        probabilities = self.masks("kernels") if name == "weight" else []
        if not probabilities:
            return super().current(name)
        kernels = reversed(self.kernels())  # as the probabilities, from the smallest
        total = sum(p * self._padded(kernel) for p, kernel in zip(probabilities[0], kernels, strict=True))
        return self.covered("channels", total)

    def sliced(self, name: str, assignment: Assignment) -> Tensor:
        if name != "weight":
            return super().sliced(name, assignment)
        outputs, per_group, size, _ = (axis.size.value(assignment) for axis in self.axes["weight"])
        (kernel,) = (kernel for kernel in self.kernels() if kernel.shape[-1] == size)
        return kernel[:outputs, :per_group]

    def kernels(self) -> list[Tensor]:
        """The full weight, `(C', C, k, k)`, at every kernel size, the largest first."""
        kernels = [self.weight]
        for matrix in self.transforms.values():
            size = round(len(matrix) ** 0.5)
            margin = (size - kernels[-1].shape[-1]) // 2  # negative padding cuts
            centre = F.pad(kernels[-1], [margin] * 4)
            kernels.append((centre.flatten(2) @ matrix.T).view_as(centre))
        return kernels

    def _padded(self, kernel: Tensor) -> Tensor:
        return F.pad(kernel, [(self.weight.shape[-1] - kernel.shape[-1]) // 2] * 4)
