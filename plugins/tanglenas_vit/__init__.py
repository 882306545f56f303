"""Vision transformers: the AutoFormer search spaces (Chen et al., 2021, arXiv:2107.00651, table 1)."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    autoformer = "tanglenas_vit.autoformer:AutoFormer"
    register(
        "autoformer_nano",
        autoformer,
        summary="AutoFormer for images of 8 to 32 pixels, small enough for a CPU",
        embed_dim=(32, 48, 64),
        depth=(2, 3, 4),
        num_heads=(2, 3, 4),
        mlp_ratio=(2, 3, 4),
        head_dim=16,
        image_size=8,
        in_channels=1,
        num_classes=10,
        weight_init="narrow",
    )
    register(
        "autoformer_t",
        autoformer,
        summary="AutoFormer-T: 192 to 240 channels, 12 to 14 layers",
        embed_dim=(192, 216, 240),
        depth=(12, 13, 14),
        num_heads=(3, 4),
        mlp_ratio=(3.5, 4),
    )
    register(
        "autoformer_s",
        autoformer,
        summary="AutoFormer-S: 320 to 448 channels, 12 to 14 layers",
        embed_dim=(320, 384, 448),
        depth=(12, 13, 14),
        num_heads=(5, 6, 7),
        mlp_ratio=(3, 3.5, 4),
    )
    register(
        "autoformer_b",
        autoformer,
        summary="AutoFormer-B: 528 to 624 channels, 14 to 16 layers",
        embed_dim=(528, 576, 624),
        depth=(14, 15, 16),
        num_heads=(9, 10),
        mlp_ratio=(3, 3.5, 4),
    )
    published = dict(patch_size=16, global_pool="token", depth=(6, 8, 10, 12), mlp_ratio=(1, 2, 3, 4))
    register(
        "vit_tiny",
        autoformer,
        summary="Inside timm's deit_tiny_patch16_224: 96 to 192 channels, 6 to 12 layers",
        embed_dim=(96, 128, 160, 192),
        num_heads=(1, 2, 3),
        **published,
    )
    register(
        "vit_small",
        autoformer,
        summary="Inside timm's deit_small_patch16_224: 192 to 384 channels, 6 to 12 layers",
        embed_dim=(192, 256, 320, 384),
        num_heads=(2, 3, 4, 5, 6),
        **published,
    )
    register(
        "vit_base",
        autoformer,
        summary="Inside timm's deit_base_patch16_224: 384 to 768 channels, 6 to 12 layers",
        embed_dim=(384, 512, 640, 768),
        num_heads=(3, 6, 9, 12),
        **published,
    )
