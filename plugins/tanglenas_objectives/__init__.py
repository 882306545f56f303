"""Objectives: what an architecture costs."""

from typing import Any

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_objectives(register: Any) -> None:
    register("params", "tanglenas_objectives.counts:Params", summary="parameters")
    register("flops", "tanglenas_objectives.counts:Flops", summary="multiply-accumulates for one input")
    register("latency", "tanglenas_objectives.latency_table:Latency", summary="milliseconds on a measured machine")
