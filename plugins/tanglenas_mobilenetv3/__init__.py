"""MobileNetV3: the search space of Once-for-All (Cai et al., 2020, arXiv:1908.09791)."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    mobilenetv3 = "tanglenas_mobilenetv3.space:MobileNetV3"
    register(
        "mobilenetv3",
        mobilenetv3,
        summary="Once-for-All's MobileNetV3: kernel, expansion and depth of 5 stages",
    )
    register(
        "mobilenetv3_nano",
        mobilenetv3,
        summary="MobileNetV3 for images of 25 to 64 pixels, small enough for a CPU",
        depth=(1, 2, 3),
        stages=("s1_c8_nre", "s2_c16_nre_se0.25", "s2_c32_nhs_se0.25"),
        stem_width=8,
        head_widths=(96, 128),
        num_classes=10,
        image_size=28,
        in_channels=1,
    )
