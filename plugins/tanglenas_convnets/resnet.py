"""The space of ResNets inside a published one (He et al., 2016, arXiv:1512.03385), on timm's parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor

from tanglenas_convnets.network import BLOCKS, resize, resnet
from tanglenas_convnets.published import PublishedConvNet
from tanglenas_engine import Architecture, elastic, unknown


class ResNet(PublishedConvNet):
    """A space of ResNets: depth and channels by stage, and the channels inside every block.

    The stem in front of basic blocks has the channels of the first stage.

    Args:
        block: "basic" (ResNet-18 and 34) or "bottleneck" (ResNet-50 and deeper).
        depth: Numbers of blocks of each stage.
        channels: Channels of each stage in basic blocks. Bottlenecks have these inside, and 4 times as many outside.
        width_share: Shares of the channels between the blocks of a stage, 1 included.
        hidden_share: Shares of the channels inside a block, 1 included.
        drop: Dropout before the classifier.
        drop_path: Stochastic depth of the largest network. A block's rate grows with its place. A network of less
            depth, once extracted, spreads the rates over its own blocks, as timm does.
    """

    model, first_conv, output_layer = "tanglenas_resnet", "conv1", "fc"

    def __init__(
        self,
        block: str = "basic",
        depth: Sequence[Sequence[int]] = ((1, 2), (1, 2), (1, 2), (1, 2)),
        channels: Sequence[int] = (64, 128, 256, 512),
        width_share: Sequence[float] = (0.5, 0.75, 1),
        hidden_share: Sequence[float] = (0.25, 0.5, 0.75, 1),
        num_classes: int = 1000,
        image_size: int = 224,
        in_channels: int = 3,
        drop: float = 0.0,
        drop_path: float = 0.0,
        **options: Any,
    ):
        super().__init__(**options)
        if block not in BLOCKS:
            raise unknown("block", block, BLOCKS)
        self.image_size = image_size
        self.settings = dict(num_classes=num_classes, in_chans=in_channels, drop_rate=drop, drop_path_rate=drop_path)
        self.block = block
        D, widths, hidden = self.choose(depth, channels, BLOCKS[block].expansion, 1, width_share, hidden_share)
        network = TimmResNet(BLOCKS[block], tuple(choice.max for choice in D), **self.settings)
        inner = [size for stage in hidden for size in stage]
        resize(network, block, widths, inner, elastic.Conv2d, elastic.BatchNorm2d, elastic.Linear)
        network.init_weights()
        for name, child in network.named_children():
            stage = int(name[-1]) - 1 if name.startswith("layer") else None
            self.add_module(name, child if stage is None else elastic.Depth(D[stage], child))

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.global_pool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.fc(F.dropout(x, self.settings["drop_rate"], self.training))

    def standalone(self, architecture: Architecture) -> TimmResNet:
        return resnet(**self.arguments(architecture))

    def arguments(self, architecture: Architecture) -> dict[str, Any]:
        return {"block": self.block, **self.chosen(architecture), **self.settings}
