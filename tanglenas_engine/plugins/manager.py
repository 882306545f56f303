"""The plugin manager: it finds the installed plugins and creates the objects that they registered.

Built-in plugins are loaded like everyone's, through an entry point of the group `tanglenas`. A broken plugin is
reported and skipped; the others still load. pluggy's own loader stops at the first exception, and drops the second of
two entry points with the same name. So this module loads the entry points itself.

    TANGLENAS_PLUGINS=a,b         load only these (names of distributions or entry points; empty: none)
    TANGLENAS_STRICT_PLUGINS=1    raise an error for a broken plugin or a conflict, instead of a warning
"""

import importlib.metadata
import inspect
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pluggy

from tanglenas_engine.errors import TangleNASError

from .. import errors
from ..errors import describe
from . import hookspecs
from .hookspecs import API_VERSION, HOOKS, KINDS, Register
from .types import Fault, Plugin, PluginWarning, Registration

GROUP = "tanglenas"
"""The entry-point group of plugins."""


class PluginManager:
    """The plugins that are installed when it is constructed.

    Attributes:
        faults: The problems of plugins that loaded in part or not at all.
        blocked: The plugins that `TANGLENAS_PLUGINS` excludes.

    Raises:
        TangleNASError: `TANGLENAS_PLUGINS` names a plugin that is not installed, or `TANGLENAS_STRICT_PLUGINS` is 1 and
            there is a fault or a conflict.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.blocked: list[Plugin] = []
        self._registered: dict[tuple[str, str], list[Registration]] = {}

        installed = _installed()
        wanted = _wanted([plugin for plugin, _ in installed])
        for plugin, entry_point in installed:
            if plugin in wanted:
                self._load(plugin, entry_point)
            else:
                self.blocked.append(plugin)
        self._report()

    def registrations(self, kind: str | None = None) -> list[Registration]:
        """Return all registrations of one kind or of all kinds, sorted by kind, name and distribution.

        Raises:
            TangleNASError: The kind is unknown.
        """
        _check_kind(kind)
        return [
            registration
            for key in sorted(self._registered, key=lambda key: (KINDS.index(key[0]), key[1]))
            if kind in (None, key[0])
            for registration in self._registered[key]
        ]

    def names(self, kind: str) -> list[str]:
        """Return the names registered for one kind, sorted."""
        return list(dict.fromkeys(registration.name for registration in self.registrations(kind)))

    def conflict(self, kind: str, name: str) -> str:
        """Return a message if several plugins registered the name, else ""."""
        claims = self._registered.get((kind, name), [])
        if len(claims) < 2:
            return ""
        claimants = " and by ".join(f"{claim.plugin}" for claim in claims)
        return (
            f"{kind} {name!r} is registered more than once: by {claimants}."
            " Uninstall one of them, or list the plugins to load in TANGLENAS_PLUGINS."
        )

    def resolve(self, kind: str, name: str) -> Registration:
        """Return the only registration of that kind and name. Nothing is imported.

        Raises:
            TangleNASError: Several plugins registered the name, or the name is unknown. For an unknown name, the
                message also lists the plugins that did not load, because one of them may provide it.
        """
        _check_kind(kind)
        if message := self.conflict(kind, name):
            raise TangleNASError(message)
        claims = self._registered.get((kind, name))
        if claims:
            return claims[0]
        raise TangleNASError(f"{errors.unknown(kind, name, self.names(kind))}{self._absent()}")

    def create(self, kind: str, name: str, /, **options: Any) -> Any:
        """Import the target registered under that name, and call it with its defaults and `options`.

        Raises:
            TangleNASError: The name or an option is unknown, or a required option is missing.
        """
        registration = self.resolve(kind, name)
        target = registration.load()
        options = {**registration.defaults, **options}
        known, required = options_of(target)
        for option in options:
            if known is not None and option not in known:
                raise TangleNASError(
                    f"{registration} takes no option {option!r}.{errors.closest(option, known)}"
                    f" Its options are: {', '.join(sorted(known)) or '(none)'}."
                )
        if missing := [option for option in required if option not in options]:
            raise TangleNASError(
                f"{registration} needs the option {' and '.join(map(repr, missing))}: pass"
                f" create_{kind}({name!r}, {', '.join(f'{option}=...' for option in missing)}), or bind"
                f" {' and '.join(f'create_{kind}.{option}' for option in missing)} in a gin file."
            )
        return target(**options)

    def _load(self, plugin: Plugin, entry_point: importlib.metadata.EntryPoint) -> None:
        try:
            module = entry_point.load()
        except (Exception, SystemExit) as cause:
            self._fault(plugin, "cannot be imported", "Reinstall, upgrade or uninstall it.", cause)
            return
        api = getattr(module, "TANGLENAS_API", API_VERSION)
        if api != API_VERSION:
            self._fault(
                plugin,
                f"was written for plugin API {api!r}, and this TangleNAS has plugin API {API_VERSION}",
                f"Install the release of {plugin.distribution} for API {API_VERSION},"
                f" or the release of tanglenas for API {api!r}.",
            )
            return

        # Each plugin has its own pluggy manager, so that a fault in one cannot affect the hooks of another.
        hooks = pluggy.PluginManager("tanglenas")
        hooks.add_hookspecs(hookspecs)
        try:
            hooks.register(module, name=str(plugin))
        except pluggy.PluginValidationError as cause:
            self._fault(plugin, "has a hook of the wrong form", "A hook takes one argument, `register`.", cause)
            return
        callers = hooks.get_hookcallers(module) or []
        if not callers:
            self._fault(plugin, "implements no hook", "Decorate its functions with tanglenas_engine.hookimpl.")
        for hook in callers:
            if hook.has_spec():
                try:
                    hook(register=self._register(HOOKS[hook.name], plugin))
                except Exception as cause:
                    self._fault(plugin, f"failed in {hook.name}", "Upgrade it, or tell its author.", cause)
            elif not all(implementation.optionalhook for implementation in hook.get_hookimpls()):
                remedy = f"{errors.closest(hook.name, HOOKS)} Hooks: {', '.join(HOOKS)}.".strip()
                self._fault(plugin, f"implements an unknown hook {hook.name!r}", remedy)

    def _register(self, kind: str, plugin: Plugin) -> Register:
        def register(name: str, target: str | Callable[..., Any], *, summary: str = "", **defaults: Any) -> None:
            if not isinstance(name, str) or not name:
                raise TangleNASError(f"register({name!r}, ...): the name must be a string that is not empty")
            if not callable(target) and not re.fullmatch(r"[\w.]+:[\w.]+", str(target)):
                raise TangleNASError(
                    f"register({name!r}, {target!r}): the target must be a class, a function"
                    " or a string such as 'package.module:Class'"
                )
            registration = Registration(kind, name, target, plugin, summary, defaults)
            self._registered.setdefault((kind, name), []).append(registration)

        return register

    def _fault(self, plugin: Plugin, problem: str, remedy: str, cause: BaseException | None = None) -> None:
        if cause is not None:
            problem = f"{problem}: {describe(cause)}"
        self.faults.append(Fault(plugin, problem, remedy, cause))

    def _report(self) -> None:
        conflicts = [message for kind, name in self._registered if (message := self.conflict(kind, name))]
        messages = [f"plugin {fault}" for fault in self.faults] + conflicts
        if messages and os.environ.get("TANGLENAS_STRICT_PLUGINS", "0") not in ("", "0"):
            cause = next((fault.cause for fault in self.faults if fault.cause), None)
            raise TangleNASError(" ".join(messages)) from cause
        for message in messages:
            warnings.warn(message, PluginWarning, stacklevel=3)

    def _absent(self) -> str:
        """Return the reasons why a name may be missing: plugins that are broken, excluded or not installed."""
        reasons = ""
        if self.faults:
            reasons += " A broken plugin may have provided it: " + " ".join(map(str, self.faults))
        if self.blocked:
            reasons += (
                f" TANGLENAS_PLUGINS={os.environ.get('TANGLENAS_PLUGINS', '')!r} keeps out"
                f" {', '.join(map(str, self.blocked))}: unset it, or add what you need."
            )
        if not self._registered and not reasons:
            reasons = " No plugin is installed, not even the built-in ones: install tanglenas with pip."
        return reasons


def _check_kind(kind: str | None) -> None:
    if kind is not None and kind not in KINDS:
        raise errors.unknown("kind of plugin", kind, KINDS)


def canonical_name(name: str) -> str:
    """Return a form of names of distributions and entry points to compare: `my-plugin` for `My_Plugin` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed() -> list[tuple[Plugin, importlib.metadata.EntryPoint]]:
    """Return the entry points in an order that does not depend on sys.path or the file system."""
    installed = []
    for entry_point in importlib.metadata.entry_points(group=GROUP):
        metadata: Any = {}
        # A half-removed distribution has entry points but no metadata. The standard library then returns None. The
        # backport, which some packages install in its place, raises an error.
        with suppress(Exception):
            metadata = (entry_point.dist and entry_point.dist.metadata) or {}
        name, version = (metadata[key] if key in metadata else "(unknown)" for key in ("Name", "Version"))
        installed.append((Plugin(name, version, entry_point.name), entry_point))
    return sorted(installed, key=lambda pair: (canonical_name(pair[0].distribution), pair[0].entry_point))


def _wanted(installed: list[Plugin]) -> list[Plugin]:
    """Return the installed plugins that TANGLENAS_PLUGINS names, or all of them if it is not set.

    Raises:
        TangleNASError: TANGLENAS_PLUGINS names a plugin that is not installed.
    """
    setting = os.environ.get("TANGLENAS_PLUGINS")
    if setting is None:
        return installed
    asked = [name.strip() for name in setting.split(",") if name.strip()]
    known = {name for plugin in installed for name in (plugin.distribution, plugin.entry_point)}
    wanted = {canonical_name(name) for name in asked}
    for name in asked:
        if canonical_name(name) not in map(canonical_name, known):
            raise errors.unknown("plugin in TANGLENAS_PLUGINS:", name, known)
    return [p for p in installed if {canonical_name(p.distribution), canonical_name(p.entry_point)} & wanted]


def options_of(target: Callable[..., Any]) -> tuple[set[str] | None, list[str]]:
    """Return the names of all options of a registered class or function (None: any), and those of the required ones.

    A class passes its **options to its base class, so the options of the base class count too. Only a function can take
    options that no signature names.
    """
    constructors: list[Callable[..., Any]] = [target]
    if isinstance(target, type):
        constructors = [base for base in target.__mro__[:-1] if "__init__" in vars(base)] or [target]
    known: set[str] = set()
    required: list[str] = []
    for level, constructor in enumerate(constructors):
        try:
            parameters = inspect.signature(constructor).parameters.values()
        except (TypeError, ValueError):  # written in C, without a signature
            return None, required
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        known |= {p.name for p in named}
        if level == 0:  # the class itself may pass the options that its base class requires
            required = [p.name for p in named if p.default is p.empty]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return known, required
    return (known if isinstance(target, type) else None), required
