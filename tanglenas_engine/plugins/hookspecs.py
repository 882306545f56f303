"""The hooks that a plugin implements, and the version of their contract.

A plugin is a module named in the entry-point group `tanglenas`. All of it:

    from tanglenas_engine import hookimpl

    @hookimpl
    def tanglenas_register_spaces(register):
        register("mine", "my_package.space:MySpace", summary="what it is")
"""

from collections.abc import Callable
from typing import Any, Protocol

import pluggy

API_VERSION = 1
"""Version of this contract. A plugin may state the one it was written for as `TANGLENAS_API`."""

KINDS = ("space", "optimizer", "dataset", "objective")
HOOKS = {f"tanglenas_register_{kind}s": kind for kind in KINDS}

hookspec = pluggy.HookspecMarker("tanglenas")
hookimpl = pluggy.HookimplMarker("tanglenas")


class Register(Protocol):
    """Registers `target` under `name`.

    A target written as "package.module:Class" is imported on first use, which keeps listing fast; a class or
    a function is accepted too. `defaults` are options of the target that whoever creates it may override.
    Raises TangleNASError for a target of another form.
    """

    # Not positional-only: a default for an option called `name` or `target` is a TypeError, never a mix-up.
    def __call__(self, name: str, target: str | Callable[..., Any], *, summary: str = "", **defaults: Any) -> None: ...


@hookspec
def tanglenas_register_spaces(register: Register) -> None:
    """Register search spaces: subclasses of `tanglenas_engine.SearchSpace`."""


@hookspec
def tanglenas_register_optimizers(register: Register) -> None:
    """Register optimizers: subclasses of `tanglenas_engine.Optimizer`."""


@hookspec
def tanglenas_register_datasets(register: Register) -> None:
    """Register datasets: subclasses of `tanglenas_engine.Dataset`."""


@hookspec
def tanglenas_register_objectives(register: Register) -> None:
    """Register objectives: subclasses of `tanglenas_engine.Objective`."""
