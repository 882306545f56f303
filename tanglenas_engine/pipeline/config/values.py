"""The values of gin bindings, checked against the annotations of the functions that they go to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import gin

from tanglenas_engine.errors import TangleNASError

WORDS = {int: "a whole number", float: "a number", str: "a quoted string", bool: "True or False", NoneType: "None"}


def check_types(label: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check the values that gin will pass to a function or class against its annotations.

    pydantic's TypeAdapter cannot do this: an @reference stands for a value that does not exist yet, and a tuple, which
    gin reads as such, is fine for an annotated list.

    Raises:
        TangleNASError: A value is of the wrong type.
    """
    expected = hints(function)
    for name, value in values.items():
        if name in expected and not accepts(expected[name], value):
            given = resolved(value)
            made = isinstance(given, gin.config.ConfigurableReference) and isinstance(given.configurable.wrapped, type)
            raise TangleNASError(
                f"{label}.{name} is {given!r}, expected {_in_words(expected[name])}"
                + f". With () behind it, an instance of that class is meant: {given!r}()" * made
            )


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    classes = reversed(function.__mro__) if isinstance(function, type) else ()  # **options of a class go to its base
    for constructor in [vars(base)["__init__"] for base in classes if "__init__" in vars(base)] or [function]:
        with suppress(Exception):  # an annotation may name something that exists only for type checkers
            found |= get_type_hints(constructor)
    return found


def accepts(hint: Any, value: Any) -> bool:
    """Return whether a value or reference that gin read fits a type. Types that are not plain accept everything."""
    origin, args = get_origin(hint), get_args(hint)
    value = resolved(value)
    if origin in (Union, UnionType):
        return any(accepts(part, value) for part in args)
    if isinstance(value, gin.config.ConfigurableReference):
        if value.evaluate:
            return True
        return _can_be_called(value, args) if origin is Callable else hint not in WORDS
    if origin is Literal:
        return value in args
    if hint in WORDS:
        kind = int | float if hint is float else hint
        return isinstance(value, kind) and (hint is bool or not isinstance(value, bool))
    if origin in (Sequence, list, tuple):
        if not isinstance(value, list | tuple) or not args:
            return isinstance(value, list | tuple)
        if origin is tuple and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(accepts, args, value))
        return all(accepts(args[0], item) for item in value)
    return callable(value) if origin is Callable else True


def _can_be_called(reference: Any, args: tuple[Any, ...]) -> bool:
    """Return whether a reference can be called as a `Callable[args]` is: with its arguments, and for its result.

    A class returns instances of itself: `@torch.nn.CrossEntropyLoss` makes a loss, and is not one.
    """
    arguments, result = _signature(args)
    target = reference.configurable.wrapped
    if isinstance(target, type) and isinstance(result, type) and not getattr(result, "_is_protocol", False):
        if not issubclass(target, result):
            return False
    if arguments is None:
        return True
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # it is written in C
        return True
    given = list(signature.parameters)[: len(arguments)]  # the caller passes these, even where they are bound
    bound = gin.get_bindings(reference.scoped_selector, resolve_references=False)
    try:
        signature.bind(*arguments, **{name: value for name, value in bound.items() if name not in given})
    except TypeError:
        return False
    return True


def _signature(args: tuple[Any, ...]) -> tuple[list[Any] | None, Any]:
    """Return the types of a Callable's arguments, or None where it leaves them open, and of its result."""
    arguments, result = args or (..., Any)
    return arguments if isinstance(arguments, list) else None, result


def resolved(value: Any) -> Any:
    """Return the value of a macro, also of one that is set to a macro, and any other value as it is."""
    passed: set[str] = set()
    while isinstance(value, gin.config.ConfigurableReference) and value.selector == "gin.macro":
        name = "/".join(value.scopes)
        if name in passed:  # they are set to each other
            return None
        passed.add(name)
        value = macro_value(name)
    return value


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: {', '.join(map(_in_words, args))}"
    if origin in (Sequence, list, tuple):
        return f"a list, each item {_in_words(args[0])}" if args else "a list"
    if origin is Callable:
        arguments, result = _signature(args)
        takes = "" if arguments is None else f" takes {len(arguments)} argument{'s' * (len(arguments) > 1)} and"
        return f"an @reference to what{takes} returns {getattr(result, '__name__', result)}"
    return WORDS.get(hint) or str(getattr(hint, "__name__", hint))


def macro_value(name: str) -> Any:
    """Return the value that the config gives a macro, or None."""
    try:
        return gin.query_parameter(f"%{name}")
    except ValueError:
        return None
