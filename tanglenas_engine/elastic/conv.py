"""An elastic 2d convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.elastic.masked import ConvolutionProduct, masked
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.size import Assignment, Axis, Size, divided


class Conv2d(Elastic, nn.Conv2d):
    """`nn.Conv2d` with elastic channels, groups and a nested centred kernel: `(B, C, H, W) -> (B, C', H', W')`.

    Args:
        in_channels: The number of input channels C.
        out_channels: The number of output channels C'.
        kernel_size: The height and width of the kernel, in pixels. The value 0 stands for an absent operation.
        stride: The stride, in pixels.
        padding: The padding of the largest kernel, in pixels. None keeps the image size at stride 1. A smaller kernel
            gets less padding, so that all kernels have the same centres.
        dilation: The distance between the kernel's entries, in pixels.
        groups: The number of groups. The number of channels per group must be fixed, so that the first channels are the
            first groups. A depthwise convolution has `groups=C` and C channels on both sides.
        bias: True if the convolution has a bias.

    Raises:
        TangleNASError: The padding is too small for the smallest kernel, or the number of channels per group varies.
    """

    def __init__(
        self,
        in_channels: Size | int,
        out_channels: Size | int,
        kernel_size: Size | int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: Size | int = 1,
        bias: bool = True,
    ):
        kernel, inputs, outputs, groups = map(Size.of, (kernel_size, in_channels, out_channels, groups))
        if padding is None:
            padding = dilation * (kernel.max - 1) // 2
        smallest = min(int(size) for size in kernel.values if size)  # size 0 stands for an absent operation
        crop = dilation * (kernel.max - smallest) // 2
        if padding < crop:
            raise TangleNASError(
                f"padding {padding} is too small for kernels {sorted(set(kernel.values))} at dilation {dilation}: "
                f"the smallest would need {padding - crop}. Use at least {crop}"
            )
        per_group = inputs
        if groups.max > 1 or groups.rows:
            per_group = divided(inputs, groups)
            if len(set(per_group.values) | {0}) > 2 or len(set(divided(outputs, groups).values)) > 1:
                raise TangleNASError(
                    f"a grouped convolution keeps the channels of one group fixed, but {inputs!r} to {outputs!r} in "
                    f"groups of {groups!r} does not: let the number of groups grow with the channels"
                )
        nn.Conv2d.__init__(self, inputs.max, outputs.max, kernel.max, stride, padding, dilation, groups.max, bias)
        self._groups = groups
        window = Axis(kernel, "window")
        self.declare(
            weight=(Axis.of(outputs, "write"), Axis.of(per_group, "read"), window, window),
            bias=(Axis.of(outputs, "write"),),
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, factors = self.unmasked("weight")
        assert weight is not None
        padding, _ = self._geometry(self.assignment)
        op = ConvolutionProduct(self.stride, padding, self.dilation, x.shape[1] // weight.shape[1])
        return masked(op, x, weight, self.current("bias"), factors)

    def plain(self, assignment: Assignment) -> nn.Conv2d:
        padding, groups = self._geometry(assignment)
        outputs, per_group, kernel, _ = (axis.entries(assignment) for axis in self.axes["weight"])
        return nn.Conv2d(
            per_group * groups,
            outputs,
            kernel,
            self.stride,  # type: ignore[arg-type]
            padding,
            self.dilation,  # type: ignore[arg-type]
            groups,
            self.bias is not None,
        )

    def macs(self, output: Any) -> list[tuple[int, tuple[Size, ...]]]:
        positions = output.shape[0] * output.shape[2] * output.shape[3]
        return [(positions, tuple(axis.size for axis in self.axes["weight"]))]

    def _geometry(self, assignment: Assignment | None) -> tuple[int, int]:
        """Return padding and groups of an architecture, or of the largest network for None."""
        padding = int(self.padding[0])
        if assignment is None:
            return padding, self.groups
        kernel = self.axes["weight"][2].size
        crop = self.dilation[0] * (kernel.max - kernel.value(assignment)) // 2
        return padding - crop, self._groups.value(assignment)
