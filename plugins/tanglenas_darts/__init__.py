"""The cell space of DARTS (Liu et al., 2019, arXiv:1806.09055)."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    darts = "tanglenas_darts.space:Darts"
    register(
        "darts",
        darts,
        summary="DARTS: two of eight operations into each node of a normal and a reduction cell, 1e18 architectures",
    )
    register(
        "darts_nano",
        darts,
        summary="DARTS with three cells, small enough for a CPU",
        channels=8,
        layers=3,
        image_size=8,
        in_channels=1,
    )
