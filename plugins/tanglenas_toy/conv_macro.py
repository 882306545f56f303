"""The toy space of plain convolutions (Sukthanker et al. 2023, arXiv:2312.10440, the toy "conv macro" space)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine import Architecture, SearchSpace, TangleNASError, elastic, unknown

NAMES = ("channels1", "channels2", "channels3", "channels4")


class ConvMacro(SearchSpace):
    """A space of the channels and kernel sizes of four convolutions.

    A convolution of fixed width and a classifier follow them. Nothing is normalised.

    Args:
        channels1: Output channels of the first convolution; `channels2` to `channels4` are those of the next three.
        kernel_size: Options of each of the four kernels.
        image_size: A multiple of 4 of at least 16; two poolings halve it.
        dropout: Probability of dropping a channel behind the third convolution; 0.5 in the paper.
        weight_init: "he" keeps the variance of activations from layer to layer (arXiv:1502.01852) in the largest
            network, and in all that are trained by themselves. "torch" is torch's default, as in the paper. Each layer
            then divides the variance by 6, and short trainings learn little.
    """

    def __init__(
        self,
        channels1: Sequence[int] = (8, 16, 32),
        channels2: Sequence[int] = (16, 32, 64),
        channels3: Sequence[int] = (32, 64, 128),
        channels4: Sequence[int] = (64, 128, 256),
        kernel_size: Sequence[int] = (3, 5, 7),
        num_classes: int = 10,
        image_size: int = 32,
        in_channels: int = 3,
        dropout: float = 0.0,
        weight_init: str = "he",
        **options: Any,
    ):
        super().__init__(**options)
        if image_size % 4 or image_size < 16:
            raise TangleNASError(
                f"image_size is {image_size}: two poolings halve the image, and the kernels of 7 behind them need "
                "maps of at least 4 pixels. Choose a multiple of 4 from 16 on, such as 28, 32 or 64"
            )
        self.input_shape = in_channels, image_size, image_size
        options_by_layer = (channels1, channels2, channels3, channels4)
        C = [self.choice(name, listed) for name, listed in zip(NAMES, options_by_layer, strict=True)]
        K = self.choice("kernel_size", kernel_size, per=4)
        self.conv1 = elastic.Conv2d(in_channels, C[0], K[0])
        self.conv2 = elastic.Conv2d(C[0], C[1], K[1])
        self.conv3 = elastic.Conv2d(C[1], C[2], K[2])
        self.conv4 = elastic.Conv2d(C[2], C[3], K[3])
        self.conv5 = elastic.Conv2d(C[3], 256, 7, padding=2)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(256 * (image_size // 4 - 2) ** 2, 256), nn.ReLU(),
            nn.Linear(256, 128), nn.ReLU(),
            nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, num_classes),
        )  # fmt: skip
        if weight_init not in ("he", "torch"):
            raise unknown("weight_init", weight_init, ("he", "torch"))
        self.weight_init = weight_init
        self._initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.dropout(F.max_pool2d(F.relu(self.conv3(x)), 2))
        x = F.relu(self.conv5(F.relu(self.conv4(x))))
        return self.head(x)

    def standalone(self, architecture: Architecture) -> nn.Module:
        return self._initialise(super().standalone(architecture))

    def _initialise(self, network: nn.Module) -> nn.Module:
        own = [module for name, module in network.named_modules() if name.startswith(("conv", "head."))]
        for module in own if self.weight_init == "he" else ():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return network

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.input_shape)

    def to_string(self, architecture: Architecture) -> str:
        """Return the key of the authors' table, `"[[c1, c2, c3, c4], [k1, k2, k3, k4]]"`.

        Raises:
            TangleNASError: The architecture is not of this space.
        """
        self.assignment_of(architecture)
        return str([[architecture.choices[name] for name in NAMES], list(architecture.choices["kernel_size"])])

    def from_string(self, text: str) -> Architecture:
        """Return the architecture of a key of the authors' table.

        Raises:
            TangleNASError: The text is no key, or it has options that this space lacks.
        """
        try:
            (c1, c2, c3, c4), kernels = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            raise TangleNASError(
                f"{text!r} is not an architecture of {self.label}: expected [[c1, c2, c3, c4], [k1, k2, k3, k4]], "
                "as to_string writes it"
            ) from None
        return self.architecture(channels1=c1, channels2=c2, channels3=c3, channels4=c4, kernel_size=kernels)
