"""Optimizers that train the supernet on sampled architectures."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_optimizers(register):
    register("spos", "tanglenas_sampling.spos:SPOS", summary="one uniform sample a step (Guo et al., 2020)")
    register(
        "sandwich",
        "tanglenas_sampling.sandwich:Sandwich",
        summary="largest, smallest and random paths, distilled (Yu et al., 2019, 2020)",
    )
