"""The operations of DARTS (Liu et al., 2019, arXiv:1806.09055): `(B, C, H, W) -> (B, C', H / stride, W / stride)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tanglenas_engine import elastic
from tanglenas_engine.size import Size


class Nothing(nn.Module):
    """The operation of an edge that is not there: zeros."""

    def __init__(self, stride: int = 1):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Separable(nn.Sequential):
    """ReLU, depthwise and pointwise convolution, BatchNorm, twice; the first depthwise one has the stride."""

    def __init__(self, channels: int, kernel: Size | int, stride: int = 1, affine: bool = False):
        super().__init__(*(layer for s in (stride, 1) for layer in _stage(channels, kernel, s, 1, affine)))


class Dilated(nn.Sequential):
    """ReLU, depthwise convolution with dilation 2, pointwise convolution, BatchNorm."""

    def __init__(self, channels: int, kernel: Size | int, stride: int = 1, affine: bool = False):
        super().__init__(*_stage(channels, kernel, stride, 2, affine))


class Pointwise(nn.Sequential):
    """ReLU, convolution, BatchNorm."""

    def __init__(self, channels_in: int, channels: int, affine: bool = False):
        super().__init__(
            nn.ReLU(), nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=affine)
        )


class FactorizedReduce(nn.Module):
    """Half of the channels from the even pixels, half from the odd ones: `(B, C, H, W) -> (B, C', H / 2, W / 2)`."""

    def __init__(self, channels_in: int, channels: int, affine: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels // 2, 1, stride=2, bias=False)
        self.conv2 = nn.Conv2d(channels_in, channels - channels // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.norm(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], 1))


def skip(channels: int, stride: int = 1, affine: bool = False) -> nn.Module:
    """The identity, or what comes closest to it with a stride."""
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


def pool(kind: str, channels: int, stride: int = 1, norm: bool = True) -> nn.Module:
    """ "max" or "avg" pooling over 3 x 3 pixels, with a BatchNorm behind it that keeps it in scale with the others."""
    layer = nn.MaxPool2d(3, stride, 1) if kind == "max" else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    return nn.Sequential(layer, nn.BatchNorm2d(channels, affine=False)) if norm else layer


def _stage(channels: int, kernel: Size | int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    return [
        nn.ReLU(),
        elastic.Conv2d(channels, channels, kernel, stride, dilation=dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]
