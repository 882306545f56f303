"""The space of ConvNeXts inside a published one (Liu et al., 2022, arXiv:2201.03545), on timm's parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from torch import Tensor, nn

from tanglenas_convnets.network import convnext, initialise
from tanglenas_convnets.published import PublishedConvNet
from tanglenas_engine import Architecture, Size, TangleNASError, elastic


class Mlp(nn.Module):
    """An elastic form of timm's MLP: `(B, H, W, C) -> (B, H, W, C)`."""

    def __init__(self, width: Size, hidden: Size):
        super().__init__()
        self.fc1 = elastic.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = elastic.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(elastic.Elastic):
    """An elastic form of timm's block: a depthwise convolution and an MLP, scaled: `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, width: Size, hidden: Size, kernel: Size, layer_scale: float, drop_path: nn.Module):
        super().__init__()
        self.conv_dw = elastic.Conv2d(width, width, kernel, groups=width)
        self.norm = elastic.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)
        self.layer_scale = layer_scale
        self.gamma = nn.Parameter(torch.empty(width.max))
        self.declare(gamma=(width,))
        self.drop_path = drop_path
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.drop_path(y.mul(self.current("gamma").reshape(1, -1, 1, 1))) + x


class Stage(nn.Module):
    """A stage with timm's names: a convolution that halves the image, except in the first stage, and blocks."""

    def __init__(self, downsample: nn.Module, blocks: nn.Module):
        super().__init__()
        self.downsample, self.blocks = downsample, blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNeXt(PublishedConvNet):
    """A space of ConvNeXts: depth and channels by stage, kernel and hidden units of every block.

    Args:
        depth: Numbers of blocks of each stage.
        channels: Channels of each stage.
        width_share: Shares of the channels of a stage, 1 included.
        hidden_share: Shares of the hidden units of a block, which has 4 times the channels at most. 1 is included.
        kernel_size: Kernels of a block's depthwise convolution.
        patch_size: Size and stride of the first convolution: 4, as published, or 1 for small images.
        layer_scale: Initial scale of every block.
        drop: Dropout before the classifier.
        drop_path: Stochastic depth of the largest network. A block's rate grows with its place. A network of less
            depth, once extracted, spreads the rates over its own blocks, as timm does.
    """

    model, first_conv, output_layer = "tanglenas_convnext", "stem.0", "head.fc"

    def __init__(
        self,
        depth: Sequence[Sequence[int]] = ((1, 2, 3), (1, 2, 3), (3, 5, 7, 9), (1, 2, 3)),
        channels: Sequence[int] = (96, 192, 384, 768),
        width_share: Sequence[float] = (0.5, 0.75, 1),
        hidden_share: Sequence[float] = (0.25, 0.5, 0.75, 1),
        kernel_size: Sequence[int] = (3, 5, 7),
        patch_size: int = 4,
        num_classes: int = 1000,
        image_size: int = 224,
        in_channels: int = 3,
        layer_scale: float = 1e-6,
        drop: float = 0.0,
        drop_path: float = 0.0,
        **options: Any,
    ):
        super().__init__(**options)
        if patch_size not in (1, 4):
            raise TangleNASError(f"patch_size is {patch_size}, expected 4 or, for small images, 1")
        _check_kernels(image_size, 8 * patch_size, kernel_size)
        self.image_size = image_size
        self.settings = dict(
            num_classes=num_classes, in_chans=in_channels, patch_size=patch_size, ls_init_value=layer_scale,
            drop_rate=drop, drop_path_rate=drop_path,
        )  # fmt: skip
        D, widths, hidden = self.choose(depth, channels, 1, 4, width_share, hidden_share)
        K = self.choice("kernel_size", kernel_size, per=D)
        network = TimmConvNeXt(depths=tuple(d.max for d in D), dims=tuple(channels), **self.settings)
        self.stem = nn.Sequential(
            elastic.Conv2d(in_channels, widths[0], patch_size, patch_size, padding=0), elastic.LayerNorm2d(widths[0])
        )
        self.stages = nn.Sequential()
        for s, (stage, width) in enumerate(zip(network.stages, widths, strict=True)):
            halved = (elastic.LayerNorm2d(widths[s - 1]), elastic.Conv2d(widths[s - 1], width, 2, 2, padding=0))
            blocks = [
                Block(width, hidden[s][b], K[s, b], layer_scale, like.drop_path) for b, like in enumerate(stage.blocks)
            ]
            self.stages.append(Stage(nn.Sequential(*halved) if s else nn.Identity(), elastic.Depth(D[s], blocks)))
        self.head = network.head
        self.head.norm = elastic.LayerNorm2d(widths[-1])
        self.head.fc = elastic.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        return self.head(self.stages(self.stem(x)))

    def standalone(self, architecture: Architecture) -> TimmConvNeXt:
        return convnext(**self.arguments(architecture))

    def arguments(self, architecture: Architecture) -> dict[str, Any]:
        return {**self.chosen(architecture), "kernels": list(architecture.choices["kernel_size"]), **self.settings}


def _check_kernels(image_size: int, stride: int, kernels: Sequence[int]) -> None:
    """Refuse kernels without a centre, and images on which two kernels are the same network."""
    if any(kernel % 2 == 0 for kernel in kernels):
        raise TangleNASError(f"kernel_size has the options {tuple(kernels)}: only odd kernels have a centre")
    # The outermost weights of the largest kernel must reach a pixel of the last maps.
    least = stride * (max(kernels) // 2 + 1) if len(kernels) > 1 else stride
    if image_size < least:
        raise TangleNASError(
            f"images of {image_size} pixels shrink to {image_size // stride} in the last stage, on which kernels of "
            f"{max(kernels)} do no more than smaller ones: use at least {least} pixels, smaller kernels, or a "
            "patch_size of 1"
        )
