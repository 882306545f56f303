"""The networks inside a published MobileNetV3 (Howard et al., 2019, arXiv:1905.02244), to start from its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tanglenas_engine import Architecture, Size, TangleNASError, elastic
from tanglenas_mobilenetv3.space import Block, InvertedResiduals, check_sizes


class Layer(NamedTuple):
    """A searched block of the published network. `rest` is its end in timm's grammar, such as `c40_se0.25_nre`."""

    kernel: int
    stride: int
    expansion: float
    squeeze: float
    rest: str


class PublishedMobileNetV3(InvertedResiduals):
    """A space whose largest network is timm's: depth by stage, and kernel and expanded channels by block.

    Every stage has a choice of its depth, `depth_1` and so on. Stages with the largest kernel of the network choose
    their kernels; the other kernels are fixed.

    Args:
        blocks: The stages of the network in timm's grammar, each with its blocks separated by spaces. The first and the
            last are fixed.
        num_features: Channels of the features behind the pooling.
        expand_share: The shares of a block's expanded channels, 1 included.
        kernel_size: The kernels of stages whose kernel is the largest of them.
        drop: Dropout before the classifier.
    """

    def __init__(
        self,
        blocks: Sequence[str],
        num_features: int = 1280,
        expand_share: Sequence[float] = (0.25, 0.5, 0.75, 1),
        kernel_size: Sequence[int] = (3, 5),
        num_classes: int = 1000,
        image_size: int = 224,
        in_channels: int = 3,
        drop: float = 0.0,
        **options: Any,
    ):
        super().__init__(**options)
        first, *stages, last = blocks
        self.image_size, self.ends = image_size, (first, last)
        self.layers = [[layer for block in stage.split() for layer in _layers(block)] for stage in stages]
        if max(expand_share) != 1:
            raise TangleNASError(f"expand_share has the options {expand_share}: 1, the network itself, is the largest")
        self.settings = dict(
            num_classes=num_classes, in_chans=in_channels, stem_size=16, num_features=num_features, head_bias=True,
            drop_rate=drop,
        )  # fmt: skip
        D = [self.choice(f"depth_{s}", range(1, len(stage) + 1)) for s, stage in enumerate(self.layers, 1)]
        # Stages with the largest kernel, by their place among those that choose one.
        self.chosen = [s for s, stage in enumerate(self.layers) if all(it.kernel == max(kernel_size) for it in stage)]
        K = self.choice("kernel_size", kernel_size, per=[D[s] for s in self.chosen]) if self.chosen else None
        E = self.choice("expand_share", expand_share, per=D)
        stride = 2 * math.prod(layer.stride for stage in self.layers for layer in stage)
        check_sizes(image_size, stride * int(first.split("_s")[1][0]), kernel_size if self.chosen else (3,))

        def block(s: int, b: int, like: Any) -> Block:
            kernel, _, expansion, squeeze, _ = self.layers[s][b]
            size = Size.of(kernel) if K is None or s not in self.chosen else K[self.chosen.index(s), b]
            return Block(like, size, E[s, b] * expansion, squeeze, elastic.Conv2d)

        def searched(s: int, stage: Any) -> elastic.Depth:
            depth = elastic.Depth(D[s], [block(s, b, like) for b, like in enumerate(stage)])
            # The first one changes the shape of what it reads, so it always stays.
            depth.interchangeable = len({layer._replace(stride=1) for layer in self.layers[s][1:]}) <= 1
            return depth

        network = self.standalone(self.largest())
        self._take_over(network, [searched(s, stage) for s, stage in enumerate(list(network.blocks)[1:-1])])

    def arguments(self, architecture: Architecture) -> dict[str, Any]:
        self.assignment_of(architecture)
        choices = architecture.choices
        kernels, shares = iter(choices.get("kernel_size", ())), iter(choices["expand_share"])
        searched = []
        for s, stage in enumerate(self.layers):
            used = stage[: choices[f"depth_{s + 1}"]]
            sizes = [next(kernels) if s in self.chosen else layer.kernel for layer in used]
            searched.append(
                [
                    f"ir_r1_k{kernel}_s{layer.stride}_e{next(shares) * layer.expansion}_{layer.rest}"
                    for kernel, layer in zip(sizes, used, strict=True)
                ]
            )
        first, last = self.ends
        return {"arch_def": [[first], *searched, [last]], **self.settings}


def _layers(block: str) -> Iterator[Layer]:
    """Yield the layers of a block in timm's grammar: `r3` repeats it, and only the first one has its stride."""
    match = re.fullmatch(r"ir_r(\d+)_k(\d+)_s([12])_e([\d.]+)_(c\d+(?:_se([\d.]+))?(?:_n\w+)?)", block)
    if match is None:
        raise TangleNASError(f"block {block!r} cannot be read: expected one such as 'ir_r3_k5_s2_e3_c40_se0.25_nre'")
    repeats, kernel, stride, expansion, rest, squeeze = match.groups()
    for number in range(int(repeats)):
        yield Layer(int(kernel), 1 if number else int(stride), float(expansion), float(squeeze or 0), rest)
