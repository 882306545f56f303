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
