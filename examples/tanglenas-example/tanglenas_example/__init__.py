"""A search space and an optimizer for TangleNAS."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_spaces(register):
    register("example", "tanglenas_example.space:ExampleSpace", summary="residual MLPs for small images")


@hookimpl
def tanglenas_register_optimizers(register):
    register("example", "tanglenas_example.optimizer:ExampleOptimizer", summary="a softmax that cools down")
