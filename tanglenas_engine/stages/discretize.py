"""The discretize stage: it derives one architecture within a budget from a trained supernet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from tanglenas_engine.data import DataView
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.candidates import Candidates, judges, judging_of
from tanglenas_engine.derivation.evolution import evolution
from tanglenas_engine.derivation.levels import front
from tanglenas_engine.derivation.pareto import final_front, nsga2
from tanglenas_engine.derivation.race import Raced
from tanglenas_engine.derivation.surrogate import surrogate
from tanglenas_engine.errors import TangleNASError, at_least, positive, unknown, within
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.devices import device_of
from tanglenas_engine.runtime.progress import Progress, SilentProgress
from tanglenas_engine.runtime.seeding import checked_seed
from tanglenas_engine.runtime.timer import Clock, Timer
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.cost import FORMER, METRICS, Cost
from tanglenas_engine.spaces.fit import check_fit
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture

Method = Callable[..., Raced | None]
"""A function that judges candidates.

Its arguments are the `Candidates` to draw from, the mixture of the search or None, and options of its own. A method
that trains candidates returns how that ended; others return None. One that does not judge candidates in a race is
marked with `candidates.judges`.
"""


@judges("one candidate")
def argmax(candidates: Candidates, mixture: Mixture | None) -> None:
    """Judge one candidate, the most probable architecture within the budget.

    Raises:
        TangleNASError: There is no mixture.
    """
    if mixture is None:
        raise TangleNASError(
            "discretize.method 'argmax' needs the mixture of a gradient search, and the search has none: "
            "use method 'random' or 'evolution' for a sampled supernet"
        )
    candidates.judge(candidates.first(1, mixture=mixture))


def random(candidates: Candidates, mixture: Mixture | None) -> None:
    """Judge random candidates: uniform over the rows' options, or drawn from the prior, and brought into the budget.

    The paper uses 2,000 candidates for AutoFormer, 5,000 for GPT and 10,000 for the toy spaces.
    """
    candidates.judge(candidates.first(candidates.limit))


def both(candidates: Candidates, mixture: Mixture | None) -> None:
    """Judge the result of argmax, candidates drawn from alpha's mixture, and as many random ones or more.

    Without alpha, all candidates are random.
    """
    candidates.judge_first(mixture)


METHODS: Mapping[str, Method] = {
    "argmax": argmax,
    "random": random,
    "both": both,
    "evolution": evolution,
    "surrogate": surrogate,
    "front": front,
    "nsga2": nsga2,
}
"""The ways to derive an architecture, by name.

A race needs a function that trains, so `race` joins them where there is one:

    methods={**METHODS, "race": partial(race, train=Recipe(space, data, epochs=50))}
"""


@dataclass(frozen=True)
class DiscretizeResult:
    """The derived architecture with its cost, and what it measures on the validation split.

    Attributes:
        architecture: The architecture.
        cost: Its parameters, and multiply-accumulates for one input.
        validation_accuracy: Its accuracy in % on the validation split, with the supernet's weights.
        validation_loss: Its mean cross-entropy there.
        candidates: One record per candidate that was judged, best first; argmax judges one.
        front: The candidates that no other one dominates in loss and in the cost `front_cost`, cheapest first.
        front_cost: The name of the cost of the front.
        costs: The costs of the architecture by the objectives that discretize was given, by name.
        limits: The limits that the architecture keeps, by the name of the cost.
        units: The units of `costs`, by name.
        most_probable: True if the architecture has the most probable option of every row, and False if it has not. None
            without a mixture.
        exact: True if the architecture is known to be the most probable one within the budget. False if a local search
            found it as that. None if the method took another one, or did not look for it.
        raced: The end of the race, or None for the methods that train nothing.
    """

    architecture: Architecture
    cost: Cost
    validation_accuracy: float
    validation_loss: float
    candidates: list[Record] = field(default_factory=list)
    front: list[Architecture] = field(default_factory=list)
    front_cost: str = "params"
    costs: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    most_probable: bool | None = None
    exact: bool | None = None
    raced: Raced | None = None


def limits_of(
    max_params: int | None = None,
    max_macs: int | None = None,
    limits: Mapping[str, float] | None = None,
    max_flops: int | None = None,
) -> dict[str, float | None]:
    """Return the limits that the options of `discretize` ask for, by the name of the cost.

    Raises:
        TangleNASError: `limits` is not a mapping, a limit is not a positive number, or two options limit the same cost.
    """
    if not isinstance(limits, Mapping | None):
        raise TangleNASError(f"discretize.limits is {limits!r}, expected numbers by name, such as {{'latency': 2.5}}")
    if max_macs is not None and max_flops is not None:
        raise TangleNASError(
            f"discretize.max_macs is {max_macs!r}, and discretize.max_flops, its former name, is {max_flops!r}: leave "
            "one out"
        )
    for option, count in (("max_params", max_params), ("max_macs", max_macs), ("max_flops", max_flops)):
        if count is not None:
            at_least(f"discretize.{option}", count, 1)
    every: dict[str, float | None] = {"params": max_params, "macs": max_flops if max_macs is None else max_macs}
    options = {"params": "discretize.max_params", "macs": f"discretize.max_{'flops' if max_macs is None else 'macs'}"}
    for given, most in (limits or {}).items():
        name, option = FORMER.get(given, given), f"discretize.limits[{given!r}]"
        if every.get(name) is not None:
            raise TangleNASError(f"{option} is {most!r}, and {options[name]} is {every[name]!r}: leave one out")
        every[name], options[name] = None if most is None else positive(option, most, infinite=True), option
    return every


def discretize(
    space: SearchSpace,
    data: DataView,
    mixture: Mapping[str, Tensor] | None,
    *,
    method: str = "auto",
    derivation: str = "both",
    candidates: int = 100,
    prior: Literal["uniform", "mixture"] = "uniform",
    cost: str = "params",
    fill: float = 0.95,
    max_params: int | None = None,
    max_macs: int | None = None,
    max_flops: int | None = None,
    seconds: float | None = None,
    clock: Clock = "processor",
    objectives: Sequence[Objective] = (),
    limits: Mapping[str, float] | None = None,
    targets: Mapping[str, float] | None = None,
    recalibration_batches: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    device: str | None = None,
    methods: Mapping[str, Method] = METHODS,
    checkpoints: CheckpointFolder | None = None,
    progress: Progress | None = None,
) -> DiscretizeResult:
    """Derive an architecture from a trained supernet.

    Args:
        space: The supernet with its trained weights.
        data: A view of `weights` (for the statistics of batch norms), `architecture` (to rank candidates) and
            `validation` (to measure the result). Nothing is measured on augmented samples. Of an augmented split, up to
            4,096 samples are held without augmentation (`DataView.plain`), and these are all that candidates are judged
            on.
        mixture: The mixture of a gradient search, by choice. It is None or empty after a sampled search.
        method: "argmax" takes the most probable option of every row. The other methods judge candidates with the
            supernet's weights on the architecture split, and take that of smallest loss: "random", "both", which judges
            what argmax takes with candidates drawn from the mixture and random ones, "evolution", "surrogate", which
            proposes candidates by regression, and "front" and "nsga2", which look for the whole front of loss and cost.
            "race" trains the best of them, and takes that of smallest loss on the validation split; it has to be in
            `methods`.
            "auto" stands for `derivation`, the optimizer's own method.
        candidates: The largest number of architectures to judge. It decides how long a method takes.
        seconds: The time that judging may take, instead of `candidates`. A trial says how many candidates fit. Argmax
            judges one, and the trainings of a race have a budget of their own.
        clock: The clock for `seconds`: "processor" adds up the seconds of all threads and ranks, which other programs
            hardly change if there is one thread; "wall" is the clock for work on a GPU.
        prior: "uniform" draws the first candidates with equal probability for all options of a row. "mixture" draws
            them from the mixture, and starts with the architecture of argmax.
        cost: The cost of the front: "params", "macs" or the name of an objective.
        fill: The share of the tightest limit that candidates of "random" and "evolution" use at least, where moves lead
            there; from 0 to 1.
        max_params, max_macs: Hard limits on parameters and multiply-accumulates. No candidate exceeds them.
        max_flops: The former name of `max_macs`.
        objectives, limits: Further costs, bound to the space, and further hard limits by the name of a cost.
        targets: The costs that the search aimed for. They are limits where no other limit of that cost is given.
            Infinity in `limits` lifts one.
        recalibration_batches: Batches that set the statistics of batch norms anew for each candidate, or 0.
        methods: The methods by name. Pass others to change their options.
        checkpoints: The folder for scores. A derivation that finds scores there continues from them.

    Raises:
        TangleNASError: A method is unknown, an option is out of its range, a limit or a target is of a cost that no
            objective computes, or no architecture is within the budget.
    """
    method = derivation if method == "auto" else method
    cost = FORMER.get(cost, cost)
    costs = [*METRICS, *(objective.name for objective in objectives)]
    seed = checked_seed("discretize.seed", seed)
    check_options(method, methods, candidates, recalibration_batches, cost, costs, fill, prior)
    if prior == "mixture" and not mixture:
        raise TangleNASError(
            "discretize.prior 'mixture' needs the mixture of a gradient search, and the search has none: use 'uniform'"
        )
    progress = progress or SilentProgress()
    given = limits_of(max_params, max_macs, limits, max_flops)
    aims = {name: most for name, most in (targets or {}).items() if given.get(name) is None}
    budget = Budget(space, given | aims, objectives)
    _note_aims(progress, budget, aims)
    budget.check()
    _note_sources(progress, objectives)
    check_fit(space, data.validation, data.architecture, data.weights)
    weights = space.mixture(mixture) if mixture else None
    timer = None
    if seconds is not None:
        timer = Timer(seconds, clock, device_of(device), "discretize", "candidates")
        candidates = space.size
    judged_on = data.plain("architecture")
    if len(judged_on) < (every := len(data.architecture)):
        progress.note(
            f"discretize: candidates are judged on {len(judged_on):,} of the {every:,} samples of the architecture "
            "split, those that are held without augmentation"
        )
    with Candidates(
        space, data.plain("weights"), judged_on, budget=budget, fill=fill, objectives=objectives,
        cost=cost, limit=candidates, prior=weights if prior == "mixture" else None,
        recalibration_batches=recalibration_batches, batch_size=batch_size, seed=seed, device=device_of(device),
        checkpoints=checkpoints, progress=progress,
    ) as tried:  # fmt: skip
        judging = judging_of(methods[method])
        if timer is not None and judging != "one candidate":
            tried.limit_by_seconds(timer, race=judging == "race")
        found = methods[method](tried, weights)
        if not isinstance(found, Raced | None):
            raise TangleNASError(
                f"the method {method!r} returned a {type(found).__name__}, expected None, or a Raced from `race`. What "
                "it judges is in `candidates.records`; `candidates.first(1, mixture=mixture)` is what argmax takes"
            )
        front = [record["architecture"] for record in final_front(tried)]
        best = tried.best()[0]["architecture"] if found is None else found.architecture
        measured = tried.measured(best, data.validation)
    records = [{**record, "architecture": str(record["architecture"])} for record in tried.best(len(tried.records))]
    most_probable = None if weights is None else best == space.most_probable(weights)
    projection = tried.projection
    exact = projection.exact if projection is not None and projection.architecture == best else None
    if exact is not None and len(records) == 1:
        _note_projection(progress, exact, within=most_probable is True)
    return DiscretizeResult(
        best,
        space.cost(best),
        measured.accuracy,
        measured.loss,
        records,
        front,
        cost,
        costs={objective.name: objective.cost(best) for objective in objectives},
        limits={limit.name: limit.most for limit in budget.limits},
        units={objective.name: objective.unit for objective in objectives},
        most_probable=most_probable,
        exact=exact,
        raced=found,
    )


def _note_aims(progress: Progress, budget: Budget, aims: Collection[str]) -> None:
    """Tell a person that targets of the search in costs without a limit are limits."""
    for limit in budget.limits:
        if limit.name in aims:
            progress.note(f"discretize: at most {limit.counted(limit.most, digits=3)}, the target of the search")


def check_options(
    method: str,
    methods: Collection[str],
    candidates: int,
    recalibration_batches: int,
    cost: str,
    costs: Sequence[str],
    fill: float,
    prior: str,
) -> None:
    """Check the options of a derivation, which are those of `discretize`; `costs` are the names that `cost` may have.

    Raises:
        TangleNASError: A method or a cost is unknown, or an option is out of its range.
    """
    if method not in methods:
        raise unknown("discretize.method", method, methods)
    at_least("discretize.candidates", candidates, 1)
    at_least("discretize.recalibration_batches", recalibration_batches, 0)
    if cost not in costs:
        raise unknown("discretize.cost", cost, costs)
    within("discretize.fill", fill, 0, 1)
    if prior not in ("uniform", "mixture"):
        raise TangleNASError(f"discretize.prior is {prior!r}, expected 'uniform' or 'mixture'")


def _note_sources(progress: Progress, objectives: Sequence[Objective]) -> None:
    """Tell a person where the numbers of objectives come from."""
    for objective in objectives:
        if objective.source:
            progress.note(f"discretize: {objective.origin()}")


def _note_projection(progress: Progress, exact: bool, within: bool) -> None:
    """Tell a person where the budget, not alpha, decided."""
    if not within:
        progress.note(
            "discretize: the mixture's most probable architecture is beyond the budget; this is the most probable "
            "one within it. What the mixture leaves open is rather judged on data: method 'evolution', prior 'mixture'"
        )
    if not exact:
        progress.note(
            "discretize: a local search found the architecture within the budget, which has a limit without tables or "
            "leaves too much to look at: a more probable one may fit"
        )
