"""The cell space of NAS-Bench-201 (Dong and Yang, 2020, arXiv:2001.00326), with a table of every architecture."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    nb201 = "tanglenas_nb201.space:NB201"
    register(
        "nb201",
        nb201,
        summary="NAS-Bench-201: five operations on six edges of one cell, 15,625 architectures",
    )
    register(
        "nb201_nano",
        nb201,
        summary="NAS-Bench-201 with one cell per stage, small enough for a CPU",
        channels=8,
        cells=1,
        image_size=8,
        in_channels=1,
    )
