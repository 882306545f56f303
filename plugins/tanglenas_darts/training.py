"""How DARTS trains the networks that it finds (Liu et al., 2019, section 3.1): scheduled drop path, auxiliary head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from tanglenas_engine import TangleNASError


class ScheduledDropPath(StochasticDepth):
    """Drop path whose probability rises linearly over the training, from 0 to `last`."""

    def __init__(self, last: float):
        super().__init__(0.0, mode="row")
        self.last = last

    def set_progress(self, fraction: float) -> None:
        self.p = fraction * self.last


class WithAuxiliaryHead(nn.Module):
    """A network of the DARTS space with a second classifier, behind the cell at two thirds of its depth.

    What `retrain` trains in place of the network. In train mode it gives both logits, `2 x (B, num_classes)`, the
    network's first; `tanglenas_engine.auxiliary` is a loss for that.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.cell = 2 * len(network.cells) // 3
        classifier = network.head[-1]
        # From its second reduction on a network keeps its width: these cells are as wide as the last one.
        self.auxiliary = AuxiliaryHead(classifier.in_features, classifier.out_features)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.training:
            return self.network(x)
        features = list(self.network.features(x))
        return self.network.head(features[-1]), self.auxiliary(features[self.cell])


class AuxiliaryHead(nn.Sequential):
    """DARTS' classifier on features `(B, channels, H, W)`, H = W of at least 2."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__(
            nn.ReLU(), FourAverages(),
            nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768), nn.ReLU(),
            nn.Flatten(), nn.Linear(768, num_classes),
        )  # fmt: skip


class FourAverages(nn.Module):
    """Averages over four windows of 5/8 of the side, 5 x 5 of DARTS' 8 x 8 pixels: `(B, C, H, W) -> (B, C, 2, 2)`."""

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        if side < 2:
            raise TangleNASError(
                "an auxiliary head needs maps of 2 x 2 pixels: use images of at least 8 x 8, or no head"
            )
        window = 5 * side // 8
        return F.avg_pool2d(x, window, side - window)
