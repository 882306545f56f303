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
    published = "tanglenas_mobilenetv3.published:PublishedMobileNetV3"
    register(
        "mobilenetv3_large",
        published,
        summary="Inside timm's mobilenetv3_large_100: depth, kernel and expanded channels of 5 stages",
        blocks=(
            "ds_r1_k3_s1_e1_c16_nre",
            "ir_r1_k3_s2_e4_c24_nre ir_r1_k3_s1_e3_c24_nre",
            "ir_r3_k5_s2_e3_c40_se0.25_nre",
            "ir_r1_k3_s2_e6_c80 ir_r1_k3_s1_e2.5_c80 ir_r2_k3_s1_e2.3_c80",
            "ir_r2_k3_s1_e6_c112_se0.25",
            "ir_r3_k5_s2_e6_c160_se0.25",
            "cn_r1_k1_s1_c960",
        ),
        num_features=1280,
    )
    register(
        "mobilenetv3_small",
        published,
        summary="Inside timm's mobilenetv3_small_100: depth, kernel and expanded channels of 4 stages",
        blocks=(
            "ds_r1_k3_s2_e1_c16_se0.25_nre",
            "ir_r1_k3_s2_e4.5_c24_nre ir_r1_k3_s1_e3.67_c24_nre",
            "ir_r1_k5_s2_e4_c40_se0.25 ir_r2_k5_s1_e6_c40_se0.25",
            "ir_r2_k5_s1_e3_c48_se0.25",
            "ir_r3_k5_s2_e6_c96_se0.25",
            "cn_r1_k1_s1_c576",
        ),
        num_features=1024,
    )
