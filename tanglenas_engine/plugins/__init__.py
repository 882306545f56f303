"""Search spaces, optimizers, datasets and objectives by name. Built-in plugins and other people's are loaded alike.

This module does not import torch. A plugin's class is imported when its first object is created.
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
    """Return the plugins of this process. The first call finds them."""
    return PluginManager()


def create_space(name: str, **options: Any) -> SearchSpace:
    """Create the search space registered under `name`, with `options` over its registered defaults.

    Errors of the space itself pass unchanged.

    Raises:
        TangleNASError: The name or an option is unknown (the message suggests the closest one), or an option is
            missing.
    """
    space: SearchSpace = manager().create("space", name, **options)
    space.name, space.created_with = name, options
    return space


def create_optimizer(name: str, **options: Any) -> Optimizer:
    """Create the optimizer registered under `name`. It raises the same errors as `create_space`."""
    optimizer: Optimizer = manager().create("optimizer", name, **options)
    optimizer.name = name
    return optimizer


def create_dataset(name: str, **options: Any) -> Dataset:
    """Create the dataset registered under `name`. It raises the same errors as `create_space`."""
    dataset: Dataset = manager().create("dataset", name, **options)
    dataset.name = name
    return dataset


def create_objective(name: str, **options: Any) -> Objective:
    """Create the objective registered under `name`. It raises the same errors as `create_space`.

    One that is registered under a former name has today's name in outputs.
    """
    from tanglenas_engine.spaces.cost import FORMER

    objective: Objective = manager().create("objective", name, **options)
    objective.name = FORMER.get(name, name)
    return objective
