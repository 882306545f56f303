"""The records that the plugin manager keeps: plugins, registrations and faults."""

import importlib
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tanglenas_engine.errors import TangleNASError, describe, shown


class PluginWarning(UserWarning):
    """A warning that an installed plugin is broken, or conflicts with another. The other plugins work without it."""


PATIENCE_SECONDS = 3.0
"""Seconds after which a plugin that is still being imported is named."""


class PluginError(TangleNASError):
    """The error for a plugin whose code ended in an exception. Its cause is that exception."""


@contextmanager
def contained(what: object, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Run a plugin's code. Whatever it raises is a PluginError, and it is named if it takes long.

    `sys.exit`, a panic of an extension and other exceptions that are no `Exception` would end the command in silence.

    Args:
        what: The plugin, and what of it runs.
        patience: Seconds after which `what` is named on stderr.

    Raises:
        PluginError: The code raised anything but KeyboardInterrupt.
    """
    timer = threading.Timer(patience, _name_the_slow, (shown(what),))
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as cause:
        raise PluginError(describe(cause)) from cause
    finally:
        timer.cancel()


def _name_the_slow(what: str) -> None:
    print(f"importing {what} ... (Ctrl-C ends it; TANGLENAS_PLUGINS names the plugins to load)", file=sys.stderr)


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
            # Built-in plugins import torch and timm, which may take long on a busy machine.
            with contained(self, PATIENCE_SECONDS if self.distribution != "tanglenas" else 60.0):
                target: Callable[..., Any] = operator.attrgetter(attribute)(importlib.import_module(module))
        except PluginError as error:
            raise TangleNASError(
                f"{self} cannot be imported from {self.target!r}: {error}. Reinstall or upgrade {self.distribution}."
            ) from error.__cause__
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
