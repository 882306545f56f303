"""DARTS (Liu et al., 2019, arXiv:1806.09055): the cell space of its paper."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    register(
        "darts",
        "tanglenas_darts.space:Darts",
        summary="DARTS: two of eight operations into each node of a normal and a reduction cell, 1e18 architectures",
    )
