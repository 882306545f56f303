"""Optimizers that follow the gradient of the architecture parameters."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_optimizers(register):
    register("darts", "tanglenas_gradient.darts:DARTS", summary="softmax over the options (Liu et al., 2019)")
    register("drnas", "tanglenas_gradient.drnas:DrNAS", summary="samples of a Dirichlet (Chen et al., 2021)")
    register("gdas", "tanglenas_gradient.gdas:GDAS", summary="hard samples, straight-through (Dong and Yang, 2019)")
    register(
        "darts2",
        "tanglenas_gradient.darts2:SecondOrderDARTS",
        summary="softmax over the options, second order (Liu et al., 2019)",
    )
    register(
        "pc_darts",
        "tanglenas_gradient.partial:PartialDARTS",
        summary="darts on a part of the channels, with weights for edges (Xu et al., 2020)",
    )
    register(
        "pc_drnas",
        "tanglenas_gradient.partial:PartialDrNAS",
        summary="drnas on a part of the channels, with fewer options in each stage (Chen et al., 2021)",
    )
    register(
        "tunas",
        "tanglenas_gradient.tunas:TuNAS",
        summary="REINFORCE on hard samples, compared within a step (Bender et al., 2020)",
    )
    register(
        "hard_concrete",
        "tanglenas_gradient.hard_concrete:HardConcrete",
        summary="gates at 0 and 1, for trained networks (Louizos et al., 2018)",
    )
