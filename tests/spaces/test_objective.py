"""Objectives: how a person reads where their numbers come from."""

import pytest

from tanglenas_engine import Objective


@pytest.mark.parametrize(
    "unit, source, told",
    [
        ("ms", "table.json", "latency in ms, of table.json"),
        ("", "table.json", "latency, of table.json"),
        ("ms", "", "latency in ms"),
        ("", "", "latency"),
    ],
)
def test_the_origin_names_what_there_is(unit, source, told):
    objective = Objective()
    objective.name, objective.unit, objective.source = "latency", unit, source
    assert objective.origin() == told
