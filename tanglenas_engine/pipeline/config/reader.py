"""The reader of gin files and bindings, which reports every mistake in them in one sentence.

gin itself accepts misspelt macros and scopes, values of the wrong type, and bindings of parameters that a stage passes
anyway. This module refuses them.
"""

from __future__ import annotations

import importlib
import inspect
import io
import os
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gin

from tanglenas_engine.errors import TangleNASError, closest, describe
from tanglenas_engine.pipeline.config.params import check_params
from tanglenas_engine.pipeline.config.values import WORDS, accepts, check_types, hints, macro_value, resolved

KINDS = {"SPACE": "space", "OPTIMIZER": "optimizer", "DATASET": "dataset"}
"""The macros that name plugins, with the kind of each. A plugin may have a gin file, `gin/<kind>s/<name>.gin`."""
MACROS = (*KINDS, "SEED")
"""The macros that stages read. A config may define others, for its own use as %NAME."""
GIVEN = {
    "name": "the macro SPACE, OPTIMIZER or DATASET",
    "seed": "the macro SEED",
    "device": "the environment variable TANGLENAS_DEVICE",
    "derivation": "discretize.method",
}
"""The parameters that a stage passes itself, with the place where a person sets each."""

OF_TABLE = "benchmark."
"""The prefix of parameters that affect only the metrics of a table."""

IMMATERIAL = ".checkpoint_every"
"""The suffix of parameters that affect no result.

Results do depend on `num_workers` where a stage has a time, as processors that load data do not count in it.
"""

MACRO = re.compile(r"\s*[\w/]+\s*=")
"""The beginning of a binding that sets a macro, such as `SEED = 0`."""

MOVED = re.compile(r"\btanglenas_engine\.(?:training|retrain)\.(auxiliary|cosine|cross_entropy)\b")
"""Names that gin files used before these functions had public ones, `tanglenas_engine.cosine`, which stay."""

configurable: dict[str, Callable[..., Any]] = {}
"""The functions and classes that gin files can bind, by the names that they use."""


def register(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function configurable under its own name, and return the function to call in its place.

    Parameters that the stage passes cannot be bound: such a binding would have no effect.
    """
    configurable[function.__name__] = function
    passed = {*GIVEN, "checkpoints", "tracker", "progress"}
    parameters = inspect.signature(function).parameters.values()
    given = [p.name for p in parameters if p.name in passed or (p.default is p.empty and p.kind is not p.VAR_KEYWORD)]
    configurable_function: Callable[..., Any] = gin.external_configurable(function, function.__name__, denylist=given)
    return configurable_function


def configure(arguments: Sequence[str]) -> set[str]:
    """Read gin files and bindings, and return the paths of all files that were read, also of those that they include.

    Where a binding is None, as most values of params.yaml are, and the parameter cannot be None, the files decide.

    Raises:
        TangleNASError: A file is missing, a binding names something that does not exist or that nothing uses, or
            a value is of the wrong type.
    """
    check_params()
    gin.clear_config()
    files = [argument for argument in arguments if argument.endswith(".gin") and "=" not in argument]
    bindings = [_current(argument) for argument in arguments if argument not in files]
    names = _Names("\n".join(bindings))
    # Macros say which files to read, and the files make known what other bindings may be about.
    _parse(gin.parse_config, [binding for binding in bindings if MACRO.match(binding)])
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
            if isinstance(value, float) and value.is_integer() and _is_count(hints(ours[selector]).get(name, Any)):
                values[name] = int(value)  # DVC writes `-S discretize.max_params=6e4` as 60000.0
            if value is None and not accepts(hints(ours[selector]).get(name, Any), None):
                values[name] = filed.get((scope, selector), {}).get(name)
    _parse(gin.finalize)
    names.check()
    for (scope, selector), values in gin.config._CONFIG.items():
        if selector in ours:
            check_types(f"{scope}{'/' if scope else ''}{ours[selector].__name__}", ours[selector], values)
    return names.files


def _is_count(hint: Any) -> bool:
    """Return whether a parameter takes a whole number, and no other number."""
    return accepts(hint, 1) and not accepts(hint, 0.5)


def _current(text: str) -> str:
    """Replace the old names of functions in the text of a gin file."""
    return MOVED.sub(r"tanglenas_engine.\1", text)


def _text(file: str) -> str:
    """Return the text of a gin file, in UTF-8 whatever the locale is. Editors on Windows begin it with a mark."""
    return _current(Path(file).read_text("utf-8-sig"))


def _opened(path: str) -> io.StringIO:
    """Open a gin file as gin's parser is to read it."""
    file = io.StringIO(_text(path))
    file.name = path  # gin's messages have it
    return file


gin.config._FILE_READERS.insert(0, (_opened, os.path.isfile))


@contextmanager
def configured(arguments: Sequence[str]) -> Iterator[set[str]]:
    """Replace the config by that of other files and bindings, until the block ends, and give what `configure` returns.

    Raises:
        TangleNASError: `configure` refuses the files or the bindings.
    """
    parts = (gin.config._CONFIG, gin.config._OPERATIVE_CONFIG, gin.config._SINGLETONS, gin.config._IMPORTS)
    kept = [part.copy() for part in parts]
    try:
        yield configure(arguments)
    finally:
        for part, content in zip(parts, kept, strict=True):
            part.clear()
            part.update(content)


class _Names:
    """The references, macros and scopes in a config, and its files. gin itself ignores bindings that nothing uses."""

    TOKEN = re.compile(
        r"""(?P<quote>['"])(?:\\.|(?!(?P=quote)).)*(?P=quote)  # strings and comments may hold anything
        | \#.* | @(?P<reference>[\w./]+) | %(?P<macro>[\w./]+)""",
        re.VERBOSE,
    )

    def __init__(self, text: str) -> None:
        self.macros: set[str] = set(MACROS)
        self.scopes: set[str] = set()
        self.files: set[str] = set()
        self._open: list[str] = []
        self._scan(text)

    def read(self, file: str) -> None:
        """Scan a file and the files that it includes.

        Raises:
            TangleNASError: A file cannot be read, or includes itself.
        """
        place = os.path.normpath(file)
        if place in self._open:
            way = " -> ".join([*self._open[self._open.index(place) :], place])
            raise TangleNASError(f"configuration file {place!r} includes itself ({way}): remove one of these includes")
        if place in self.files:
            return
        self.files.add(place)
        try:
            text = _text(file)
        except (OSError, ValueError) as error:
            known = [path.as_posix() for path in Path("gin").rglob("*.gin")]
            reason = "" if isinstance(error, FileNotFoundError) else f" ({error})"
            raise TangleNASError(
                f"configuration file {file!r} cannot be read{reason}.{closest(file, known)} "
                "Paths are relative to the root of the project, where stages run"
            ) from None
        self._open.append(place)
        self._scan(text)
        self._open.pop()

    def _scan(self, text: str) -> None:
        for match in self.TOKEN.finditer(text):
            if match["macro"]:
                self.macros.add(match["macro"])
            elif match["reference"]:
                *scopes, path = match["reference"].split("/")
                self.scopes.update(scopes)
                if "." in path:
                    _register_reference(path)
        for included in re.findall(r"^\s*include\s+['\"]([^'\"]+)['\"]", text, re.MULTILINE):
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


def without_call_stack(error: BaseException) -> str:
    """Return the message of an error. gin appends its own call stack to those that pass through it."""
    return str(error).split("\n  In call to configurable")[0]


def register_references(text: str) -> None:
    """Make what the text of a config names in full, such as `@torch.optim.AdamW`, known to gin.

    Raises:
        TangleNASError: There is no such thing, or a file that the text includes cannot be read.
    """
    _Names(text)


def _register_reference(path: str) -> None:
    """Import what a config names in full, such as `@torch.optim.AdamW`, and make it configurable.

    gin's dynamic registration does this too, but then every file would have to import the stage's function as well.
    """
    if path in configurable:
        return
    module, _, attribute = path.rpartition(".")
    if (here := os.getcwd()) not in sys.path:  # `python -m` finds a project's own modules, and so do commands
        sys.path.append(here)
    try:
        found = importlib.import_module(module)
        if not hasattr(found, attribute):
            raise AttributeError(f"{module} has no attribute {attribute!r}.{closest(attribute, dir(found))}")
        target = getattr(found, attribute)
        gin.external_configurable(target, attribute, module=module)
    except Exception as error:  # importing a module may raise anything
        raise TangleNASError(f"configuration: @{path} cannot be used: {describe(error)}") from None
    configurable[path] = target


def bound_parameters() -> dict[str, Any]:
    """Return all bindings as scalars with dotted names: people compare runs by them."""
    bound = [
        (scope, selector, name, value)
        for (scope, selector), values in gin.config._CONFIG.items()
        for name, value in values.items()
    ]

    def short(scope: str, selector: str, name: str) -> str:
        return scope if selector == "gin.macro" else f"{scope or selector.split('.')[-1]}.{name}"

    uses = Counter(short(scope, selector, name) for scope, selector, name, _ in bound)
    parameters = {}
    for scope, selector, name, value in bound:
        key = short(scope, selector, name)
        whole = f"{scope}{'/' if scope else ''}{selector}.{name}"  # where functions of two modules have one name
        parameters[key if uses[key] == 1 else whole] = value
    return {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in sorted(parameters.items())}


def is_material(parameter: str) -> bool:
    """Return whether trainings depend on a parameter, which is given with its function, as `retrain.epochs`."""
    return not parameter.startswith(OF_TABLE) and not parameter.endswith(IMMATERIAL)


def material_config() -> str:
    """Return the config as text, as `gin.config_str` does, without the parameters that no training depends on."""
    config = gin.config._CONFIG
    kept = config.copy()
    try:
        config.clear()
        for (scope, selector), values in kept.items():
            function = selector.split(".")[-1]
            if material := {name: value for name, value in values.items() if is_material(f"{function}.{name}")}:
                config[scope, selector] = material
        return str(gin.config_str())
    finally:
        config.clear()
        config.update(kept)


def bindings_of(name: str) -> list[dict[str, Any]]:
    """Return the parameters bound of a configurable function, a dictionary for each scope."""
    return [
        {parameter: resolved(value) for parameter, value in values.items()}
        for (_, selector), values in gin.config._CONFIG.items()
        if selector.split(".")[-1] == name
    ]


def referred() -> set[str]:
    """Return the full names behind an @: the code outside the library that a run depends on."""
    return {reference.selector for reference in gin.config.iterate_references(gin.config._CONFIG)} & {
        path for path in configurable if "." in path
    }


def required(macro: str, kind: type) -> Any:
    """Return the value of a macro that every run must set.

    Raises:
        TangleNASError: The macro is not set, or its value is of another type.
    """
    value = macro_value(macro)
    if value is None:
        raise TangleNASError(f"{macro} is not set: add the binding '{macro} = ...', as dvc.yaml does from params.yaml")
    if not accepts(kind, value):
        raise TangleNASError(f"{macro} is {value!r}, expected {WORDS[kind]}")
    return value


def record(name: str, values: Mapping[str, Any]) -> None:
    """Add values to the operative config with which a stage called a function itself, as if gin had bound them."""
    for (scope, selector), recorded in gin.config._OPERATIVE_CONFIG.items():
        if not scope and selector.split(".")[-1] == name:
            recorded.update(values)


def operative_config() -> str:
    """Return a gin file that runs the stage again: its macros, and the values with which it called each function."""
    macros = [f"{macro} = {value!r}\n" for macro in MACROS if (value := macro_value(macro)) is not None]
    return "".join(macros) + f"\n{gin.operative_config_str()}"


def _parse(action: Callable[..., Any], *arguments: Any) -> None:
    """Call a function of gin, and turn what it raises into a sentence with the closest name."""
    try:
        action(*arguments)
    except Exception as error:  # the tokenizer, the parser, the registry and imported modules raise errors of their own
        source = arguments[0] if arguments and isinstance(arguments[0], str) else ""
        raise TangleNASError(f"configuration: {_explained(error, source)}") from None


def _explained(error: Exception, source: str) -> str:
    if isinstance(error, SyntaxError):
        text, file, line = error.msg, error.filename or "", error.text or ""
    elif isinstance(error, tokenize.TokenError):
        text, file, line = f"{error.args[0]}: a bracket or a quote is not closed", "", ""
    else:
        place = re.fullmatch(
            r"(.*?)(?:\s+In (?:bindings string|file \"?(.*?)\"?),? line \d+\s*(.*))?", str(error), re.DOTALL
        )
        text, file, line = place.groups("") if place else (str(error), "", "")
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
    except (KeyError, TypeError, ValueError):  # the function is written in C, or gin knows it by another name
        return ()
