"""Elastic convolutions. All have one base, which knows kernels, padding and groups."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.elastic.masked import ConvolutionProduct, masked
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.size import Assignment, Axis, Size, divided


class _Convolution(Elastic):
    """A convolution with elastic channels, groups and a nested centred kernel, in any number of dimensions.

    Its weight is `(C', C / groups, *kernel)`, or `(C, C' / groups, *kernel)` if it is transposed.
    """

    plain_class: ClassVar[type[nn.modules.conv._ConvNd]]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    in_channels: int
    groups: int
    transposed: bool
    bias: Tensor | None

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
        **options: Any,
    ):
        mode = options.get("padding_mode", "zeros")
        if mode != "zeros" or isinstance(padding, str):
            raise TangleNASError(
                f"padding {padding!r} in the mode {mode!r}: an elastic convolution pads by a number of zeros, or by as "
                "many as keep the length for None"
            )
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
        transposed = issubclass(self.plain_class, nn.modules.conv._ConvTransposeNd)
        first, second = (inputs, outputs) if transposed else (outputs, inputs)
        grouped = groups.max > 1 or bool(groups.rows)
        if grouped:
            second = divided(second, groups)
            if len(set(second.values) | {0}) > 2 or len(set(divided(first, groups).values)) > 1:
                raise TangleNASError(
                    f"a grouped convolution keeps the channels of one group fixed, but {inputs!r} to {outputs!r} in "
                    f"groups of {groups!r} does not: let the number of groups grow with the channels"
                )
        super().__init__(
            inputs.max,
            outputs.max,
            kernel.max,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups.max,
            bias=bias,
            **options,
        )
        self._groups = groups
        # Input and output channels of a group have the same coverage, which the first dimension then gives.
        roles = ("write" if grouped else "read", "write") if transposed else ("write", "read")
        channels = (Axis.of(size, role) for size, role in zip((first, second), roles, strict=True))
        window = Axis(kernel, "window")
        self.declare(weight=(*channels, *[window] * len(self.kernel_size)), bias=(Axis.of(outputs, "write"),))

    def forward(self, x: Tensor) -> Tensor:
        weight, factors = self.unmasked("weight")
        assert weight is not None
        padding, _ = self._geometry(self.assignment)
        groups = 1 if self.groups == 1 else x.shape[1] // (self.in_channels // self.groups)
        op = ConvolutionProduct(
            self.stride,
            padding,
            self.dilation,
            groups,
            -1 - len(self.kernel_size),
            self.transposed,
            self.output_padding,
        )
        return masked(op, x, weight, self.current("bias"), factors)

    def plain(self, assignment: Assignment) -> nn.Module:
        padding, groups = self._geometry(assignment)
        first, second, *kernel = (axis.entries(assignment) for axis in self.axes["weight"])
        inputs, outputs = (first, second * groups) if self.transposed else (second * groups, first)
        more = {"output_padding": self.output_padding} if self.transposed else {}
        return self.plain_class(
            inputs,
            outputs,
            tuple(kernel),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=groups,
            bias=self.bias is not None,
            **more,  # type: ignore[arg-type]
        )

    def macs(self, output: Any) -> list[tuple[int, tuple[Size, ...]]]:
        lengths = output.shape[2:]
        if self.transposed:  # each position of the input is multiplied with the kernel
            lengths = [
                (length - 1 - more - dilation * (kernel - 1) + 2 * int(padding)) // stride + 1
                for length, more, dilation, kernel, padding, stride in zip(
                    lengths,
                    self.output_padding,
                    self.dilation,
                    self.kernel_size,
                    self.padding,
                    self.stride,
                    strict=True,
                )
            ]
        axes = self.axes["weight"]
        blocks = math.prod(axis.blocks for axis in axes)
        return [(output.shape[0] * math.prod(lengths) * blocks, tuple(axis.size for axis in axes))]

    def _geometry(self, assignment: Assignment | None) -> tuple[tuple[int, ...], int]:
        """Return padding and groups of an architecture, or of the largest network for None."""
        padding = tuple(map(int, self.padding))
        if assignment is None:
            return padding, self.groups
        kernels = (axis.size for axis in self.axes["weight"][2:])
        crops = (d * (k.max - k.value(assignment)) // 2 for d, k in zip(self.dilation, kernels, strict=True))
        return tuple(p - crop for p, crop in zip(padding, crops, strict=True)), self._groups.value(assignment)


class Conv2d(_Convolution, nn.Conv2d):
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

    plain_class = nn.Conv2d


class Conv1d(_Convolution, nn.Conv1d):
    """`nn.Conv1d` with elastic channels, groups and a nested centred kernel: `(B, C, L) -> (B, C', L')`.

    Its arguments and errors are those of `Conv2d`, in positions of the sequence instead of pixels.
    """

    plain_class = nn.Conv1d


class ConvTranspose2d(_Convolution, nn.ConvTranspose2d):  # type: ignore[misc]
    """`nn.ConvTranspose2d` with elastic channels, groups and nested centred kernel: `(B, C, H, W) -> (B, C', H', W')`.

    H' is `(H - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1` for the largest kernel,
    and the same for the others. A kernel of 2 or 4 at stride 2 doubles the image size.

    Args:
        in_channels: The number of input channels C.
        out_channels: The number of output channels C'.
        kernel_size: The height and width of the kernel, in pixels.
        stride: The stride of the output, in pixels.
        padding: The number of pixels that the largest kernel's output loses on each side. None is
            `dilation * (kernel_size - 1) // 2`. A smaller kernel's output loses fewer.
        output_padding: The number of pixels added to the output at the bottom and at the right.
        groups: The number of groups, as in `Conv2d`.
        bias: True if the convolution has a bias.
        dilation: The distance between the kernel's entries, in pixels.

    Raises:
        TangleNASError: The padding is too small for the smallest kernel, or the number of channels per group varies.
    """

    plain_class = nn.ConvTranspose2d

    def __init__(
        self,
        in_channels: Size | int,
        out_channels: Size | int,
        kernel_size: Size | int,
        stride: int = 1,
        padding: int | None = None,
        output_padding: int = 0,
        groups: Size | int = 1,
        bias: bool = True,
        dilation: int = 1,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=bias,
            output_padding=output_padding,
        )
