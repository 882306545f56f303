"""A space of residual MLPs: their width, their depth, and the width inside each block."""

import torch
from torch import Tensor, nn

from tanglenas_engine import SearchSpace, elastic


class Block(nn.Module):
    def __init__(self, width, ratio):
        super().__init__()
        self.norm = elastic.LayerNorm(width)
        self.up = elastic.Linear(width, width * ratio)
        self.down = elastic.Linear(width * ratio, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class ExampleSpace(SearchSpace):
    """A space of residual MLPs on the pixels of small images.

    Args:
        width: Features between blocks.
        depth: Numbers of blocks.
        ratio: Features inside a block, as a multiple of `width`; chosen for every block.
    """

    def __init__(
        self,
        width=(16, 32, 48),
        depth=(1, 2, 3),
        ratio=(1, 2, 4),
        num_classes: int = 10,
        image_size: int = 8,
        in_channels: int = 1,
        **options,
    ):
        super().__init__(**options)
        self.input_shape = in_channels, image_size, image_size
        W, D = self.choice("width", width), self.choice("depth", depth)
        R = self.choice("ratio", ratio, per=D)
        self.stem = elastic.Linear(in_channels * image_size**2, W)
        self.blocks = elastic.Depth(D, [Block(W, R[i]) for i in range(D.max)])
        self.norm = elastic.LayerNorm(W)
        self.head = elastic.Linear(W, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        return self.head(self.norm(self.blocks(self.stem(x.flatten(1)))))

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.input_shape)
