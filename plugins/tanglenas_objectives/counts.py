"""Objectives that are counted. They are exact for an architecture and in expectation."""

from tanglenas_engine import Additive, Objective, SearchSpace


class Params(Objective):
    """The number of parameters."""

    unit = "parameters"

    def terms(self, space: SearchSpace) -> Additive:
        return space.terms("params")


class Macs(Objective):
    """The multiply-accumulates for one input, of linear layers, convolutions and attention products."""

    unit = "multiply-accumulates"

    def terms(self, space: SearchSpace) -> Additive:
        return space.terms("macs")
