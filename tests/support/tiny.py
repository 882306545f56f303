"""The registered spaces at a size at which every optimizer can search every one of them."""

import functools

from spaces import REGISTERED, SMALL, SPACES

from tanglenas_engine import SearchSpace
from tanglenas_engine.plugins import create_space, manager

TINY = {
    **{
        name: {"image_size": 32, "embed_dim": (24, 32), "head_dim": 8, "depth": (2, 3), "num_classes": 10}
        for name in ("autoformer_t", "autoformer_s", "autoformer_b")
    },
    **{
        name: {
            "image_size": 32, "embed_dim": (24, 32), "num_heads": (1, 2), "head_dim": 8, "depth": (2, 3),
            "num_classes": 10,
        }
        for name in ("vit_tiny", "vit_small", "vit_base")
    },
    **{
        name: {
            "image_size": 32, "in_channels": 1, "num_classes": 10, "num_features": 24, "expand_share": (0.5, 1),
            "blocks": (
                "ds_r1_k3_s1_e1_c8_nre", "ir_r1_k3_s2_e4_c8_nre ir_r1_k3_s1_e2.5_c8_nre",
                "ir_r2_k5_s2_e3_c16_se0.25", "cn_r1_k1_s1_c16",
            ),
        }
        for name in ("mobilenetv3_large", "mobilenetv3_small")
    },
    **{
        name: {"layers": (2, 1), "embed_dim": (24, 12), "num_heads": (2, 3), "vocab_size": 13, "block_size": 6}
        for name in ("gpt", "gpt2", "gpt_char", "gpt_nano")
    },
    **{
        name: {
            "layers": (2, 1), "embed_dim": (24, 12), "num_kv_heads": (2, 1), "group": 2, "mlp_width": (16, 8, 24),
            "head_dim": 4, "vocab_size": 13, "block_size": 6,
        }
        for name in ("llama_nano", "smollm_135m")
    },
    **{
        name: {
            "image_size": 28, "in_channels": 1, "num_classes": 10, "depth": (1, 2), "stem_width": 8,
            "head_widths": (16, 24), "stages": ("s2_c8_nre", "s2_c16_nhs_se0.25"),
        }
        for name in ("mobilenetv3", "mobilenetv3_nano")
    },
    **{
        name: {
            "image_size": 24, "in_channels": 1, "num_classes": 10, "channels": (8, 8, 12, 16), "width_share": (0.5, 1),
            "depth": ((1, 2), (1,), (1,), (1, 2)), "hidden_share": (0.5, 1),
        }
        for name in ("resnet_nano", "resnet18", "resnet50")
    },
    **{
        name: {
            "image_size": 24, "in_channels": 1, "num_classes": 10, "channels": (8, 8, 12, 16), "width_share": (0.5, 1),
            "depth": ((1, 2), (1,), (1,), (1, 2)), "hidden_share": (0.5, 1), "patch_size": 1, "kernel_size": (3, 5),
        }
        for name in ("convnext_nano", "convnext_tiny")
    },
    "toy_cell": {"channels": 4, "image_size": 12},
    "toy_cell_nano": {"channels": 4},
    "nb201": {"channels": 4, "cells": 1, "image_size": 8, "num_classes": 3},
    "nb201_nano": {"channels": 4, "num_classes": 3},
    "darts": {"channels": 4, "layers": 3, "image_size": 8, "num_classes": 3},
    "darts_nano": {"channels": 4, "num_classes": 3},
    **{
        name: {"image_size": 16, "channels1": (2, 4), "channels2": (2, 4), "channels3": (2, 4), "channels4": (4, 8)}
        for name in ("toy_conv_macro", "toy_conv_macro_nano")
    },
}  # fmt: skip


def tiny(name: str, **options) -> SearchSpace:
    """A space of `SPACES` or `REGISTERED`."""
    if name not in SPACES:
        return create_space(name, **{**TINY.get(name, SMALL.get(name, {})), **options})
    space = SPACES[name](**options)
    space.name = name
    return space


@functools.cache
def example(name: str) -> SearchSpace:
    """The space of this name, built once: tests look at it, and change nothing."""
    return tiny(name)


ALL = [*SPACES, *REGISTERED]

_PRESETS = sorted(REGISTERED, key=lambda name: name.endswith("_nano"))
DISTINCT = [*SPACES, *{manager().resolve("space", name).target: name for name in _PRESETS}.values()]
"""One name for each class, the small preset where it has one: at this size, its presets hardly differ."""
