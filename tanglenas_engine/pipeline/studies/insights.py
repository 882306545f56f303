"""What do found architectures look like? Their layers over seeds and budgets, against networks with equal layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.comparison.estimates import Metric
from tanglenas_engine.pipeline.studies.methods import ONE_STAGE, PAPER_SEEDS, SPOS, moved
from tanglenas_engine.pipeline.studies.run import Run
from tanglenas_engine.pipeline.studies.study import Arm, Claim, Matrix, Measured, Panel, Runs, Scale, Study
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.choice import Choice
from tanglenas_engine.superposition.size import Assignment

MOST_UNIFORM = 10**5
"""The most networks with equal layers that are looked through."""


def measure(run: Run) -> Measured:
    """Return how large the options of each layer are, and how far the network is from a hand-made one of its cost."""
    with run.opened("discretize") as bench:
        from tanglenas_engine.pipeline.config.configurables import read_architecture

        space = bench.space
        found = read_architecture(space)
        assignment = space.assignment_of(found)
        cost = space.cost(found).macs
        hand = uniform(space, cost)
    values = {"macs": float(cost), "early_over_late": early_over_late(space, assignment)}
    matrices = {"frequency": frequency(space, assignment)}
    if hand is not None:
        values["from_uniform"] = moved(dict(found.choices), dict(space.architecture_of(hand).choices))
    if sized(space):
        matrices["size"] = sizes(space, assignment)
        if hand is not None:
            matrices["hand-made size"] = sizes(space, hand)
    return Measured(values, matrices=matrices, choices=dict(found.choices))


def sized(space: SearchSpace) -> list[Choice]:
    """Return the choices whose options are sizes. Operations have names, and no order."""
    return [
        choice
        for choice in space.choices.values()
        if len(choice.options) > 1 and not any(isinstance(option, str) for option in choice.options)
    ]


def place(choice: Choice, pick: int) -> float:
    """Return the place of an option among the sizes of its choice, from 0 (smallest) to 1 (largest)."""
    return sorted(choice.options).index(choice.options[pick]) / (len(choice.options) - 1)


def sizes(space: SearchSpace, assignment: Assignment) -> Matrix:
    """Return the place of each layer's option among the options of its choice, from 0 (smallest) to 1 (largest)."""
    choices = sized(space)
    layers = max(len(choice.rows) for choice in choices)
    values = []
    for choice in choices:
        row = [math.nan] * layers
        for number, one in enumerate(choice.rows):
            if one.active(assignment):
                row[number] = place(choice, assignment[one])
        values.append(row)
    return Matrix([choice.name for choice in choices], [str(layer + 1) for layer in range(layers)], values)


def frequency(space: SearchSpace, assignment: Assignment) -> Matrix:
    """Return 1 where a layer has an option and 0 where it has not: the mean over seeds is the option's frequency."""
    layers = max(len(choice.rows) for choice in space.choices.values())
    names, values = [], []
    for name, choice in space.choices.items():
        for number, option in enumerate(choice.options):
            row = [float(one.active(assignment) and assignment[one] == number) for one in choice.rows]
            names.append(f"{name} {option}")
            values.append([*row, *[math.nan] * (layers - len(row))])
    return Matrix(names, [str(layer + 1) for layer in range(layers)], values)


def early_over_late(space: SearchSpace, assignment: Assignment) -> float:
    """Return by how much options of the first half of the layers are larger, as places from -1 to 1.

    Choices without layers or without sizes, and layers that the network does not have, do not count.
    """
    early, late = [], []
    for choice in sized(space):
        used = [row for row in choice.rows if row.active(assignment)]
        if not choice.layered or len(used) < 2:
            continue
        places = [place(choice, assignment[row]) for row in used]
        early += places[: len(places) // 2]
        late += places[-(len(places) // 2) :]
    return float(np.mean(early) - np.mean(late)) if early else math.nan


def uniform(space: SearchSpace, most: int) -> Assignment | None:
    """Return the network with equal layers that costs most within so many multiply-accumulates, or None without one.

    A person who widens or deepens a network by hand keeps its layers alike.
    """
    options = [range(len(choice.options)) for choice in space.choices.values()]
    if math.prod(map(len, options)) > MOST_UNIFORM:
        return None
    best, cost = None, -1
    for picks in itertools.product(*options):
        assignment = {
            row: pick for choice, pick in zip(space.choices.values(), picks, strict=True) for row in choice.rows
        }
        try:
            macs = space.cost(space.architecture_of(assignment)).macs
        except TangleNASError:  # cells that keep two edges of a node have no network with the same option on all
            continue
        if cost < macs <= most:
            best, cost = assignment, macs
    return best


def across(runs: Runs) -> Mapping[str, Mapping[int, Mapping[str, float]]]:
    """Return how far the architectures of an arm's seeds are from each other, as values of seeds with this mean.

    Each distance is one of two seeds, so the seeds' own mean distances depend on each other, and their interval would
    be far too short. The pseudo-values of the jackknife have the same mean, and an interval that holds. Two seeds have
    one distance, which is given to the first of them: it has no interval.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    for arm, seeds in runs.items():
        count = len(seeds)
        own = {
            seed: float(np.mean([moved(dict(one.choices), dict(two.choices)) for o, two in seeds.items() if o != seed]))
            for seed, one in seeds.items()
            if count > 1
        }
        if count == 2:
            own.popitem()
        if count > 2:
            mean = float(np.mean([*own.values()]))
            without = {seed: (count * mean - 2 * value) / (count - 2) for seed, value in own.items()}
            own = {seed: count * mean - (count - 1) * left for seed, left in without.items()}
        if own:
            found[arm] = {seed: {"between_seeds": value} for seed, value in own.items()}
    return found


def _arm(optimizer: Mapping[str, Any], share: float) -> Arm:
    return Arm({**optimizer, "search": {"target_share": share}})


STUDY = Study(
    question="What do the architectures look like that a search finds?",
    paper=(
        "Found language models have larger MLPs in their first layers, and vision transformers on CIFAR are near the "
        "largest network of the space."
    ),
    arms={
        "drnas-60": _arm(ONE_STAGE, 0.6),
        "drnas-40": _arm(ONE_STAGE, 0.4),
        "drnas-80": _arm(ONE_STAGE, 0.8),
        "spos-60": _arm({**SPOS, "discretize": {"method": "evolution"}}, 0.6),
    },
    stages=("search", "discretize"),
    measure=measure,
    across=across,
    metrics={
        "early_over_late": Metric("size of early layers minus late ones", "", 3),
        "from_uniform": Metric("decisions unlike a hand-made network's", "%", 1),
        "between_seeds": Metric("decisions that differ between seeds", "%", 1),
        "macs": Metric("MACs", "millions", 3, 1e6),
    },
    claims=(
        Claim("early_over_late", "drnas-60", 0.0, paper="ahead"),
        Claim("early_over_late", "drnas-40", 0.0, paper="ahead"),
        Claim("early_over_late", "drnas-80", 0.0, paper="ahead"),
        Claim("early_over_late", "spos-60", 0.0),
        Claim("between_seeds", "spos-60", "drnas-60", higher=False),
    ),
    panels=(
        Panel("matrices", "size", "layer", "size of the option"),
        Panel("matrices", "hand-made size", "layer", "hand-made: size"),
        Panel("matrices", "frequency", "layer", "frequency of the option"),
        Panel("means", "early_over_late"),
    ),
    limits=(
        "It says what was found, not that it is better: the studies `stages` and `ranking` are about that. Sizes are "
        "places among the options in their order, 0 for the first and 1 for the last, so operations of a cell have no "
        "size: look at their frequencies. The hand-made network has equal layers, and costs most within what the found "
        "one costs. Where seeds differ much, a pattern in the mean is a pattern of chance."
    ),
    scales={
        "cpu": Scale({"search": {"epochs": 20, "warmup_epochs": 4}, "discretize": {"candidates": 100}}, seeds=range(5)),
        "paper": Scale({"discretize": {"candidates": 1000}}, seeds=PAPER_SEEDS),
    },
)
