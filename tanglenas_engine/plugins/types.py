"""The records that the plugin manager keeps: plugins, registrations and faults."""

import importlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tanglenas_engine.errors import TangleNASError, describe


class PluginWarning(UserWarning):
    """A warning that an installed plugin is broken, or conflicts with another. The other plugins work without it."""


@dataclass(frozen=True)
class Plugin:
    """An entry point of the group `tanglenas`, and the distribution that installed it."""

    distribution: str
    version: str
    entry_point: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (entry point {self.entry_point!r})"


@dataclass(frozen=True)
class Registration:
    """A name that a plugin registered. Its target is imported by `load`.

    Attributes:
        kind: One of `KINDS`.
        name: The registered name.
        target: The class or function, or a string such as "package.module:Class".
        plugin: The plugin that registered it.
        summary: One line of description.
        defaults: Options of the target, which a caller may override.
    """

    kind: str
    name: str
    target: str | Callable[..., Any]
    plugin: Plugin
    summary: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def distribution(self) -> str:
        return self.plugin.distribution

    @property
    def version(self) -> str:
        return self.plugin.version

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} of {self.plugin}"

    def load(self) -> Callable[..., Any]:
        """Import the class or function and return it.

        Raises:
            TangleNASError: The import failed. The message names the plugin and the cause.
        """
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            target: Callable[..., Any] = operator.attrgetter(attribute)(importlib.import_module(module))
        except Exception as cause:
            raise TangleNASError(
                f"{self} cannot be imported from {self.target!r}: {describe(cause)}."
                f" Reinstall or upgrade {self.distribution}."
            ) from cause
        return target


@dataclass(frozen=True)
class Fault:
    """A problem of a plugin, the remedy, and the exception that caused it, if any."""

    plugin: Plugin
    problem: str
    remedy: str
    cause: BaseException | None = None

    def __str__(self) -> str:
        return f"{self.plugin} {self.problem}. {self.remedy}"
