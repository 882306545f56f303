"""Small search spaces: together they have every elastic layer, and Sizes of every form.

`SPACES`, `LAYERS` and `STACKS` are those made here, `REGISTERED` the names of those that the installed plugins bring.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine import SearchSpace, elastic, elasticize
from tanglenas_engine.plugins import create_space, manager
from tanglenas_engine.superposition.size import make_divisible
from tanglenas_vit.autoformer import AutoFormer


class Bottleneck(nn.Module):
    """Expand, convolve depthwise, project, with a residual."""

    def __init__(self, width, ratio, kernel, dilation):
        super().__init__()
        hidden = make_divisible(width * ratio, 2)
        self.expand = elastic.Conv2d(width, hidden, 1, bias=False)
        self.norm1 = elastic.BatchNorm2d(hidden)
        self.depthwise = elastic.Conv2d(hidden, hidden, kernel, dilation=dilation, groups=hidden, bias=False)
        self.norm2 = elastic.BatchNorm2d(hidden, affine=False)
        self.project = elastic.Conv2d(hidden, width, 1, bias=False)
        self.norm3 = elastic.BatchNorm2d(width, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.expand(x)))
        y = F.relu(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.project(y))


class Convolutional(SearchSpace):
    """Strided stem with a kernel choice, bottlenecks, a convolution whose groups grow, and a linear head."""

    def __init__(self, num_classes=3, image_size=6, in_channels=2, **options):
        super().__init__(**options)
        self.input_shape = in_channels, image_size, image_size
        width = self.choice("width", (6, 2, 4))
        stem = self.choice("stem_kernel", (5, 3, 7))
        depth = self.choice("depth", (2, 1))
        kernel = self.choice("kernel", (3, 5, 1), per=depth)
        ratio = self.choice("ratio", (1.5, 2), per=depth)
        self.colours = nn.Sequential(nn.Conv2d(in_channels, 3, 1), nn.Sequential())
        self.stem = elastic.Conv2d(3, width, stem, stride=2)
        self.blocks = elastic.Depth(
            depth, [Bottleneck(width, ratio[i], kernel[i], dilation=1 + i) for i in range(depth.max)]
        )
        self.grouped = elastic.Conv2d(width, width * 2, 3, groups=width // 2)
        self.head = elastic.Linear(width * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(self.colours(x))))
        return self.head(torch.tanh(self.grouped(x)).mean((2, 3)))

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.input_shape)


class Decoder(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1 = elastic.LayerNorm(width, bias=False)
        self.attn = elastic.Attention(width, heads, head_dim=3, causal=True, qkv_bias=False)
        self.norm2 = elastic.LayerNorm(width, elementwise_affine=False)
        self.fc1 = elastic.Linear(width, hidden)
        self.fc2 = elastic.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Language(SearchSpace):
    """A causal transformer over tokens, with a product of three choices and a buffer that is not saved."""

    def __init__(self, vocab_size=7, block_size=5, **options):
        super().__init__(**options)
        self.settings = {"vocab_size": vocab_size, "block_size": block_size}
        self.width = width = self.choice("width", (4, 8, 5))
        layers = self.choice("layers", (1, 2))
        heads = self.choice("heads", (3, 1, 2), per=layers)
        ratio = self.choice("ratio", (0.5, 1.5), per=layers)
        multiple = self.choice("multiple", (2, 1))
        self.tokens = elastic.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(block_size, width.max))
        self.reset_parameters()
        self.register_buffer("waves", torch.rand(block_size, width.max), persistent=False)
        self.declare(positions=(None, width), waves=(None, width))
        self.blocks = elastic.Depth(
            layers, [Decoder(width, heads[i], width * ratio[i] * multiple) for i in range(layers.max)]
        )
        self.norm = elastic.LayerNorm(width)
        self.head = elastic.Linear(width, vocab_size, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.positions)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.tokens(indices) + self.current("positions") + self.current("waves")
        return self.head(self.norm(self.blocks(x)))

    def example_input(self, batch: int) -> Tensor:
        return torch.randint(self.settings["vocab_size"], (batch, self.settings["block_size"]))


class Stages(SearchSpace):
    """Two stages of which the second may be empty, and a choice made a number of times that is no depth."""

    def __init__(self, **options):
        super().__init__(**options)
        widths = self.choice("widths", (4, 3), per=2)
        layers = self.choice("layers", (1, 2, 3))
        self.first = elastic.Linear(3, widths[0])
        count = layers * 0.75  # 0, 1 or 2 layers
        self.stage = elastic.Depth(count, [elastic.Linear(widths[0], widths[0]) for _ in range(count.max)])
        self.last = nn.Sequential(elastic.Linear(widths[0], widths[1]), nn.Tanh(), elastic.Linear(widths[1], 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stage(torch.tanh(self.first(x))))

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 3)


def vit(**options) -> AutoFormer:
    """The AutoFormer space at the size of a thumbnail."""
    defaults = dict(
        embed_dim=(12, 8), depth=(2, 1, 3), num_heads=(1, 3), mlp_ratio=(1.5, 2), head_dim=4,
        num_classes=3, image_size=4, patch_size=2, in_channels=1,
    )  # fmt: skip
    return AutoFormer(**{**defaults, **options})


class Signal(SearchSpace):
    """A sequence of samples, for convolutions and norms in one dimension."""

    def __init__(self, **options):
        super().__init__(**options)
        width = self.choice("width", (8, 4))
        kernel = self.choice("kernel", (3, 1, 5))
        groups = width // 2
        self.stem = elastic.Conv1d(2, width, kernel)
        self.norm = elastic.BatchNorm1d(width)
        self.grouped = elastic.Conv1d(width, width * 2, kernel, stride=2, groups=groups, bias=False)
        self.by_group = elastic.GroupNorm(groups, width * 2)
        self.depthwise = elastic.Conv1d(width * 2, width * 2, 3, groups=width * 2)
        self.together = elastic.GroupNorm(1, width * 2)
        self.bare = elastic.GroupNorm(groups, width * 2, affine=False)
        self.rms = elastic.RMSNorm(width * 2)
        self.head = nn.Sequential(
            elastic.Linear(width * 2, width), elastic.BatchNorm1d(width, affine=False), elastic.Linear(width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.by_group(self.grouped(F.relu(self.norm(self.stem(x)))))
        x = self.bare(torch.tanh(self.together(self.depthwise(x))))
        return self.head(self.rms(x.square().mean(2) + x[..., 0]))

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 2, 8)


class Images(SearchSpace):
    """An encoder and a decoder of images."""

    def __init__(self, **options):
        super().__init__(**options)
        width = self.choice("width", (6, 4))
        kernel = self.choice("kernel", (4, 2))
        ratio = self.choice("ratio", (1, 1.5))
        self.stem = elastic.Conv2d(2, width, 2, stride=2)
        self.norm = elastic.LayerNorm2d(width)
        self.scale = elastic.Parameter(width, 1, 1, init=0.5)
        self.mix = elastic.Conv2d(width, width, 1)
        self.up = elastic.ConvTranspose2d(width, width * ratio, kernel, stride=2)
        self.apart = elastic.ConvTranspose2d(width, width, 3, stride=2, output_padding=1, groups=width // 2, bias=False)
        self.head = elastic.Conv2d(width * ratio, 1, 1)
        self.other = elastic.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale() * self.mix(self.norm(x))
        return (self.head(torch.tanh(self.up(x))) + self.other(torch.tanh(self.apart(x)))).flatten(1)

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 2, 4, 6)


class Llama(SearchSpace):
    """A decoder as language models have it, and a block that reads a context."""

    def __init__(self, **options):
        super().__init__(**options)
        width = self.choice("width", (8, 5))
        keys = self.choice("keys", (2, 1))
        hidden = self.choice("hidden", (6, 3, 4))
        self.tokens = elastic.Embedding(7, width)
        self.norm1 = elastic.RMSNorm(width, elementwise_affine=False)
        self.attention = elastic.GroupedAttention(
            width, keys * 2, keys, 4, bias=True, causal=True, rotary=elastic.Rotary()
        )
        self.norm2 = elastic.RMSNorm(width, eps=1e-6)
        self.mlp = elastic.GatedMLP(width, hidden, bias=False)
        self.wide = elastic.Linear(width, keys * 4)
        self.multihead = elastic.MultiheadAttention(keys * 4, keys, batch_first=True)
        self.narrow = elastic.Linear(keys * 4, width)
        self.context = elastic.Parameter(1, 3, hidden, init=nn.init.normal_)
        self.cross = elastic.GroupedAttention(width, keys, 1, 4, context_width=hidden)
        self.head = elastic.Linear(width, 7)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.tokens(indices)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        y = torch.tanh(self.wide(x))
        x = x + self.narrow(self.multihead(y, y[:, :3] * 0.5, y[:, 1:4])[0])
        return self.head(x + self.cross(x, self.context().repeat(len(x), 1, 1)))

    def example_input(self, batch: int) -> Tensor:
        return torch.randint(7, (batch, 5))


class Layer(nn.Module):
    """A residual layer with a norm that has statistics. `number` tells it from others of its kind."""

    def __init__(self, number: int, width: int = 16, hidden: int = 16):
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.constant_(self.norm.weight, number)
        nn.init.constant_(self.norm.running_mean, number)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Layered(nn.Module):
    """A model that knows nothing of spaces, with four layers in a row. The first one changes the width."""

    def __init__(self, layers=None):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 16), nn.GELU()), *(layers or map(Layer, range(1, 5)))])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def layered(**options) -> SearchSpace:
    """The space inside of a model with layers in a row."""
    return elasticize(Layered(), torch.randn(4, 6), **options)


LAYERS = {"signal": Signal, "images": Images, "llama": Llama}
"""Spaces of layers that no other has, for the tables about layers: corners, gradients and costs."""

SPACES = {
    "convolutional": Convolutional,
    "language": Language,
    "stages": Stages,
    "vit": lambda **options: vit(global_pool="token", **options),
    "vit_relative": lambda **options: vit(relative_position=True, **options),
}

STACKS = {"layered": layered}
"""Spaces for the tables about the order of layers."""

REGISTERED = manager().names("space")

SMALL = {
    name: {"image_size": 32, "depth": (2, 1), "num_classes": 10}
    for name in ("autoformer_t", "autoformer_s", "autoformer_b")
}
SMALL |= {
    name: {"image_size": 32, "embed_dim": (24, 32), "num_heads": (1, 2), "depth": (2, 1), "num_classes": 10}
    for name in ("vit_tiny", "vit_small", "vit_base")
}
SMALL["mobilenetv3_large"] = SMALL["mobilenetv3_small"] = {
    "image_size": 32, "num_classes": 10, "num_features": 24, "expand_share": (0.5, 1),
    "blocks": (
        "ds_r1_k3_s1_e1_c8_nre", "ir_r1_k3_s2_e4_c8_nre ir_r1_k3_s1_e2.5_c8_nre", "ir_r2_k5_s2_e3_c16_se0.25",
        "cn_r1_k1_s1_c16",
    ),
}  # fmt: skip
for resnet in ("resnet_nano", "resnet18", "resnet50"):
    SMALL[resnet] = {
        "image_size": 24, "num_classes": 10, "channels": (8, 4, 12, 8), "depth": ((1, 2), (1,), (1,), (1, 2)),
    }  # fmt: skip
for convnext in ("convnext_nano", "convnext_tiny"):
    SMALL[convnext] = {**SMALL["resnet_nano"], "patch_size": 1, "kernel_size": (3, 5)}
SMALL["mobilenetv3"] = {
    "image_size": 32, "depth": (2, 1), "width_mult": 0.25, "num_classes": 10,
    "stages": ("s1_c24_nre", "s1_c40_nre_se0.25", "s2_c80_nhs", "s1_c112_nhs_se0.25", "s2_c160_nhs_se0.25"),
}  # fmt: skip
SMALL["elasticized"] = {
    "model": "resnet10t", "arguments": {"channels": (8, 8, 16, 24), "stem_width": 8}, "image_size": 32,
    "num_classes": 10,
}  # fmt: skip
SMALL["toy_conv_macro"] = {"image_size": 16}
SMALL["nb201"] = {"channels": 4, "cells": 1, "image_size": 8}
SMALL["darts"] = {"channels": 2, "layers": 3, "image_size": 8}
SMALL["gpt2"] = {"layers": (2, 1), "embed_dim": (24, 48), "num_heads": (1, 3), "vocab_size": 13, "block_size": 6}
SMALL["smollm_135m"] = {
    "layers": (2, 1), "embed_dim": (24, 48), "num_kv_heads": (1, 2), "mlp_width": (32, 64), "vocab_size": 13,
    "block_size": 6,
}  # fmt: skip
SMALL["gpt"] = SMALL["gpt_char"] = {"layers": (2, 1), "vocab_size": 13, "block_size": 6}
"""Options that make the large ones fit a test; their widths stay."""


def make(name: str, **options) -> SearchSpace:
    """A space of `SPACES`, `LAYERS`, `STACKS` or `REGISTERED` in float64, with parameters that are all far from 0."""
    if name in (made := {**SPACES, **LAYERS, **STACKS}):
        space = made[name](**options)
        space.name = name
    else:
        space = create_space(name, **{**SMALL.get(name, {}), **options})
    space.double()
    with torch.no_grad():
        for parameter in space.parameters():
            # Fresh zeros (biases, class tokens) and ones (gains) would hide what a test looks for.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return space


def inputs(space: SearchSpace, batch: int) -> Tensor:
    """A batch in the space's own precision."""
    example = space.example_input(batch)
    return example.to(next(space.parameters()).dtype) if example.is_floating_point() else example


def random_mixture(space: SearchSpace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Leaves of architecture parameters for every choice, and the mixture that a softmax makes of them."""
    dtype = next(space.parameters()).dtype
    alphas = {
        name: torch.randn(choice.shape, dtype=dtype, requires_grad=True) for name, choice in space.choices.items()
    }
    return alphas, {name: alpha.softmax(-1) for name, alpha in alphas.items()}
