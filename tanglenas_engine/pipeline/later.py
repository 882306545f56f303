"""Checks of the later stages before a search, which may take days: what they would refuse is refused now.

The search does not depend on the settings of later stages otherwise: changing them does not make it run again.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gin
import torch
from torch import Tensor

from tanglenas_engine.data import Dataset, Splits, open_splits
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.race import check_options as check_race
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.configurables import (
    bound_limits,
    create,
    create_optimizer,
    discretize,
    objectives,
    race,
    retrain,
)
from tanglenas_engine.pipeline.config.params import stage_command
from tanglenas_engine.pipeline.config.reader import bindings_of, configured
from tanglenas_engine.pipeline.config.values import macro_value
from tanglenas_engine.pipeline.files import inherited_advice, inherits
from tanglenas_engine.pipeline.headline import COSTS, plausible
from tanglenas_engine.pipeline.inputs.same_inputs import compare, input_options
from tanglenas_engine.pipeline.stage import Stage
from tanglenas_engine.pipeline.trainings import methods, refuse_race
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.spaces.cells import CellSpace
from tanglenas_engine.spaces.cost import FORMER, METRICS
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.stages.discretize import check_options as check_discretize


def check_later_stages(stage: Stage, splits: Splits) -> None:
    """Refuse what a later stage would refuse after the search, where params.yaml is about this space and dataset.

    The configs of all later stages are read. Retrain and evaluate make inputs as they were made for the weights that
    they take. Discretize needs a method that exists, and a budget that some architecture meets. Retrain makes the
    smallest network of the space with its optimizer, schedule and loss, and trains nothing.

    Args:
        stage: The search.
        splits: The splits that it makes.

    Raises:
        TangleNASError: A later stage would fail. The message has its name and the reason.
    """
    check_later_budget(stage.space, stage.dataset)
    own, inputs, divisor = _created_with(), input_options(stage.dataset), _final_divisor(stage.space)
    retrained: dict[str, Any] = {}
    limits = _targets(stage.space)
    with _later("discretize", stage.space, stage.dataset) as about_this:
        limits |= {name: most for name, most in bound_limits().items() if most is not None}
        if about_this and _created_with() != own:
            try:
                compare("discretize", create()[2], inputs, "the supernet", stage.progress)
            except TangleNASError as error:  # a search by hand may have options that discretize will get by hand, too
                stage.progress.note(f"discretize will refuse this search: {error}")
    with _later("retrain", stage.space, stage.dataset) as about_this:
        if about_this:
            with _ranks(), seeded(stage.seed):
                space, dataset = (stage.space, stage.dataset) if _created_with() == own else create()[1:]
                retrained = input_options(dataset)
                for told in _beyond(limits, stage.space, space):
                    stage.progress.note(told)
                if inherits():
                    compare("retrain", dataset, inputs, "the supernet", stage.progress)
                    if _shapes(space.converted(stage.space.state_dict())) != _shapes(space.state_dict()):
                        raise TangleNASError(
                            f"the space is of another size than in the search, and {inherited_advice()}"
                        )
                with _trained_with(space, divisor):
                    retrain(
                        space, space.smallest(), open_splits(dataset, splits, ("training", "validation")),
                        until=0, recalibration_batches=0, seed=stage.seed, device=stage.device,
                    )  # fmt: skip
    with _later("evaluate", stage.space, stage.dataset) as about_this:
        if about_this:
            dataset = stage.dataset if _created_with() == own else create()[2]
            compare("evaluate", dataset, retrained, "the network of retrain", stage.progress)


def check_later_budget(space: SearchSpace, dataset: Dataset) -> None:
    """Refuse a method, an option or a budget that discretize would refuse; see `check_later_stages`, which calls this.

    Raises:
        TangleNASError: There is no such method, an option is out of its range, no architecture of the space meets the
            budget, or an objective in it, or of a target of the search, fails under the config of discretize.
    """
    targets = {
        values.get("objective", "macs")
        for values in bindings_of("target")
        if values.get("value") or values.get("share")
    }
    with _later("discretize", space, dataset) as about_this:
        method = gin.get_bindings("discretize").get("method", "auto")
        known = ("auto", *methods, *([method] if _named_by_project(method) else []))
        # A cost that nothing computes is refused where the objectives are made.
        given = _given("discretize", discretize, check_discretize)
        check_discretize(**{**given, "methods": known, "costs": METRICS, "cost": "params"})
        if method == "race":
            with _ranks():
                check_race(**_given("race", race, check_race))
        if about_this:
            Budget(space, bound_limits(), objectives(space, targets)).check()
    if method == "race":
        with _later("retrain", space, dataset, told="discretize"):
            refuse_race()


def _targets(space: SearchSpace) -> dict[str, float]:
    """Return the targets of the search for costs of the headline, by name: discretize takes them for limits."""
    largest, found = space.cost(space.largest()), {}
    for values in bindings_of("target"):
        name = values.get("objective", "macs")
        name = FORMER.get(name, name)
        value, share = plausible(values.get("value")), plausible(values.get("share"))
        if name in COSTS and (limit := value or (share or 0) * getattr(largest, name)):
            found[name] = limit
    return found


def _beyond(limits: Mapping[str, float], searched: SearchSpace, retrained: SearchSpace) -> Iterator[str]:
    """Yield a sentence for each limit of discretize that networks may exceed because retrain builds larger ones."""
    there, here = (space.created_with or {} for space in (searched, retrained))
    other = [name for name in there if name in here and there[name] != here[name]]
    one, two = (",".join(f" with {name} {options[name]}" for name in other) for options in (there, here))
    largest = searched.cost(searched.largest())
    least, most = retrained.cost(retrained.smallest()), retrained.cost(retrained.largest())
    for name, (unit, _) in COSTS.items():
        limit = limits.get(name, math.inf)
        if getattr(most, name) > max(limit, getattr(largest, name)):
            yield (
                f"discretize keeps the limit of {math.floor(limit):,} {unit} for networks as in the search{one}. "
                f"Retrain builds larger ones{two}, of {getattr(least, name):,} to {getattr(most, name):,} {unit}: the "
                "final network may exceed the limit"
            )


def _ranks() -> AbstractContextManager[None]:
    """Act as the ranks of a later stage inside the block: those of this one where all stages have as many."""
    return nullcontext() if os.environ.get("TANGLENAS_NPROC") else distributed.apart()


def _given(name: str, function: Callable[..., object], check: Callable[..., object]) -> dict[str, Any]:
    """Return the options of a function that its check takes: what gin binds, and the defaults of the others."""
    defaults = {key: it.default for key, it in inspect.signature(function).parameters.items()}
    given = {**defaults, **gin.get_bindings(name)}
    return {key: given[key] for key in inspect.signature(check).parameters if key in given}


def _named_by_project(method: object) -> bool:
    """Return whether a script of the project names the method, which it may add to `methods`."""
    return any(str(method) in path.read_text("utf-8", errors="replace") for path in Path("pipelines").rglob("*.py"))


def _created_with() -> tuple[object, object]:
    """Return what gin binds of the space and the dataset: retrain may have larger ones than search."""
    space, dataset = (gin.get_bindings(it, resolve_references=False) for it in ("create_space", "create_dataset"))
    return space, dataset


def _final_divisor(space: SearchSpace) -> int:
    """Return the divisor of channels with which the weights of the space learn at the end of the search."""
    name = macro_value("OPTIMIZER")
    partial = isinstance(space, CellSpace) and space.partial_channels
    if not partial or not name or gin.get_bindings("search").get("path_epochs"):
        return 1
    return int(create_optimizer(name=name).final_divisor)


@contextmanager
def _trained_with(space: SearchSpace, divisor: int) -> Iterator[None]:
    """Let a space say inside the block that its weights were trained with a share of the channels."""
    before, space.superposition.trained_divisor = space.superposition.trained_divisor, divisor
    try:
        yield
    finally:
        space.superposition.trained_divisor = before


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


@contextmanager
def _later(stage: str, space: SearchSpace, dataset: Dataset, told: str = "") -> Iterator[bool]:
    """Configure gin as for a later stage until the block ends, and say whether it is about this space and dataset.

    A stage that dvc.yaml lacks, or whose command sets where Python finds modules, has an empty config.

    Args:
        told: The stage that would fail, if it is another one.
    """
    command = stage_command(stage)
    try:
        if command and command.missing:
            raise TangleNASError(
                f"{command.missing[0]} is missing, which its command in dvc.yaml names: write it (it may be empty), or "
                "choose another recipe in params.yaml"
            )
        with configured(command.arguments if command and "PYTHONPATH" not in command.before else ()):
            yield (macro_value("SPACE"), macro_value("DATASET")) == (space.name, dataset.name)
    except TangleNASError as error:
        raise TangleNASError(f"after the search, {told or stage} would fail: {error}") from error
