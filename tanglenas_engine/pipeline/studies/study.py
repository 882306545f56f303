"""The parts of a study: a question, arms that differ in a few parameters, and what every run is measured by.

A study is data. Its arms are changes of params.yaml, so an arm with a seed is a run of the main pipeline. Each run is
measured, and the page compares the measurements over seeds. A module of this package describes a study, as `STUDY`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tanglenas_engine.pipeline.comparison.estimates import Metric

if TYPE_CHECKING:
    from tanglenas_engine.pipeline.studies.memory_estimate import Need
    from tanglenas_engine.pipeline.studies.run import Run

SCALES = ("cpu", "paper")
Params = Mapping[str, Any]
"""Values of params.yaml, in groups as there."""
BUDGET = "measure.budget"
"""A placeholder: an arm with this `search.target_share` gets the budget of the measurement."""
Stage = Literal["search", "discretize", "retrain", "evaluate"]


@dataclass(frozen=True)
class Arm:
    """One of the things that a study compares.

    Attributes:
        params: The values in which its runs differ from params.yaml.
        bindings: gin bindings of its runs beyond those. "retrain: retrain.clip = 1.0" is for one stage.
        supernet: The arm whose supernet it takes, in place of a search of its own.
        series: The name of the curve that this arm is a point of, together with other arms; "" for one of its own.
        as_long_as: The arm whose time for search and derivation is the time of this arm's search, or "".
        beside: The arm whose run of the same seed the measurement of this one reads, too, or "".
        table: The title of the table that it is in. Arms of different tables are of different spaces, and are not
            compared.
    """

    params: Params = field(default_factory=dict)
    bindings: Sequence[str] = ()
    supernet: str = ""
    series: str = ""
    as_long_as: str = ""
    beside: str = ""
    table: str = ""


@dataclass(frozen=True)
class Curve:
    """A measured number by another one, for one run.

    Attributes:
        x, y: The points, by rising x.
    """

    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Matrix:
    """Measured numbers by two names, for one run.

    Attributes:
        rows, columns: The names.
        values: A row of numbers for each name of a row.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Measured:
    """What a run was measured by: numbers, curves and matrices by name.

    Attributes:
        choices: The architecture that the run found, for what is compared between runs; {} if that is nothing.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)


Runs = Mapping[str, Mapping[int, Measured]]
"""What each run of a study was measured by, by arm and seed."""


@dataclass(frozen=True)
class Claim:
    """A statement that the page tests: one arm has more of a metric than another one, or than a number.

    Attributes:
        metric: The metric.
        arm: The arm, or "" for every arm but the other one.
        against: The other arm, or a number that the mean is compared with.
        higher: True if more of the metric is better.
        paper: The side on which the paper sees the arm, or "" if it says nothing.
    """

    metric: str
    arm: str = ""
    against: str | float = ""
    higher: bool = True
    paper: Literal["ahead", "behind", ""] = ""


@dataclass(frozen=True)
class Panel:
    """A part of the figure.

    Attributes:
        kind: "means" draws each arm's seeds and interval of a metric, "curves" a line with a band for each arm,
            "matrices" the mean matrix of each arm.
        name: The metric, the curve or the matrix.
        x, y: The labels of the axes; those of "means" come from the metric.
    """

    kind: Literal["means", "curves", "matrices"]
    name: str
    x: str = ""
    y: str = ""


@dataclass(frozen=True)
class Scale:
    """The sizes of a study.

    Attributes:
        params: Values of params.yaml for all arms, and `measure` for the measurement.
        bindings: gin bindings for all arms.
        seeds: The seeds, unless a person gives others.
        without: Arms that this scale leaves out, unless a person asks for them.
        arms: Changes of the arms at this scale, by name.
        seconds: The time that the longest search takes with its derivation, in a study whose searches end by time.
        timed: A function from such a time to further changes of the arms.
    """

    params: Params = field(default_factory=dict)
    bindings: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    arms: Mapping[str, Params] = field(default_factory=dict)
    without: Sequence[str] = ()
    seconds: float | None = None
    timed: Callable[[float], Mapping[str, Params]] | None = None


@dataclass(frozen=True)
class Study:
    """A question, and how it is answered.

    Attributes:
        question: The question that the page answers.
        paper: What the paper says about it.
        arms: What is compared, by name. The first one of each table is what its others are compared with.
        stages: The stages of the main pipeline that each run goes through.
        with_table: The stages if a table of the whole space is given; None goes through `stages`.
        measure: A function that measures a run when these stages are done. Its folder is the current one.
        metrics: How the measured numbers are shown, the most important one first.
        claims: What the page tests.
        panels: The parts of the figure.
        limits: What the study does not show.
        notes: A function that gives sentences about all runs at once, to stand after the claims.
        scales: The sizes by the names in SCALES.
        table: "pool" if it needs networks of known worth: a table that a person gives, or a pool that it trains.
            "optional" if a table of all architectures adds to it.
        across: A function that computes further numbers from several runs together, by arm and seed.
        on: A function that says from params.yaml what is measured, where that is not the space with the dataset.
        needed: A function that estimates from params.yaml the memory of the measurement, where that is no search.
    """

    question: str
    paper: str
    arms: Mapping[str, Arm]
    stages: Sequence[Stage]
    measure: Callable[[Run], Measured]
    metrics: Mapping[str, Metric]
    claims: Sequence[Claim]
    panels: Sequence[Panel]
    limits: str
    scales: Mapping[str, Scale]
    table: Literal["pool", "optional", ""] = ""
    with_table: Sequence[Stage] | None = None
    notes: Callable[[Runs], Sequence[str]] | None = None
    across: Callable[[Runs], Mapping[str, Mapping[int, Mapping[str, float]]]] | None = None
    on: Callable[[Params], str] | None = None
    needed: Callable[[Params], Need] | None = None

    def stages_of(self, params: Params) -> Sequence[Stage]:
        """Return the stages of each run under the values of params.yaml."""
        return self.with_table if self.with_table is not None and params.get("table") else self.stages
