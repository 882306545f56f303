"""The standalone network: timm's MobileNetV3 with every block as chosen.

Importing this module registers the network with timm as `tanglenas_mobilenetv3`. An exported folder then loads with
`timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import get_act_layer
from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models._registry import generate_default_cfgs
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

default_cfgs = generate_default_cfgs(
    {"tanglenas_mobilenetv3.untrained": {"first_conv": "conv_stem", "classifier": "classifier"}}
)

squeeze_excite = partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=round_channels)


def mobilenetv3(
    arch_def: Sequence[Sequence[str]],
    width_mult: float = 1.0,
    num_features: int = 1280,
    head_bias: bool = False,
    **options: Any,
) -> MobileNetV3:
    """Build timm's `MobileNetV3` with the activations and the squeeze-excite of the published networks.

    Args:
        arch_def: Every block in timm's grammar, with the widths before `width_mult`.
        head_bias: Give the head's convolution a bias, as in the published networks. Once-for-All's has none.
    """
    # timm's builder empties the lists, so each model gets a copy.
    blocks = decode_arch_def([list(stage) for stage in arch_def])
    return MobileNetV3(
        blocks,
        num_features=round_channels(num_features, width_mult),
        head_bias=head_bias,
        act_layer=get_act_layer("hard_swish"),
        se_layer=squeeze_excite,
        round_chs_fn=partial(round_channels, multiplier=width_mult),
        **options,
    )


@register_model
def tanglenas_mobilenetv3(pretrained: bool = False, **options: Any) -> MobileNetV3:
    """Build a network that TangleNAS found; the options are those of `mobilenetv3`."""
    return build_model_with_cfg(mobilenetv3, "tanglenas_mobilenetv3", pretrained, **options)
