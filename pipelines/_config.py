"""Configuration: params.yaml and gin files in, and every mistake in them as a sentence.

What gin itself lets pass is refused here: misspelt macros and scopes, values of the wrong type, bindings of what a
stage sets anyway.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import shlex
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import gin

from tanglenas_engine.errors import TangleNASError, closest, describe

KINDS = {"SPACE": "space", "OPTIMIZER": "optimizer", "DATASET": "dataset"}
"""Macros that name a plugin, and its kind; its gin file, if it has one, is `gin/<kind>s/<name>.gin`."""
MACROS = (*KINDS, "SEED")
"""What the stages read; any other macro is there to be used as %NAME."""
GIVEN = {
    "name": "the macro SPACE, OPTIMIZER or DATASET",
    "seed": "the macro SEED",
    "device": "the environment variable TANGLENAS_DEVICE",
    "derivation": "discretize.method",
}
"""Parameters that a stage passes itself, and where a person sets them."""

configurable: dict[str, Callable[..., Any]] = {}
"""What gin files can bind, by the name they use."""


def register(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of the engine configurable under its own name; call what this returns.

    What the stage passes itself cannot be bound: a binding would change nothing, without a word.
    """
    configurable[function.__name__] = function
    passed = {*GIVEN, "checkpoints", "tracker", "progress"}
    parameters = inspect.signature(function).parameters.values()
    given = [p.name for p in parameters if p.name in passed or (p.default is p.empty and p.kind is not p.VAR_KEYWORD)]
    return gin.external_configurable(function, function.__name__, denylist=given)


def configure(arguments: Sequence[str]) -> None:
    """Read gin files and bindings. None for what cannot be None, as params.yaml has it, leaves it to the files.

    Raises:
        TangleNASError: A file is missing, a binding names something that does not exist or that nothing uses, or
            a value is of the wrong type.
    """
    check_params()
    gin.clear_config()
    files = [argument for argument in arguments if argument.endswith(".gin") and "=" not in argument]
    bindings = [argument for argument in arguments if argument not in files]
    names = _Names("\n".join(bindings))
    _parse(gin.parse_config, bindings)
    named = [
        path.as_posix()
        for macro, kind in KINDS.items()
        for path in Path("gin", f"{kind}s").glob("*.gin")
        if path.stem == macro_value(macro)
    ]
    for file in (*files[:1], *named, *files[1:]):
        names.read(file)
        _parse(gin.parse_config_file, file)
    ours = {f"{function.__module__}.{name}": function for name, function in configurable.items() if "." not in name}
    filed = {key: dict(values) for key, values in gin.config._CONFIG.items()}
    _parse(gin.parse_config, bindings)
    for (scope, selector), values in gin.config._CONFIG.items():
        for name, value in values.items() if selector in ours else ():
            if value is None and not _accepts(_hints(ours[selector]).get(name, Any), None):
                values[name] = filed.get((scope, selector), {}).get(name)
    _parse(gin.finalize)
    names.check()
    for (scope, selector), values in gin.config._CONFIG.items():
        if selector in ours:
            check_types(f"{scope}{'/' if scope else ''}{ours[selector].__name__}", ours[selector], values)


@contextmanager
def configured(arguments: Sequence[str]) -> Iterator[None]:
    """Within the block, the config that these files and bindings make; then the present one is back.

    Raises:
        TangleNASError: As `configure` does.
    """
    parts = (gin.config._CONFIG, gin.config._OPERATIVE_CONFIG, gin.config._SINGLETONS, gin.config._IMPORTS)
    kept = [part.copy() for part in parts]
    try:
        configure(arguments)
        yield
    finally:
        for part, content in zip(parts, kept, strict=True):
            part.clear()
            part.update(content)


class _Names:
    """The references, macros and scopes that appear in a config: gin ignores a binding that nothing uses."""

    TOKEN = re.compile(
        r"""(?P<quote>['"])(?:\\.|(?!(?P=quote)).)*(?P=quote)  # strings and comments may hold anything
        | \#.* | @(?P<reference>[\w./]+) | %(?P<macro>[\w./]+)""",
        re.VERBOSE,
    )

    def __init__(self, text: str) -> None:
        self.macros: set[str] = set(MACROS)
        self.scopes: set[str] = set()
        self._files: set[str] = set()
        self._scan(text)

    def read(self, file: str) -> None:
        """Scan a file, and those that it includes."""
        if file in self._files:
            return
        self._files.add(file)
        try:
            text = Path(file).read_text()
        except (OSError, ValueError) as error:
            known = [path.as_posix() for path in Path("gin").rglob("*.gin")]
            reason = "" if isinstance(error, FileNotFoundError) else f" ({error})"
            raise TangleNASError(
                f"configuration file {file!r} cannot be read{reason}.{closest(file, known)} "
                "Paths are relative to the root of the project, where stages run"
            ) from None
        self._scan(text)

    def _scan(self, text: str) -> None:
        for match in self.TOKEN.finditer(text):
            if match["macro"]:
                self.macros.add(match["macro"])
            elif match["reference"]:
                *scopes, path = match["reference"].split("/")
                self.scopes.update(scopes)
                if "." in path:
                    _register_reference(path)
        for included in re.findall(r"^\s*include\s+['\"](.+)['\"]", text, re.MULTILINE):
            self.read(included)

    def check(self) -> None:
        """Raise a TangleNASError for a macro or a scope that nothing uses."""
        for scope, selector in gin.config._CONFIG:
            if selector == "gin.macro":
                if scope not in self.macros:
                    raise TangleNASError(
                        f"configuration: nothing uses the macro {scope!r}.{closest(scope, self.macros)} Stages read "
                        f"{', '.join(MACROS)}; any other is there to be used as %{scope}"
                    )
            elif unused := [part for part in scope.split("/") if part and part not in self.scopes]:
                name = f"{scope}/{gin.config._REGISTRY.minimal_selector(selector)}"
                raise TangleNASError(
                    f"configuration: nothing uses the scope {unused[0]!r} of {name}.{closest(unused[0], self.scopes)} "
                    f"Refer to it as @{name}"
                )


def _register_reference(path: str) -> None:
    """Register what a config refers to by its full name, such as `@torch.optim.AdamW`, so that it can be bound.

    gin's own way to do this without touching the classes, dynamic registration, would ask every file to import
    the stage's function as well.
    """
    if path in configurable:
        return
    module, _, attribute = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
        gin.external_configurable(target, attribute, module=module)
    except Exception as error:  # whatever someone's module raises when it is imported
        raise TangleNASError(f"configuration: @{path} cannot be used: {describe(error)}") from None
    configurable[path] = target


WORDS = {int: "a whole number", float: "a number", str: "a quoted string", bool: "True or False", NoneType: "None"}


def check_types(label: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check values that gin is to pass to one of our functions, or to a plugin's, against its annotations.

    Raises:
        TangleNASError: One is of the wrong type; the message has the value and what was expected.
    """
    hints = _hints(function)
    for name, value in values.items():
        if name in hints and not _accepts(hints[name], value):
            given = _resolved(value)
            made = isinstance(given, gin.config.ConfigurableReference) and isinstance(given.configurable.wrapped, type)
            raise TangleNASError(
                f"{label}.{name} is {given!r}, expected {_in_words(hints[name])}"
                + f". With () behind it, an instance of that class is meant: {given!r}()" * made
            )


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    classes = reversed(function.__mro__) if isinstance(function, type) else ()  # **options go to the base class
    for constructor in [base.__init__ for base in classes if "__init__" in vars(base)] or [function]:
        with suppress(Exception):  # annotations are documentation: what they name need not exist at run time
            hints |= get_type_hints(constructor)
    return hints


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a literal or reference of gin's may stand for a type; of a type that is not plain, anything may."""
    origin, args = get_origin(hint), get_args(hint)
    value = _resolved(value)
    if origin in (Union, UnionType):
        return any(_accepts(part, value) for part in args)
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
        return isinstance(value, list | tuple) and all(_accepts(args[0], item) for item in value)
    return origin is not Callable


def _can_be_called(reference: Any, args: tuple[Any, ...]) -> bool:
    """Whether what a reference names takes so many arguments, beside those bound, and can give what is expected.

    A class gives instances of itself: `@torch.nn.CrossEntropyLoss` makes losses, and is none.
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
    except (TypeError, ValueError):  # written in C
        return True
    given = list(signature.parameters)[: len(arguments)]  # these come from the caller, whatever is bound
    bound = gin.get_bindings(reference.scoped_selector, resolve_references=False)
    try:
        signature.bind(*arguments, **{name: value for name, value in bound.items() if name not in given})
    except TypeError:
        return False
    return True


def _signature(args: tuple[Any, ...]) -> tuple[list[Any] | None, Any]:
    """What a Callable takes, None where that is left open, and what it returns."""
    arguments, result = args or (..., Any)
    return arguments if isinstance(arguments, list) else None, result


def _resolved(value: Any) -> Any:
    """A macro's value, or the value itself."""
    if isinstance(value, gin.config.ConfigurableReference) and value.selector == "gin.macro":
        return macro_value("/".join(value.scopes))
    return value


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Sequence, list, tuple):
        return f"a list, each item {_in_words(args[0])}"
    if origin is Callable:
        arguments, result = _signature(args)
        takes = "" if arguments is None else f" takes {len(arguments)} argument{'s' * (len(arguments) > 1)} and"
        return f"an @reference to what{takes} returns {getattr(result, '__name__', result)}"
    return WORDS.get(hint) or getattr(hint, "__name__", str(hint))


def bound_parameters() -> dict[str, Any]:
    """All bindings as flat scalars, for people to compare runs by."""
    parameters = {}
    for (scope, selector), values in gin.config._CONFIG.items():
        for name, value in values.items():
            key = f"{scope or selector.split('.')[-1]}.{name}"
            parameters[scope if selector == "gin.macro" else key] = value
    return {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in sorted(parameters.items())}


def bindings_of(name: str) -> list[dict[str, Any]]:
    """What is bound of one of our functions, for each scope."""
    return [
        {parameter: _resolved(value) for parameter, value in values.items()}
        for (_, selector), values in gin.config._CONFIG.items()
        if selector.split(".")[-1] == name
    ]


def referred() -> set[str]:
    """The full names that an @ refers to: code of others that a run depends on."""
    return {reference.selector for reference in gin.config.iterate_references(gin.config._CONFIG)} & {
        path for path in configurable if "." in path
    }


def required(macro: str, kind: type) -> Any:
    """The value of a macro that every run must set.

    Raises:
        TangleNASError: It is not set, or of another type.
    """
    value = macro_value(macro)
    if value is None:
        raise TangleNASError(f"{macro} is not set: add the binding '{macro} = ...', as dvc.yaml does from params.yaml")
    if not _accepts(kind, value):
        raise TangleNASError(f"{macro} is {value!r}, expected {WORDS[kind]}")
    return value


def operative_config() -> str:
    """A gin file that runs the stage again: the macros that it read, and what it called with which values."""
    macros = [f"{macro} = {value!r}\n" for macro in MACROS if (value := macro_value(macro)) is not None]
    return "".join(macros) + "\n" + gin.operative_config_str()


def check_params(params: Path = Path("params.yaml"), pipeline: Path = Path("dvc.yaml")) -> None:
    """Check that dvc.yaml uses every key of params.yaml: DVC itself ignores a misspelt one.

    Raises:
        TangleNASError: It does not; the message names the closest key.
    """
    if not (params.exists() and pipeline.exists()):
        return
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe").load(params.read_text("utf-8"))
    except (YAMLError, ValueError, RecursionError) as error:  # bytes and dates that cannot be are a ValueError
        raise TangleNASError(f"params.yaml cannot be read: {error}") from None
    if not isinstance(content, dict | None):
        raise TangleNASError(f"params.yaml holds a {type(content).__name__}, expected a key and a value in every line")
    used = set(re.findall(r"\$\{([\w.]+)\}", pipeline.read_text()))
    known = {".".join(key.split(".")[:depth]) for key in used for depth in range(1, key.count(".") + 2)}
    for key in _keys(content):
        if key not in known:
            raise TangleNASError(
                f"params.yaml: nothing in dvc.yaml uses the key {key!r}.{closest(key, known)} "
                "Correct it, or use it as ${" + key + "} in a stage's cmd"
            )


def stage_arguments(
    stage: str, params: Path = Path("params.yaml"), pipeline: Path = Path("dvc.yaml")
) -> list[str] | None:
    """What `dvc repro` runs a stage with; None where there is no such stage of ours, or not all of its files."""
    if not (params.exists() and pipeline.exists()):
        return None
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML(typ="safe")
    values = yaml.load(params.read_text("utf-8"))

    def value(key: re.Match[str]) -> str:
        return str(functools.reduce(lambda group, name: group[name], key[1].split("."), values))

    try:
        command = re.sub(r"\$\{([\w.]+)\}", value, yaml.load(pipeline.read_text("utf-8"))["stages"][stage]["cmd"])
    except (KeyError, TypeError, YAMLError):  # someone wrote it anew; what is wrong with it DVC tells
        return None
    start, _, rest = command.partition(f"pipelines.{stage} ")
    arguments = shlex.split(rest)
    there = all(Path(argument).exists() for argument in arguments if argument.endswith(".gin"))
    return arguments if start == "python -m " and there else None


def _keys(content: Any, prefix: str = "") -> Iterator[str]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")


def macro_value(name: str) -> Any:
    """What the config sets a macro to, or None."""
    try:
        return gin.query_parameter(f"%{name}")
    except ValueError:
        return None


def _parse(action: Callable[..., Any], *arguments: Any) -> None:
    """Run a step of gin's; what it finds wrong becomes a sentence with the closest name."""
    try:
        action(*arguments)
    except Exception as error:  # tokenizer, parser, registry and imported modules each have their own
        source = arguments[0] if arguments and isinstance(arguments[0], str) else ""
        raise TangleNASError(f"configuration: {_explained(error, source)}") from None


def _explained(error: Exception, source: str) -> str:
    if isinstance(error, SyntaxError):
        text, file, line = error.msg, error.filename or "", error.text or ""
    elif isinstance(error, tokenize.TokenError):
        text, file, line = f"{error.args[0]}: a bracket or a quote is not closed", "", ""
    else:
        text, file, line = re.fullmatch(
            r"(.*?)(?:\s+In (?:bindings string|file \"?(.*?)\"?),? line \d+\s*(.*))?", str(error), re.DOTALL
        ).groups("")
    text = " ".join(text.split()).rstrip(".") or type(error).__name__
    if match := re.search(r"Failed to parse token '(.*?)'", text):
        text = (
            f"the value {match[1]!r} cannot be read: expected a number, True, False, None, a quoted string, a list "
            "or tuple of those, or an @reference"
        )
    elif match := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text):
        text = f"{match[1]} has no parameter {match[2]!r}.{closest(match[2], _parameters(match[1]))}"
    elif match := re.search(r"Configurable '([\w.]+)' has denylisted kwarg '(\w+)'", text):
        instead = GIVEN.get(match[2])
        text = f"{match[1]}.{match[2]} is what the stage itself sets" + (f"; set {instead}" if instead else "")
    elif match := re.search(r"No configurable matching '([\w.]+)'", text):
        text = f"there is nothing called {match[1]!r} to configure.{closest(match[1], configurable)}"
    elif match := re.search(r"No bindings specified for '(.*)/gin.macro'", text):
        macros = [scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"]
        text = f"the macro %{match[1]} is not set.{closest(match[1], macros)}"
    where = ": ".join(part for part in (file or source, " ".join(line.split())[:200]) if part)
    return f"{text} [{where}]" if where else text


def _parameters(name: str) -> Iterable[str]:
    try:
        return inspect.signature(configurable[name]).parameters
    except (KeyError, TypeError, ValueError):  # written in C, or known to gin by another name
        return ()
