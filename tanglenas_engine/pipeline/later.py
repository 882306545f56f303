"""Checks of the later stages before a search, which may take days: what they would refuse is refused now.

The search does not depend on the settings of later stages otherwise: changing them does not make it run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gin

from tanglenas_engine.data import Dataset, Splits
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.errors import TangleNASError, unknown
from tanglenas_engine.pipeline.config import bindings_of, configured
from tanglenas_engine.pipeline.configurables import bound_limits, objectives, retrain, space_for
from tanglenas_engine.pipeline.params import sets_python_path, stage_arguments
from tanglenas_engine.pipeline.stage import Stage
from tanglenas_engine.pipeline.trainings import methods, refuse_race
from tanglenas_engine.pipeline.values import macro_value
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.spaces.space import SearchSpace


def check_later_stages(stage: Stage, splits: Splits) -> None:
    """Refuse what a later stage would refuse after the search, where params.yaml is about this space and dataset.

    The configs of all later stages are read. Discretize needs a method that exists, and a budget that some architecture
    meets. Retrain makes the smallest network of the space with its optimizer, schedule and loss, and trains nothing.

    Args:
        stage: The search.
        splits: The splits that it makes.

    Raises:
        TangleNASError: A later stage would fail. The message has its name and the reason.
    """
    check_later_budget(stage.space, stage.dataset)
    own = _space_options()
    with _later("retrain", stage.space, stage.dataset) as about_this:
        if about_this and gin.get_bindings("retrain").get("mode") != "inherit":
            with distributed.apart(), seeded(stage.seed):
                space = stage.space if _space_options() == own else space_for(stage.dataset)
                view = stage.open("training", "validation", splits=splits)
                retrain(
                    space, space.smallest(), view,
                    until=0, recalibration_batches=0, seed=stage.seed, device=stage.device,
                )  # fmt: skip
    with _later("evaluate", stage.space, stage.dataset):
        pass


def check_later_budget(space: SearchSpace, dataset: Dataset) -> None:
    """Refuse a method or a budget that discretize would refuse; see `check_later_stages`, which calls this.

    Raises:
        TangleNASError: There is no such method, no architecture of the space meets the budget, or an objective in it,
            or of a target of the search, fails under the config of discretize.
    """
    targets = {
        values.get("objective", "macs")
        for values in bindings_of("target")
        if values.get("value") or values.get("share")
    }
    with _later("discretize", space, dataset) as about_this:
        bound = gin.get_bindings("discretize")
        if (method := bound.get("method", "auto")) not in ("auto", *methods):
            raise unknown("discretize.method", method, ("auto", *methods))
        if about_this:
            Budget(space, bound_limits(), objectives(space, targets)).check()
    if method == "race":
        with _later("retrain", space, dataset, told="discretize"):
            refuse_race()


def _space_options() -> dict[str, object]:
    """Return what gin binds of the space; retrain may build a larger one than search."""
    found: dict[str, object] = gin.get_bindings("create_space", resolve_references=False)
    return found


@contextmanager
def _later(stage: str, space: SearchSpace, dataset: Dataset, told: str = "") -> Iterator[bool]:
    """Configure gin as for a later stage until the block ends, and say whether it is about this space and dataset.

    A stage that dvc.yaml lacks, or whose command sets where Python finds modules, has an empty config.

    Args:
        told: The stage that would fail, if it is another one.
    """
    arguments = None if sets_python_path(stage) else stage_arguments(stage)
    try:
        with configured(arguments or ()):
            yield (macro_value("SPACE"), macro_value("DATASET")) == (space.name, dataset.name)
    except TangleNASError as error:
        raise TangleNASError(f"after the search, {told or stage} would fail: {error}") from error
