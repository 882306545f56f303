"""Toy search spaces: they are so small that every architecture can be trained, and the best one known."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    conv_macro, cell = "tanglenas_toy.conv_macro:ConvMacro", "tanglenas_toy.cell:ToyCell"
    register(
        "toy_conv_macro",
        conv_macro,
        summary="Channels and kernels of four convolutions: 6,561 architectures",
    )
    register(
        "toy_conv_macro_nano",
        conv_macro,
        summary="toy_conv_macro with a quarter of the channels, for images from 16 pixels on, small enough for a CPU",
        channels1=(4, 6, 8),
        channels2=(8, 12, 16),
        channels3=(16, 24, 32),
        channels4=(32, 48, 64),
        image_size=16,
        in_channels=1,
    )
    register(
        "toy_cell",
        cell,
        summary="Separable and dilated convolutions on three edges of two cells: 4,096 architectures",
    )
    register(
        "toy_cell_nano",
        cell,
        summary="toy_cell with a quarter of the channels, for images from 8 pixels on, small enough for a CPU",
        channels=8,
        image_size=8,
    )
