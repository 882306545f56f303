"""Objectives: what an architecture costs."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_objectives(register):
    register("params", "tanglenas_objectives.counts:Params", summary="parameters")
    register("flops", "tanglenas_objectives.counts:Flops", summary="multiply-accumulates for one input")
    register("latency", "tanglenas_engine.latency:Latency", summary="milliseconds on a machine that was measured")
