"""Toy search spaces: small enough that every architecture can be trained, and the truth be known."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    register(
        "toy_conv_macro",
        "tanglenas_toy.conv_macro:ConvMacro",
        summary="Channels and kernels of four convolutions: 6,561 architectures",
    )
    register(
        "toy_cell",
        "tanglenas_toy.cell:ToyCell",
        summary="Separable and dilated convolutions on three edges of two cells: 4,096 architectures",
    )
