"""The checks of this package on an installed plugin, one after another, each with its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tanglenas_engine import errors
from tanglenas_engine.data import Dataset
from tanglenas_engine.errors import TangleNASError, describe
from tanglenas_engine.optimizers.optimizer import Optimizer
from tanglenas_engine.plugins import Plugin, PluginManager, Registration, manager
from tanglenas_engine.plugins.manager import canonical_name, options_of
from tanglenas_engine.runtime.foreign import place
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.testing import datasets, objectives, optimizers, spaces

BASES: dict[str, type] = {"space": SearchSpace, "optimizer": Optimizer, "dataset": Dataset, "objective": Objective}
CHECKS: dict[str, tuple[Callable[..., None], ...]] = {
    "space": (
        spaces.check_architectures,
        spaces.check_corners,
        spaces.check_standalone,
        spaces.check_costs,
        spaces.check_learning,
        spaces.check_search,
    ),
    "optimizer": (
        optimizers.check_sampling,
        optimizers.check_gradients,
        optimizers.check_resume,
        optimizers.check_stages,
    ),
    "dataset": (datasets.check_pool, datasets.check_batches),
    "objective": (objectives.check_measure, objectives.check_expectation, objectives.check_slope),
}
SPACES = ("autoformer_nano", "toy_cell")
"""The spaces on which optimizers and objectives are checked: one has sizes that share a choice, one operations."""


@dataclass(frozen=True)
class Outcome:
    """The result of one check; `problem` is empty where it passed."""

    subject: str
    check: str
    problem: str
    seconds: float


def run(
    name: str, options: Mapping[str, Any] | None = None, space: str | None = None, idle: Collection[str] = ()
) -> Iterator[Outcome]:
    """Check what a plugin registered.

    Args:
        name: A distribution, an entry point, or one registered name.
        options: Options for everything that takes them: small spaces are checked faster, some datasets need a folder.
        space: The space on which optimizers and objectives are checked, instead of `SPACES`; it takes options too.
        idle: Choices of a space that do nothing, on purpose.

    Raises:
        TangleNASError: No installed plugin has that name, or nothing that is checked takes an option.
    """
    plugins = manager()
    for plugin_fault in plugins.faults:
        if _is_called(plugin_fault.plugin, name):
            yield Outcome(str(plugin_fault.plugin), "loads", f"{plugin_fault.problem}. {plugin_fault.remedy}", 0.0)
            return
    registrations, given = _named(plugins, name), dict(options or {})
    _check_options(registrations, given, space)
    choices = {it.name: _choices(it, given) for it in registrations if it.kind == "space"} if idle else {}
    for choice in idle:
        if not any(choice in names for names in choices.values()):
            raise errors.unknown("idle choice", choice, set().union(*choices.values()))
    for registration in registrations:
        own = {*idle} & choices.get(registration.name, set()) if registration.kind == "space" else ()
        yield from _checks(registration, given, space, own)


def _check_options(registrations: Iterable[Registration], options: Mapping[str, Any], space: str | None) -> None:
    """Refuse an option that neither what is checked takes, nor the space on which it is checked."""
    known: set[str] = set()
    for registration in [*registrations, *([manager().resolve("space", space)] if space else [])]:
        try:
            own, _ = options_of(registration.load())
        except Exception:  # the checks tell what does not load
            return
        if own is None:
            return
        known |= {*own}
    for option in options:
        if option not in known:
            raise errors.unknown("option", option, known)


def _choices(registration: Registration, options: dict[str, Any]) -> set[str]:
    """Return the names of a space's choices; none of a space that cannot be made, which its checks tell."""
    try:
        return {*_make("space", registration.name, options).choices}
    except Exception:  # a plugin can raise anything
        return set()


def _named(plugins: PluginManager, name: str) -> list[Registration]:
    everything = plugins.registrations()
    by_plugin = [it for it in everything if _is_called(it.plugin, name)]
    found = by_plugin or [it for it in everything if it.name == name]
    if not found:
        known = {known for it in everything for known in (it.distribution, it.plugin.entry_point, it.name)}
        raise errors.unknown("plugin", name, known)
    return found


def _is_called(plugin: Plugin, name: str) -> bool:
    return canonical_name(name) in map(canonical_name, (plugin.distribution, plugin.entry_point))


def _checks(
    registration: Registration, options: dict[str, Any], space: str | None, idle: Collection[str]
) -> Iterator[Outcome]:
    subject = f"{registration.kind} {registration.name}"
    base = BASES.get(registration.kind)

    def load() -> None:
        target = registration.load()
        assert base is None or not isinstance(target, type) or issubclass(target, base), (
            f"{registration.target} is no subclass of tanglenas_engine.{base and base.__name__}"
        )
        assert registration.summary, "it has no summary: register(..., summary='what it is')"
        assert not manager().conflict(registration.kind, registration.name), manager().conflict(
            registration.kind, registration.name
        )

    outcome = _outcome(subject, "It is imported, and described", load)
    yield outcome
    if outcome.problem:
        return
    make = partial(_make, registration.kind, registration.name, options)
    named = {space: options} if space else {name: {} for name in SPACES}
    on = [partial(_make, "space", name, taken) for name, taken in named.items()]
    if registration.kind == "objective":
        on = [it for it in on if _fits(make, it)] or on[:1]  # an objective that refuses all spaces says why
    for check in CHECKS[registration.kind]:
        sentence = _sentence(check)
        if registration.kind in ("space", "dataset"):
            more = {"idle": idle} if check is spaces.check_learning else {}
            yield _outcome(subject, sentence, partial(check, make, **more))
        else:
            for make_space in on:
                yield _outcome(subject, f"{sentence} ({make_space.args[1]})", partial(check, make, make_space))


def _fits(make_objective: Callable[[], Any], make_space: Callable[[], Any]) -> bool:
    """Return whether an objective accepts a space; a latency table accepts one space only."""
    try:
        make_objective().bind(make_space())
    except Exception:  # a plugin can raise anything
        return False
    return True


def _make(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    known, _ = options_of(manager().resolve(kind, name).load())
    made = manager().create(kind, name, **{k: value for k, value in options.items() if known is None or k in known})
    made.name = name
    return made


def _sentence(check: Callable[..., None]) -> str:
    """Return the claim that a check makes, from the first line of its docstring."""
    claim = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".").removeprefix("Check that ")
    return claim[0].upper() + claim[1:]


def _outcome(subject: str, check: str, action: Callable[[], None]) -> Outcome:
    start, problem = time.perf_counter(), ""
    try:
        action()
    except (AssertionError, TangleNASError) as error:
        problem = (str(error) or "an assertion failed") + place(error.__cause__)
    except Exception as error:  # a plugin can raise anything
        problem = describe(error) + place(error)
    return Outcome(subject, check, problem, time.perf_counter() - start)
