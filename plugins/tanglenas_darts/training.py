"""Scheduled drop path and the auxiliary head, with which DARTS trains its networks (Liu et al., 2019, section 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from tanglenas_engine import TangleNASError


class ScheduledDropPath(StochasticDepth):
    """A drop path whose probability rises linearly over the training, from 0 to `last`."""

    def __init__(self, last: float):
        super().__init__(0.0, mode="row")
        self.last = last

    def set_progress(self, fraction: float) -> None:
        self.p = fraction * self.last


class WithAuxiliaryHead(nn.Module):
    """A network of the DARTS space with a second classifier, behind the cell at two thirds of its depth.

    `retrain` trains this module in place of the network. In train mode it returns the logits of both classifiers,
    `2 x (B, num_classes)`; the network's come first. `tanglenas_engine.auxiliary` is a loss for the pair.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.cell = 2 * len(network.cells) // 3
        classifier = network.head[-1]
        # A network keeps its width from the second reduction on, so this cell is as wide as the last one.
        self.auxiliary = AuxiliaryHead(classifier.in_features, classifier.out_features)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.training:
            return self.network(x)
        features = list(self.network.features(x))
        return self.network.head(features[-1]), self.auxiliary(features[self.cell])


class AuxiliaryHead(nn.Sequential):
    """The auxiliary classifier of DARTS on features `(B, channels, H, W)`, where H = W is at least 2."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__(
            nn.ReLU(), FourAverages(),
            nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768), nn.ReLU(),
            nn.Flatten(), nn.Linear(768, num_classes),
        )  # fmt: skip


class FourAverages(nn.Module):
    """An average over four windows of 5/8 of the side: `(B, C, H, W) -> (B, C, 2, 2)`.

    DARTS' windows are 5 x 5 of 8 x 8 pixels.
    """

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        if side < 2:
            raise TangleNASError(
                "an auxiliary head needs maps of 2 x 2 pixels: use images of at least 8 x 8, or no head"
            )
        window = 5 * side // 8
        return F.avg_pool2d(x, window, side - window)
