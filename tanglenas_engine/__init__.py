"""TangleNAS: gradient-based one-shot architecture search over weight-entangled spaces.

The names below are the public surface. They load on first use: importing the package imports neither torch
nor any plugin, so that `tanglenas --help` and the listing of plugins stay fast.
"""

import importlib
from typing import Any

_HOME = {
    "Architecture": "architecture",
    "Choice": "choice",
    "Cost": "cost",
    "Dataset": "data",
    "Objective": "objective",
    "Optimizer": "optimizer",
    "SearchSpace": "space",
    "create_dataset": "plugins",
    "create_objective": "plugins",
    "create_optimizer": "plugins",
    "create_space": "plugins",
    "hookimpl": "plugins",
}

__all__ = ["elastic", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name == "elastic":
        return importlib.import_module(".elastic", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
