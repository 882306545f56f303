"""AutoFormer's space of vision transformers on timm's parts (Chen et al. 2021, arXiv:2107.00651)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    global_pool_nlc,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models import named_apply
from timm.models.vision_transformer import VisionTransformer, get_init_weights_vit
from torch import Tensor, nn

from tanglenas_engine import Architecture, Choice, Size, TangleNASError, elastic, unknown
from tanglenas_timm.space import TimmSpace
from tanglenas_vit.network import NARROW, SCHEMES, RelativePosition2D, initialise_narrow, vision_transformer


class Block(nn.Module):
    """A pre-norm block like timm's: attention and MLP, each behind a LayerNorm and with a residual."""

    def __init__(self, width: Size, num_heads: Size, mlp_ratio: Size, drop_path: float, drop: float, **attention: Any):
        super().__init__()
        self.norm1 = elastic.LayerNorm(width, eps=1e-6)
        self.attn = elastic.Attention(width, num_heads, proj_drop=drop, **attention)
        self.norm2 = elastic.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(1, drop=drop)
        self.mlp.fc1 = elastic.Linear(width, width * mlp_ratio)
        self.mlp.fc2 = elastic.Linear(width * mlp_ratio, width)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AutoFormer(TimmSpace):
    """A space of ViTs: the embedding dimension, the depth, and per block the number of heads and the MLP ratio.

    Parameter names and largest shapes are those of timm's `VisionTransformer`, so a timm checkpoint of the
    largest network loads with `load_state_dict`. The final norm comes before the pooling, as in AutoFormer.

    Args:
        patch_size: By default 2 for images of at most 16 pixels, 4 below 64 pixels, and 16 from there on.
        head_dim: Fixed dimension of a head; more heads make attention wider.
        global_pool: "avg" over the patch tokens, as in AutoFormer, or "token" for the class token.
        weight_init: timm's scheme. "" is its usual `trunc_normal(std=0.02)`, made for wide networks. "jax" scales
            with the width. "narrow" is ours, for networks of up to about 100 channels and short trainings: as "jax",
            but with positions as large as the patches, and a head that is not 0.
        relative_position: Use AutoFormer's 2D relative positions. The paper always has them, timm's ViT never.
        drop_path: Stochastic depth of the largest network. A block's rate grows with its place. A network of less
            depth, once extracted, spreads the rates over its own blocks, as timm does.
    """

    model = "tanglenas_vit"
    first_conv = "patch_embed.proj"
    output_layer = "head"
    fixed_size = True

    def __init__(
        self,
        embed_dim: Sequence[int] = (192, 216, 240),
        depth: Sequence[int] = (12, 13, 14),
        num_heads: Sequence[int] = (3, 4),
        mlp_ratio: Sequence[float] = (3.5, 4),
        num_classes: int = 1000,
        image_size: int = 224,
        in_channels: int = 3,
        patch_size: int | None = None,
        head_dim: int = 64,
        global_pool: str = "avg",
        relative_position: bool = False,
        drop: float = 0.0,
        drop_path: float = 0.0,
        weight_init: str = "",
        **options: Any,
    ):
        super().__init__(**options)
        patch_size = patch_size or (2 if image_size <= 16 else 4 if image_size < 64 else 16)
        if image_size % patch_size:
            raise TangleNASError(
                f"images of {image_size} pixels do not divide into patches of {patch_size}: choose a patch_size "
                f"that divides {image_size}"
            )
        if global_pool not in ("avg", "token"):
            raise TangleNASError(f"global_pool is {global_pool!r}, expected 'avg' or 'token'")
        if weight_init not in SCHEMES:
            raise unknown("weight_init", weight_init, SCHEMES)
        self.image_size = image_size
        self.settings = dict(
            num_classes=num_classes, img_size=image_size, in_chans=in_channels, patch_size=patch_size,
            head_dim=head_dim, global_pool=global_pool, relative_position=relative_position,
            proj_drop_rate=drop, drop_path_rate=drop_path, weight_init=weight_init,
        )  # fmt: skip
        E: Choice = self.choice("embed_dim", embed_dim)
        D = self.choice("depth", depth)
        H = self.choice("num_heads", num_heads, per=D)
        R = self.choice("mlp_ratio", mlp_ratio, per=D)
        self.patch_embed = PatchEmbed(image_size, patch_size, in_channels, 1)
        self.patch_embed.proj = elastic.Conv2d(in_channels, E, patch_size, patch_size, padding=0)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, E.max))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, E.max))
        self.declare(cls_token=(None, None, E), pos_embed=(None, None, E))
        self.declare(role="again", pooled=(E,))  # the paper's code covers the pooled tokens once more
        grid = self.patch_embed.grid_size
        rates = calculate_drop_path_rates(drop_path, D.max)
        self.blocks = elastic.Depth(
            D,
            (
                Block(E, H[i], R[i], rates[i], drop, head_dim=head_dim,
                      relative_position=RelativePosition2D(head_dim, grid, True) if relative_position else None)
                for i in range(D.max)
            ),
        )  # fmt: skip
        self.norm = elastic.LayerNorm(E, eps=1e-6)
        self.head = elastic.Linear(E, num_classes)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        x = self.patch_embed(x)  # (B, patches, width)
        x = torch.cat([self.current("cls_token").expand(len(x), -1, -1), x], 1) + self.current("pos_embed")
        x = self.norm(self.blocks(x))
        x = global_pool_nlc(x, self.settings["global_pool"], num_prefix_tokens=1)
        return self.head(self.covered("pooled", x))

    def standalone(self, architecture: Architecture) -> VisionTransformer:
        return vision_transformer(**self.arguments(architecture))

    def converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample the position embedding to this space's grid of patches, as timm does."""
        positions = state.get("pos_embed")
        grid = self.patch_embed.grid_size
        if positions is None or positions.dim() != 3 or positions.shape[1] == math.prod(grid) + 1:
            return state
        if math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:  # not a class token and a square
            return state
        return {**state, "pos_embed": resample_abs_pos_embed(positions, new_size=list(grid), num_prefix_tokens=1)}

    def arguments(self, architecture: Architecture) -> dict[str, Any]:
        """Return the arguments of `vision_transformer` for an architecture, as JSON can hold them."""
        choices = {k: list(v) if isinstance(v, tuple) else v for k, v in architecture.choices.items()}
        choices.pop("depth")
        return {**self.settings, **choices, "fc_norm": False}

    def _initialise(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        scheme = self.settings["weight_init"]
        named_apply(get_init_weights_vit("jax" if scheme == NARROW else scheme, needs_reset=False), self)
        if scheme == NARROW:
            initialise_narrow(self)
