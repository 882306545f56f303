"""The standalone vision transformer: timm's, with the heads and the MLP width of every block as chosen.

Importing this module registers the network with timm as `tanglenas_vit`. An exported folder then loads with
`timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention as TimmAttention
from timm.layers import to_2tuple, trunc_normal_
from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

default_cfgs = generate_default_cfgs(
    {"tanglenas_vit.untrained": {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}}
)


NARROW = "narrow"
"""The scheme of initialisation that is not timm's."""
SCHEMES = ("", "jax", "jax_nlhb", "moco", "reset", NARROW)


class RelativePosition2D(nn.Module):
    """An attention with learned embeddings of vertical and horizontal distances, for keys and for values.

    Distances are clipped to `max_distance`. A pair that includes the class token has an embedding of its own. All heads
    share the tables. Source: AutoFormer (Chen et al. 2021), after Shaw et al. 2018.
    """

    def __init__(self, head_dim: int, grid: tuple[int, int], class_token: bool, max_distance: int = 14):
        super().__init__()
        rows = 2 * max_distance + 2
        for table in ("key_vertical", "key_horizontal", "value_vertical", "value_horizontal"):
            setattr(self, table, nn.Parameter(torch.empty(rows, head_dim)))
        self.reset_parameters()
        self.max_distance, self.class_token = max_distance, class_token
        self.register_buffer("distance", self._distances(grid), persistent=False)  # (N, N, 2)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Take another number of patches. The tables stay, because distances are clipped."""
        self.distance = self._distances(grid).to(self.distance.device)

    def _distances(self, grid: tuple[int, int]) -> Tensor:
        """Return the rows of the tables for each pair of tokens, shape (N, N, 2)."""
        steps = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))  # (N, 2)
        furthest = self.max_distance
        distance = (steps[None] - steps[:, None]).clamp(-furthest, furthest) + furthest + 1
        if self.class_token:
            distance = nn.functional.pad(distance, (0, 0, 1, 0, 1, 0))  # row 0: the class token
        return distance

    def reset_parameters(self) -> None:
        for table in self.parameters():
            trunc_normal_(table, std=0.02)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: `(B, H, N, D)` each -> `(B, H, N, D)`."""
        vertical, horizontal = self.distance.unbind(-1)
        keys = self.key_vertical[vertical] + self.key_horizontal[horizontal]  # (N, N, D)
        values = self.value_vertical[vertical] + self.value_horizontal[horizontal]
        logits = q @ k.transpose(-2, -1) + torch.einsum("bhid,ijd->bhij", q, keys)
        weights = (logits * q.shape[-1] ** -0.5).softmax(-1)
        return weights @ v + torch.einsum("bhij,ijd->bhid", weights, values)


class RelativeAttention(TimmAttention):
    """An attention like timm's, with 2D relative positions in place of the plain product."""

    def __init__(self, *args: Any, relative_position: nn.Module, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.relative_position = relative_position

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        x = self.relative_position(*qkv.unbind(0)).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


class RelativeVisionTransformer(VisionTransformer):
    """A vision transformer like timm's, whose blocks have 2D relative positions."""

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        super().set_input_size(*args, **kwargs)
        for block in self.blocks:
            block.attn.relative_position.set_grid(self.patch_embed.grid_size)


def vision_transformer(
    num_heads: Sequence[int],
    mlp_ratio: Sequence[float],
    head_dim: int = 64,
    relative_position: bool = False,
    weight_init: str = "",
    **options: Any,
) -> VisionTransformer:
    """Build timm's `VisionTransformer` with other heads and MLP widths in each block.

    Args:
        num_heads: The number of heads of `head_dim` in each block.
        mlp_ratio: MLP ratio of each block.
        weight_init: One of `SCHEMES`.

    Raises:
        ValueError: `dynamic_img_size` is asked for with relative positions, which are computed for one size of images.
    """
    if relative_position and options.get("dynamic_img_size"):
        raise ValueError("a network with relative positions takes images of one size: give img_size in its place")
    sizes = zip(to_2tuple(options["img_size"]), to_2tuple(options["patch_size"]), strict=True)
    rows, columns = (size // patch for size, patch in sizes)

    def block(depth: int, dim: int, **block_options: Any) -> Block:
        block_options.update(num_heads=1, mlp_ratio=mlp_ratio[depth])
        made = Block(dim, depth=depth, **block_options)
        arguments = dict(num_heads=num_heads[depth], attn_head_dim=head_dim, qkv_bias=block_options["qkv_bias"])
        arguments.update(proj_drop=block_options["proj_drop"], attn_drop=block_options["attn_drop"])
        if relative_position:
            position = RelativePosition2D(head_dim, (rows, columns), options.get("class_token", True))
            made.attn = RelativeAttention(dim, relative_position=position, **arguments)
        else:
            made.attn = TimmAttention(dim, **arguments)
        return made

    kind = RelativeVisionTransformer if relative_position else VisionTransformer
    narrow = weight_init == NARROW
    network = kind(depth=len(num_heads), block_fn=block, weight_init="jax" if narrow else weight_init, **options)
    if narrow:
        initialise_narrow(network)
    return network


def initialise_narrow(network: nn.Module) -> None:
    """Initialise position embeddings and head for narrow networks; timm's "jax" has done the rest.

    Patch embeddings of "jax" deviate by 1. Positions of timm's 0.02 drown in them, so that a short training sees
    patches and hardly where they are. A head of 0 has to grow before anything below it learns.
    """
    nn.init.normal_(network.pos_embed, std=0.5)
    if isinstance(network.head, nn.Linear):  # not where there are no classes
        nn.init.normal_(network.head.weight, std=network.head.in_features**-0.5)


@register_model
def tanglenas_vit(pretrained: bool = False, out_indices: Any = 3, **options: Any) -> VisionTransformer:
    """Build a network that TangleNAS found; the options are those of `vision_transformer`.

    As in timm's own, weights fit another `img_size` by resampling of the position embedding, and `features_only`
    returns the maps after the blocks `out_indices`.
    """
    return build_model_with_cfg(
        vision_transformer,
        "tanglenas_vit",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **options,
    )
