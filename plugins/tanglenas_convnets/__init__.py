"""Spaces inside published convolutional networks of timm: ResNet (arXiv:1512.03385) and ConvNeXt (arXiv:2201.03545)."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    resnet, convnext = "tanglenas_convnets.resnet:ResNet", "tanglenas_convnets.convnext:ConvNeXt"
    small = dict(num_classes=10, image_size=28, in_channels=1)
    register(
        "resnet_nano",
        resnet,
        summary="ResNets for small images, small enough for a CPU, 8 to 64 channels",
        block="basic",
        depth=((1, 2), (1, 2), (1, 2), (1, 2)),
        channels=(16, 24, 32, 64),
        **small,
    )
    register(
        "resnet18",
        resnet,
        summary="Inside timm's resnet18: depth and channels of 4 stages, inner channels of every block",
        block="basic",
        depth=((1, 2), (1, 2), (1, 2), (1, 2)),
        channels=(64, 128, 256, 512),
    )
    register(
        "resnet50",
        resnet,
        summary="Inside timm's resnet50: depth and channels of 4 stages, inner channels of every block",
        block="bottleneck",
        depth=((1, 2, 3), (2, 3, 4), (2, 4, 6), (1, 2, 3)),
        channels=(64, 128, 256, 512),
    )
    register(
        "convnext_nano",
        convnext,
        summary="ConvNeXts for small images, small enough for a CPU, 8 to 48 channels",
        depth=((1, 2), (1, 2), (1, 2), (1, 2)),
        channels=(16, 24, 32, 48),
        kernel_size=(3, 5),
        patch_size=1,
        layer_scale=0.1,
        **small,
    )
    register(
        "convnext_tiny",
        convnext,
        summary="Inside timm's convnext_tiny: depth and channels of 4 stages, kernel and hidden units of every block",
        depth=((1, 2, 3), (1, 2, 3), (3, 5, 7, 9), (1, 2, 3)),
        channels=(96, 192, 384, 768),
    )
