"""The standalone networks: timm's ResNet and ConvNeXt with the sizes of every stage and block as chosen.

Importing this module registers them with timm as `tanglenas_resnet` and `tanglenas_convnext`. An exported folder then
loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from timm.layers import Mlp, create_conv2d
from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

default_cfgs = generate_default_cfgs(
    {
        "tanglenas_resnet.untrained": {"first_conv": "conv1", "classifier": "fc"},
        "tanglenas_convnext.untrained": {"first_conv": "stem.0", "classifier": "head.fc"},
    }
)

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
STEM = 64
"""The channels of the stem in front of bottlenecks. In front of basic blocks, it has those of the first stage."""


def resnet(block: str, depths: Sequence[int], widths: Sequence[int], hidden: Sequence[int], **options: Any) -> ResNet:
    """Build timm's `ResNet` with other channels in each stage and each block.

    Args:
        block: "basic" or "bottleneck".
        depths: Blocks of each stage.
        widths: Channels between the blocks of each stage.
        hidden: Channels inside each block, of all stages in a row.
    """
    network = ResNet(BLOCKS[block], tuple(depths), **options)
    resize(network, block, widths, hidden, nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    network.num_features = network.head_hidden_size = widths[-1]
    for info, channels in zip(network.feature_info, (network.conv1.out_channels, *widths), strict=True):
        info["num_chs"] = channels
    network.init_weights()
    return network


def resize(
    network: ResNet,
    block: str,
    widths: Sequence[Any],
    hidden: Sequence[Any],
    conv2d: Callable[..., nn.Module],
    batch_norm: Callable[[Any], nn.Module],
    linear: Callable[[Any, int], nn.Module],
) -> None:
    """Give a ResNet layers of other sizes, made by `conv2d`, `batch_norm` and `linear` from ints or Sizes."""
    width = STEM if block == "bottleneck" else widths[0]
    network.conv1 = conv2d(network.conv1.in_channels, width, 7, 2, 3, bias=False)
    network.bn1 = batch_norm(width)
    inner = iter(hidden)
    for stage, outer in zip((network.layer1, network.layer2, network.layer3, network.layer4), widths, strict=True):
        for number, module in enumerate(stage):
            middle = next(inner)
            names = [name for name, _ in module.named_children() if name.startswith("conv")]
            sizes = pairwise((width, *[middle] * (len(names) - 1), outer))
            for name, (inputs, outputs) in zip(names, sizes, strict=True):
                old = getattr(module, name)
                form = (old.kernel_size[0], old.stride[0], old.padding[0])
                setattr(module, name, conv2d(inputs, outputs, *form, bias=False))
                setattr(module, name.replace("conv", "bn"), batch_norm(outputs))
            if number == 0:
                shortcut = (conv2d(width, outer, 1, module.stride, 0, bias=False), batch_norm(outer))
                behind_stem = block == "basic" and stage is network.layer1  # and of the same channels
                module.downsample = None if behind_stem else nn.Sequential(*shortcut)
            width = outer
    network.fc = linear(width, network.num_classes)


def convnext(
    depths: Sequence[int], widths: Sequence[int], hidden: Sequence[int], kernels: Sequence[int], **options: Any
) -> ConvNeXt:
    """Build timm's `ConvNeXt` with other hidden units and another kernel in each block.

    Args:
        depths: Blocks of each stage.
        widths: Channels of each stage.
        hidden: Hidden units of the MLP of each block, of all stages in a row.
        kernels: Kernel sizes of each block, of all stages in a row.
    """
    network = ConvNeXt(depths=tuple(depths), dims=tuple(widths), **options)
    blocks = [(block, width) for stage, width in zip(network.stages, widths, strict=True) for block in stage.blocks]
    for (block, width), units, kernel in zip(blocks, hidden, kernels, strict=True):
        block.conv_dw = create_conv2d(width, width, kernel, depthwise=True, bias=True)
        block.mlp = Mlp(width, units)
    initialise(network)
    return network


def initialise(network: nn.Module) -> None:
    """Initialise as timm's ConvNeXt does."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@register_model
def tanglenas_resnet(pretrained: bool = False, **options: Any) -> ResNet:
    """Build a network that TangleNAS found; the options are those of `resnet`."""
    return build_model_with_cfg(resnet, "tanglenas_resnet", pretrained, **options)


@register_model
def tanglenas_convnext(pretrained: bool = False, **options: Any) -> ConvNeXt:
    """Build a network that TangleNAS found; the options are those of `convnext`."""
    return build_model_with_cfg(convnext, "tanglenas_convnext", pretrained, **options)
