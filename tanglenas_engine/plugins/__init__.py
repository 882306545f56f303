"""Search spaces, optimizers, datasets and objectives by name, built-in ones and other people's alike.

Nothing here imports torch: a plugin's classes are imported when one of them is created.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from .hookspecs import API_VERSION, KINDS, Register, hookimpl
from .manager import PluginManager
from .types import Fault, Plugin, PluginWarning, Registration

if TYPE_CHECKING:
    from tanglenas_engine.optimizers.optimizer import Optimizer
    from tanglenas_engine.spaces.objective import Objective
    from tanglenas_engine.spaces.space import SearchSpace

    from ..data import Dataset

__all__ = [
    "API_VERSION",
    "KINDS",
    "Fault",
    "Plugin",
    "PluginManager",
    "PluginWarning",
    "Register",
    "Registration",
    "create_dataset",
    "create_objective",
    "create_optimizer",
    "create_space",
    "hookimpl",
    "manager",
]


@functools.lru_cache(maxsize=1)
def manager() -> PluginManager:
    """The plugins of this process, found on the first call."""
    return PluginManager()


def create_space(name: str, **options: Any) -> SearchSpace:
    """The search space registered under `name`, built with `options` over its defaults.

    Raises TangleNASError for an unknown name or option, naming the closest one. The space's own errors pass.
    """
    space: SearchSpace = manager().create("space", name, **options)
    space.name = name
    return space


def create_optimizer(name: str, **options: Any) -> Optimizer:
    """The optimizer registered under `name`. Raises as `create_space` does."""
    optimizer: Optimizer = manager().create("optimizer", name, **options)
    optimizer.name = name
    return optimizer


def create_dataset(name: str, **options: Any) -> Dataset:
    """The dataset registered under `name`. Raises as `create_space` does."""
    dataset: Dataset = manager().create("dataset", name, **options)
    dataset.name = name
    return dataset


def create_objective(name: str, **options: Any) -> Objective:
    """The objective registered under `name`. Raises as `create_space` does."""
    objective: Objective = manager().create("objective", name, **options)
    objective.name = name
    return objective
