"""The hooks that a plugin implements, and the version of the plugin API.

A plugin is a module named in the entry-point group `tanglenas`. A complete plugin:

    from tanglenas_engine import hookimpl

    @hookimpl
    def tanglenas_register_spaces(register):
        register("mine", "my_package.space:MySpace", summary="what it is")
"""

from collections.abc import Callable
from typing import Any, Protocol

import pluggy

API_VERSION = 1
"""The version of the plugin API. A plugin may state the version that it was written for as `TANGLENAS_API`."""

KINDS = ("space", "optimizer", "dataset", "objective")
"""The kinds of things that plugins register."""
HOOKS = {f"tanglenas_register_{kind}s": kind for kind in KINDS}
"""The kind that each hook registers, by the hook's name."""

hookspec = pluggy.HookspecMarker("tanglenas")
hookimpl = pluggy.HookimplMarker("tanglenas")


class Register(Protocol):
    """A function that registers `target` under `name`.

    Args:
        name: The name.
        target: A string such as "package.module:Class", a class or a function. A string is imported on first use, which
            keeps listing fast.
        summary: One line that `tanglenas plugins` prints.
        defaults: Options of the target. The caller of `create_...` may override them.

    Raises:
        TangleNASError: The target has another form, or the name is empty.
    """

    # The parameters are not positional-only, so that a default called `name` or `target` is a TypeError.
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
