"""The functions that gin files can bind: those of the engine under their own names, and what the stages add to them.

Every stage registers those of all four, so that its gin file can include another's: what they share is written once.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import gin
import torch

from tanglenas_engine import plugins
from tanglenas_engine.data import Dataset, data_path
from tanglenas_engine.data import make_splits as engine_make_splits
from tanglenas_engine.derivation.race import race as engine_race
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.reader import (
    KINDS,
    bindings_of,
    record,
    referred,
    register,
    required,
    without_call_stack,
)
from tanglenas_engine.pipeline.config.values import check_types, macro_value
from tanglenas_engine.pipeline.files import ARCHITECTURE, FRONT, read_json_or_empty
from tanglenas_engine.pipeline.files import METRICS as METRICS_FOLDER
from tanglenas_engine.pipeline.headline import COSTS, excesses
from tanglenas_engine.pipeline.inputs.pretrained import pretrained as pipeline_pretrained
from tanglenas_engine.plugins import manager
from tanglenas_engine.plugins.manager import options_of
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.fingerprint import file_digest
from tanglenas_engine.runtime.foreign import place
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.cost import FORMER, METRICS
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.stages.discretize import METHODS, limits_of
from tanglenas_engine.stages.discretize import discretize as engine_discretize
from tanglenas_engine.stages.evaluate import evaluate as engine_evaluate
from tanglenas_engine.stages.evaluate import rank_correlation as engine_rank_correlation
from tanglenas_engine.stages.retrain import retrain as engine_retrain
from tanglenas_engine.stages.search import search as engine_search

if TYPE_CHECKING:
    from tanglenas_engine.tables import Benchmark

create_space = register(plugins.create_space)
create_optimizer = register(plugins.create_optimizer)
create_dataset = register(plugins.create_dataset)
make_splits = register(engine_make_splits)
pretrained = register(pipeline_pretrained)
search = register(engine_search)
discretize = register(engine_discretize)
retrain = register(engine_retrain)
evaluate = register(engine_evaluate)
rank_correlation = register(engine_rank_correlation)
race = register(engine_race)
methods = {name: register(method) for name, method in METHODS.items()}
"""Ways to derive an architecture that train no network. `trainings.methods` has them all."""


@register
def create_objective(name: str, **options: Any) -> Objective:
    """Create an objective with those of the options that it takes: gin binds them for all objectives of a search.

    Raises:
        TangleNASError: The name is unknown, or no objective takes an option.
    """
    own = _options("objective", name)
    foreign = {option for option in options if own is not None and option not in own}
    if foreign:
        others = [_options("objective", other) for other in manager().names("objective") if other != name]
        foreign = {option for option in foreign if any(known is None or option in known for known in others)}
    return plugins.create_objective(name, **{key: options[key] for key in options.keys() - foreign})


@register
def target(
    objective: str = "macs",
    value: float | None = None,
    share: float | None = None,
    weight: float = 1.0,
    penalty: Literal["hinge", "log", "multiplier"] = "hinge",
    rate: float = 0.1,
) -> Target:
    """Make a target for `search.targets`: a cost that the search is drawn to (see `objective.Target`).

    The options of objectives are bound as `create_objective.OPTION`. Those of this one alone are bound in its scope, as
    `SCOPE/create_objective.OPTION`.
    """
    return Target(_objective(objective), value, share, weight, penalty, rate)


@register
def benchmark(
    space: SearchSpace, path: str | None = None, metric: str = "test_acc", higher_is_better: bool | None = None
) -> Benchmark | None:
    """Return a function that looks up an architecture's value, rank and regret in a benchmark table, or None.

    Bind `benchmark.path` to a table's file (see `tanglenas tables`): the history of the search and the metrics of
    evaluate then have the three numbers, where the table lists the architecture. Of a pool (see `tanglenas pool`),
    evaluate also has the percentile of the network found, and the rank correlation of the supernet. No result depends
    on them. Where the metric's name does not say which direction is better, bind `benchmark.higher_is_better`.
    """
    if path is None:
        return None
    from tanglenas_engine.tables import Benchmark, load_table

    told = {} if higher_is_better is None else {metric: higher_is_better}
    table = load_table(data_path(path), space, told)
    found = Benchmark(table, metric)
    for sentence in filter(None, (table.origin, found.gaps) if distributed.rank() == 0 else ()):
        print(f"{path}: {sentence}", file=sys.stderr)
    return found


def _as_numbers(digest: str) -> set[str]:
    """Return how DVC writes the first digits of a digest that can be read as a number: `12e4` is 120000.0."""
    written = set()
    for length in range(1, len(digest) + 1):
        start = digest[:length]
        if start.isdigit():
            written.add(str(int(start)))
        elif re.fullmatch(r"\d+e\d+", start):
            written.add(str(float(start)))
    return written


@register
def read_architecture(space: SearchSpace, pick: str = "best") -> Architecture:
    """Read the architecture that discretize wrote, and check that it is one of the space.

    Bind `read_architecture.pick` to the digest of an architecture in `out/discretize/pareto.csv`, or to the digest's
    first digits, to go on with that one. What exceeds a limit of discretize in this space is printed.

    Raises:
        TangleNASError: The file holds an architecture of another space, or `pick` names none of them or several.
    """
    path = ARCHITECTURE
    if pick != "best":
        points = sorted(FRONT.glob("*.json"))
        found = [point for point in points if pick and point.stem.startswith(pick)]
        if not found:  # DVC reads `-S retrain.pick=12e45` as a number, and hands on how that is written
            found = [point for point in points if pick in _as_numbers(point.stem)]
        if len(found) != 1:
            listed = ", ".join(point.stem for point in found or points) or "it has none, since only one was judged"
            raise TangleNASError(
                f"read_architecture.pick is {pick!r}, expected 'best' or the digest of one architecture in {FRONT}: "
                f"{listed}. DVC reads digits with one e as a number: give more of the digest, or quote it as in "
                "-S \"retrain.pick='12e45'\""
            )
        (path,) = found
    chosen = Architecture.from_json(path.read_text("utf-8", errors="replace"))
    architecture = space.architecture_of(space.assignment_of(chosen))
    if distributed.rank() == 0:
        costs = vars(space.cost(architecture))
        derived = read_json_or_empty(METRICS_FOLDER / "discretize.json")
        for key, excess in excesses(derived, {**costs, "digest": architecture.digest}).items():
            print(f"the network has {costs[key]:,} {COSTS[key][0]}: this {excess}", file=sys.stderr)
    return architecture


def objectives(space: SearchSpace, targets: Iterable[str] = ()) -> list[Objective]:
    """Make the plugins' objectives that discretize needs, and bind them to the space.

    Args:
        targets: The names of the costs that the search aimed for, which are limits of discretize. `discretize.limits`
            and `discretize.cost` name the others.
    """
    return [_objective(name).bind(space) for name in sorted({*_costs(), *targets} - {*METRICS, *FORMER})]


def bound_limits() -> dict[str, float | None]:
    """Return the limits that gin binds of discretize, by the name of the cost.

    Raises:
        TangleNASError: A limit is not a positive number, or two options limit the same cost.
    """
    bound = gin.get_bindings("discretize")
    return limits_of(
        max_params=bound.get("max_params"),
        max_macs=bound.get("max_macs"),
        limits=bound.get("limits"),
        max_flops=bound.get("max_flops"),
    )


def create() -> tuple[int, SearchSpace, Dataset]:
    """Return the seed, and make the space and the dataset that the config names.

    The dataset gives the space its options, such as the size of an image, unless gin binds them.

    Raises:
        TangleNASError: A name is unknown, an option is of the wrong type, or the space does not fit the dataset.
    """
    seed = required("SEED", int)
    if not 0 <= seed < 2**63:
        raise TangleNASError(f"SEED is {seed}, expected a whole number from 0 to 2**63 - 1")
    names = {kind: required(macro, str) for macro, kind in KINDS.items() if macro_value(macro) is not None}
    for kind, name in names.items():
        _check_options(kind, name)
    dataset: Dataset = create_dataset(name=required("DATASET", str))
    for value in dataset.std or ():
        if not (math.isfinite(value) and value > 0):
            raise TangleNASError(
                f"the dataset {dataset.name!r} has the standard deviation {value} (std), expected positive numbers, as "
                "inputs are divided by it. Correct create_dataset.std"
            )
    torch.manual_seed(seed)
    return seed, _space_for(dataset), dataset


def _space_for(dataset: Dataset) -> SearchSpace:
    """Make the space that the config names, with the options that the dataset gives it, unless gin binds them.

    Raises:
        TangleNASError: The name is unknown, an option is of the wrong type, or the space does not fit the dataset.
    """
    name = required("SPACE", str)
    bound = gin.get_bindings("create_space", resolve_references=False)
    fitted = {option: value for option, value in dataset.space_options().items() if option not in bound}
    try:
        space: SearchSpace = create_space(name=name, **fitted)
        record("create_space", fitted)  # the space can be made again without the data
    except TangleNASError as error:
        if any(f"takes no option {option!r}" in str(error) for option in fitted):
            raise TangleNASError(
                f"the space {name!r} is not for data such as {dataset.name!r}, which need a space with "
                f"{', '.join(dataset.space_options())}: choose another space or dataset"
            ) from None
        named = required("DATASET", str)
        known = _options("dataset", named)
        reason = without_call_stack(error).rstrip(".")
        for option, value in fitted.items():
            if f"{option} is {value}" in reason and (known is None or option in known):
                raise TangleNASError(
                    f"{reason}. The dataset {named!r} says so: bind create_dataset.{option} in "
                    f"gin/datasets/{named}.gin, or choose another space or dataset"
                ) from None
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # options that make no network
        options = ", ".join(f"{option}={value!r}" for option, value in {**fitted, **bound}.items())
        raise TangleNASError(
            f"the space {name!r} cannot be made with {options}: {type(error).__name__}: "
            f"{without_call_stack(error).splitlines()[0].rstrip('.')}{place(error)}. Correct what gin binds of "
            "create_space, or the space"
        ) from error
    return space


def packages() -> set[ModuleType]:
    """Return the top-level packages of all that the config names: plugins, and what an @ refers to by its full name."""
    named = {(kind, name) for macro, kind in KINDS.items() if (name := macro_value(macro))}
    named |= {("objective", name) for name in _costs()}
    named |= {("objective", values.get("objective", "macs")) for values in bindings_of("target")}
    modules = {manager().resolve(kind, name).load().__module__ for kind, name in named} | referred()
    found = {sys.modules[module.split(".")[0]] for module in modules}
    # torch is large, and its version is recorded. A module written in C has no file.
    return {package for package in found - {torch} if hasattr(package, "__file__") or hasattr(package, "__path__")}


def tables(*readers: str) -> dict[str, str]:
    """Return the SHA-256 of each file that the config has objectives or benchmarks read, by path.

    Args:
        readers: The configurable functions that read them, `create_objective` or `benchmark`; both if there are none.
    """
    named = readers or ("create_objective", "benchmark")
    values = [value for name in named for it in bindings_of(name) for value in it.values()]
    paths = {value: data_path(value) for value in values if isinstance(value, str)}
    return {name: file_digest(path) for name, path in paths.items() if path.is_file()}


def _costs() -> set[str]:
    """Return the costs in `discretize.limits` and `discretize.cost`, but for those that every space counts."""
    bound = gin.get_bindings("discretize")
    limits = bound.get("limits")
    named = {bound.get("cost", "params"), *(limits if isinstance(limits, Mapping) else ())}
    return named - {*METRICS, *FORMER}


def _objective(name: str) -> Objective:
    _check_options("objective", name)
    objective: Objective = create_objective(name=name)
    return objective


def _options(kind: str, name: str) -> set[str] | None:
    """Return the names of the options that a plugin's class takes; None stands for any."""
    known, _ = options_of(manager().resolve(kind, name).load())
    return known


def _check_options(kind: str, name: str) -> None:
    """Check what gin binds of `create_KIND` against the annotations of the plugin's class.

    Raises:
        TangleNASError: A value is of the wrong type.
    """
    # As references: what they stand for has lost its name, and making it may take long.
    bound = gin.get_bindings(f"create_{kind}", resolve_references=False)
    check_types(f"create_{kind}", manager().resolve(kind, name).load(), bound)
