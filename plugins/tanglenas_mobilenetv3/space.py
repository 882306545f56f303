"""Once-for-All's space of MobileNetV3 networks on timm's parts (Cai et al., 2020, section 3)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import make_divisible
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._efficientnet_builder import efficientnet_init_weights, round_channels
from timm.models.mobilenetv3 import MobileNetV3 as TimmMobileNetV3
from torch import Tensor, nn

from tanglenas_engine import Architecture, Size, TangleNASError, elastic
from tanglenas_mobilenetv3.kernels import TransformedConv2d
from tanglenas_mobilenetv3.network import mobilenetv3, squeeze_excite
from tanglenas_timm.space import TimmSpace


class Block(nn.Module):
    """An elastic form of timm's inverted residual: expansion, depthwise convolution, squeeze-excite and projection."""

    def __init__(self, like: InvertedResidual, kernel: Size, ratio: Size, squeeze: float, conv_dw: type[nn.Module]):
        super().__init__()
        inputs, outputs, stride = like.conv_pw.in_channels, like.conv_pwl.out_channels, like.conv_dw.stride[0]
        hidden = (ratio * inputs).map(make_divisible)  # timm's own rounding, here and below
        self.conv_pw = elastic.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = elastic.BatchNorm2d(hidden)
        self.conv_dw = conv_dw(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self.bn2 = elastic.BatchNorm2d(hidden)
        self.se = nn.Identity()
        if squeeze:
            reduced = hidden.map(lambda channels: round_channels(channels * squeeze))
            self.se = squeeze_excite(1)
            self.se.conv_reduce = elastic.Conv2d(hidden, reduced, 1)
            self.se.conv_expand = elastic.Conv2d(reduced, hidden, 1)
        self.conv_pwl = elastic.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3, self.act, self.has_skip = like.bn3, like.bn1.act, like.has_skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv_pw(x)))
        y = self.act(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(self.se(y)))
        return x + y if self.has_skip else y


class InvertedResiduals(TimmSpace):
    """A space of timm's `MobileNetV3`, whose parameter names it has.

    A subclass makes the choices and takes timm's modules over with `_take_over`. `arguments` describes an
    architecture.
    """

    model = "tanglenas_mobilenetv3"
    first_conv = "conv_stem"
    output_layer = "classifier"

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        x = self.blocks(self.bn1(self.conv_stem(x)))
        x = self.act2(self.conv_head(self.global_pool(x)))
        return self.classifier(F.dropout(x.flatten(1), self.settings["drop_rate"], self.training))

    def standalone(self, architecture: Architecture) -> TimmMobileNetV3:
        return mobilenetv3(**self.arguments(architecture))

    def _take_over(self, network: TimmMobileNetV3, stages: Iterable[nn.Module]) -> None:
        """Take over the modules of the largest network, with elastic stages in place of those behind the first."""
        for number, stage in enumerate(stages, 1):
            network.blocks[number] = stage
        for name, child in network.named_children():
            self.add_module(name, child)
        efficientnet_init_weights(self)


class MobileNetV3(InvertedResiduals):
    """A space of MobileNetV3 networks: the depth of every stage, the kernel size and the expansion of every block.

    Parameter names and largest shapes are those of timm's `MobileNetV3`. The first block of a stage changes width
    and resolution, so a stage is never empty. Lists of an architecture have one entry for each block in use.
    `architecture()` also takes Once-for-All's own lists, with entries for all blocks.

    Args:
        stages: Stride, width, activation and squeeze-excite of each searched stage, in timm's grammar
            (`s2_c40_nre_se0.25`; `nhs` is hard-swish, the default).
        stem_width: Channels of the stem and of the first block, which is fixed.
        head_widths: Channels of the last convolution and of the features behind the pooling.
        width_mult: Factor of all widths, rounded to multiples of 8.
        kernel_transform: Use Once-for-All's learned matrices between kernel sizes, in place of nested windows.
        drop: Dropout before the classifier; 0.1 in Once-for-All.
    """

    def __init__(
        self,
        depth: Sequence[int] = (2, 3, 4),
        kernel_size: Sequence[int] = (3, 5, 7),
        expand_ratio: Sequence[float] = (3, 4, 6),
        stages: Sequence[str] = (
            "s2_c24_nre", "s2_c40_nre_se0.25", "s2_c80_nhs", "s1_c112_nhs_se0.25", "s2_c160_nhs_se0.25",
        ),
        num_classes: int = 1000,
        image_size: int = 224,
        in_channels: int = 3,
        stem_width: int = 16,
        head_widths: Sequence[int] = (960, 1280),
        width_mult: float = 1.0,
        kernel_transform: bool = False,
        drop: float = 0.0,
        **options: Any,
    ):  # fmt: skip
        super().__init__(**options)
        strides, squeezes = zip(*map(_stride_and_squeeze, stages), strict=True)
        self.image_size, self.stages = image_size, tuple(stages)
        last, features = head_widths
        self.ends = [f"ds_r1_k3_s1_e1_c{stem_width}_nre"], [f"cn_r1_k1_s1_c{last}"]
        self.settings = dict(
            num_classes=num_classes, in_chans=in_channels, stem_size=stem_width, num_features=features,
            width_mult=width_mult, drop_rate=drop,
        )  # fmt: skip
        D = self.choice("depth", depth, per=len(stages))
        K = self.choice("kernel_size", kernel_size, per=D)
        E = self.choice("expand_ratio", expand_ratio, per=D)
        check_sizes(image_size, 2 * math.prod(strides), K.options, width_mult)
        conv = TransformedConv2d if kernel_transform else elastic.Conv2d
        network = self.standalone(self.largest())
        self._take_over(
            network,
            (
                elastic.Depth(D[s], [Block(like, K[s, b], E[s, b], squeeze, conv) for b, like in enumerate(stage)])
                for s, (squeeze, stage) in enumerate(zip(squeezes, list(network.blocks)[1:], strict=False))
            ),
        )

    def arguments(self, architecture: Architecture) -> dict[str, Any]:
        """Return the arguments of `mobilenetv3` for an architecture, as JSON can hold them."""
        self.assignment_of(architecture)
        depths, kernels, ratios = (architecture.choices[name] for name in ("depth", "kernel_size", "expand_ratio"))
        blocks = iter(f"ir_r1_k{k}_e{e}" for k, e in zip(kernels, ratios, strict=True))
        searched = [
            [f"{next(blocks)}_{stage}" for _ in range(depth)] for depth, stage in zip(depths, self.stages, strict=True)
        ]
        first, last = self.ends
        return {"arch_def": [first, *searched, last], **self.settings}


def _stride_and_squeeze(stage: str) -> tuple[int, float]:
    match = re.fullmatch(r"s([12])_c[1-9]\d*(?:_n(?:re|r6|hs|sw))?(?:_se(0?\.\d+|1))?", stage)
    if match is None:
        raise TangleNASError(f"stage {stage!r} cannot be read: expected stride and width, as in 's2_c40_nre_se0.25'")
    return int(match[1]), float(match[2] or 0)


def check_sizes(image_size: int, stride: int, kernels: Sequence[float], width_mult: float = 1.0) -> None:
    """Refuse options that make no network, and images on which two kernel sizes are the same network."""
    if not 0 < width_mult < math.inf:
        raise TangleNASError(f"width_mult is {width_mult}, expected a positive number, such as 1.0")
    if stride > 32:
        raise TangleNASError(f"stem and stages reduce an image by {stride}, timm's network by at most 32: use more s1")
    if any(kernel % 2 == 0 for kernel in kernels):
        raise TangleNASError(f"kernel_size has the options {kernels}: only odd kernels have a centre")
    # The outermost weights of the largest kernel must reach a pixel of the last maps.
    least = stride * (max(kernels) // 2) + 1 if len(kernels) > 1 else 1
    if image_size < least:
        raise TangleNASError(
            f"images of {image_size} pixels shrink to {math.ceil(image_size / stride)} in the last stage, on which "
            f"kernels of {max(kernels)} do no more than smaller ones: use at least {least} pixels, smaller kernels, "
            "or more s1 in stages"
        )
