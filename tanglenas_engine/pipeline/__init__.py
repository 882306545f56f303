"""The four stages as DVC runs them: gin in, a stage function of the engine, files and an MLflow run out.

A project's `pipelines/` holds a script for each stage, which people may change. What the scripts call is here, so that
an upgrade of the package reaches every project. The names below are what a script may rely on; they load on first use.

Beside the commands, this package alone knows gin, DVC, MLflow, jinja and matplotlib. The engine imports nothing of it.
"""

import importlib
from typing import Any

_HOME = {
    "benchmark": "config.configurables",
    "check_later_budget": "later",
    "check_later_stages": "later",
    "create_dataset": "config.configurables",
    "create_optimizer": "config.configurables",
    "create_space": "config.configurables",
    "discretize": "config.configurables",
    "evaluate": "config.configurables",
    "make_splits": "config.configurables",
    "methods": "trainings",
    "objectives": "config.configurables",
    "open_stage": "stage",
    "rank_correlation": "config.configurables",
    "read_architecture": "config.configurables",
    "register": "config.reader",
    "required": "config.reader",
    "retrain": "config.configurables",
    "search": "config.configurables",
    "write_environment": "inputs.environment",
}

_MODULES = ("figures", "files", "outputs", "studies")

__all__ = [*_MODULES, *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
