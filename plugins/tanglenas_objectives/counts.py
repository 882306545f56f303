"""Objectives that are counted: exact for an architecture, and in expectation."""

from tanglenas_engine import Additive, Objective, SearchSpace


class Params(Objective):
    """Parameters."""

    unit = "parameters"

    def terms(self, space: SearchSpace) -> Additive:
        return space.terms("params")


class Flops(Objective):
    """Multiply-accumulates for one input, of linear layers, convolutions and attention products."""

    unit = "multiply-accumulates"

    def terms(self, space: SearchSpace) -> Additive:
        return space.terms("flops")
