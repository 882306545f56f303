"""Finds the installed plugins and creates what they registered.

Built-in plugins come in through the same door as everyone's: an entry point of the group `tanglenas`. One
that is broken is reported and left out, and never takes the others down. pluggy's own loader stops at the
first exception and drops the second of two entry points of one name, so the loading is done here.

    TANGLENAS_PLUGINS=a,b         load only these (names of distributions or entry points; empty: none)
    TANGLENAS_STRICT_PLUGINS=1    raise where something is wrong, rather than warn
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


class PluginManager:
    """The plugins of this environment, as they are when it is constructed.

    Attributes:
        faults: what is wrong with plugins that loaded in part or not at all.
        blocked: plugins that `TANGLENAS_PLUGINS` keeps out.

    Raises TangleNASError where `TANGLENAS_PLUGINS` names a plugin that is not installed, and for any fault or
    conflict under `TANGLENAS_STRICT_PLUGINS=1`.
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
        """Everything registered, of one kind or of all, in order of kind, name and distribution."""
        _check_kind(kind)
        return [
            registration
            for key in sorted(self._registered, key=lambda key: (KINDS.index(key[0]), key[1]))
            if kind in (None, key[0])
            for registration in self._registered[key]
        ]

    def names(self, kind: str) -> list[str]:
        """The names registered for one kind, sorted."""
        return list(dict.fromkeys(registration.name for registration in self.registrations(kind)))

    def conflict(self, kind: str, name: str) -> str:
        """What to tell a person about a name that more than one plugin claims; empty where none does."""
        claims = self._registered.get((kind, name), [])
        if len(claims) < 2:
            return ""
        claimants = " and by ".join(f"{claim.plugin}" for claim in claims)
        return (
            f"{kind} {name!r} is registered more than once: by {claimants}."
            " Uninstall one of them, or list the plugins to load in TANGLENAS_PLUGINS."
        )

    def resolve(self, kind: str, name: str) -> Registration:
        """The one registration of that kind and name; nothing is imported.

        Raises TangleNASError for a name that more than one plugin claims, and for an unknown one, where it
        also names the plugins that did not load, for one of them may have provided it.
        """
        _check_kind(kind)
        if message := self.conflict(kind, name):
            raise TangleNASError(message)
        claims = self._registered.get((kind, name))
        if claims:
            return claims[0]
        raise TangleNASError(f"{errors.unknown(kind, name, self.names(kind))}{self._absent()}")

    def create(self, kind: str, name: str, /, **options: Any) -> Any:
        """Import what is registered under that name and call it with its defaults and `options`.

        Raises TangleNASError for an unknown name, an unknown option or a missing one.
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

        # A pluggy manager for each plugin: no fault in one can reach the hooks of another.
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
        """Why a name may be missing: the plugins that are not there to provide it."""
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
    """The form in which names of distributions and entry points compare: `My_Plugin` is `my-plugin` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed() -> list[tuple[Plugin, importlib.metadata.EntryPoint]]:
    """The entry points, in an order that does not depend on sys.path or on the file system."""
    installed = []
    for entry_point in importlib.metadata.entry_points(group=GROUP):
        metadata: Any = {}
        # A half-removed distribution has entry points and no metadata: the standard library then gives None, and the
        # backport, which other packages put in its place, raises.
        with suppress(Exception):
            metadata = (entry_point.dist and entry_point.dist.metadata) or {}
        name, version = (metadata[key] if key in metadata else "(unknown)" for key in ("Name", "Version"))
        installed.append((Plugin(name, version, entry_point.name), entry_point))
    return sorted(installed, key=lambda pair: (canonical_name(pair[0].distribution), pair[0].entry_point))


def _wanted(installed: list[Plugin]) -> list[Plugin]:
    """Those of the installed plugins that TANGLENAS_PLUGINS names; all of them where it is not set."""
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
    """Names of the options that a registered class or function takes (None: any), and of those that it must have.

    The **options of a class go to its base class, so the options of the base class count as its own. Only a
    function can take options that no signature names.
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
        if level == 0:  # what a base class requires, the class itself may pass
            required = [p.name for p in named if p.default is p.empty]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return known, required
    return (known if isinstance(target, type) else None), required
