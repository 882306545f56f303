"""Objectives: what an architecture costs."""

from typing import Any

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_objectives(register: Any) -> None:
    register("params", "tanglenas_objectives.counts:Params", summary="parameters")
    register("macs", "tanglenas_objectives.counts:Macs", summary="multiply-accumulates for one input")
    register("flops", "tanglenas_objectives.counts:Macs", summary="the former name of macs")
    register("latency", "tanglenas_objectives.latency_table:Latency", summary="milliseconds on a measured machine")
