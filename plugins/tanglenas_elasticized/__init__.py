"""Search spaces inside models that nobody wrote for a search: timm's, or those of any function that makes one."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    target = "tanglenas_elasticized.space:elasticized"
    register("elasticized", target, summary="Any torch model: create_space.model names one of timm, or a function")
    register(
        "elasticized_nano",
        target,
        summary="A vision transformer of timm for images of 8 to 32 pixels, small enough for a CPU",
        model="vit_tiny_patch16_224",
        arguments=dict(patch_size=4, embed_dim=48, depth=3, num_heads=3),
        image_size=8,
        in_channels=1,
        num_classes=10,
    )
