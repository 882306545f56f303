"""Reads an architecture file, and makes the space that it was searched in."""

import ast
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tanglenas_engine.errors import TangleNASError, describe

from ._console import read_text

if TYPE_CHECKING:
    from tanglenas_engine.spaces.architecture import Architecture
    from tanglenas_engine.spaces.space import SearchSpace

ARCHITECTURE_FILE = "the architecture.json that discretize writes"


def space_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option `-o NAME=VALUE` to a command that builds a space."""
    return click.option(
        "options",
        "-o",
        "--option",
        metavar="NAME=VALUE",
        multiple=True,
        help="An option of the space, such as image_size=32, in place of that of the project, or of the files beside "
        "ARCH and the weights.",
    )(function)


def read_architecture(path: str | Path) -> "Architecture":
    """Read the file of an architecture.

    Raises:
        TangleNASError: The file cannot be read, or holds no architecture.
    """
    from tanglenas_engine.spaces.architecture import Architecture

    text = read_text(path, ARCHITECTURE_FILE)
    try:
        return Architecture.from_json(text)
    except TangleNASError as error:
        raise TangleNASError(f"{path}: {error}") from None


def read(
    path: Path, given: Sequence[str], sizes: Mapping[str, Any] | None = None
) -> "tuple[SearchSpace, Architecture, dict[str, Any], Path | None]":
    """Return the space and the architecture of a file, the options that make the space fit it, and the stage's config.

    A stage writes `operative.gin` beside the architecture, or above the folder of a front. It has the options but for
    those that a person gives. The config is None where there is no such file, or where it is about another space.

    Args:
        path: The file of the architecture.
        given: The options that a person gives.
        sizes: Options in place of those of the stage, where the space takes them.

    Raises:
        TangleNASError: The file holds no architecture, or the space is unknown or has no such option. Or the config is
            damaged, or needs a dataset that is missing.
    """
    from ..plugins import manager
    from ..plugins.manager import options_of

    architecture = read_architecture(path)
    known, _ = options_of(manager().resolve("space", architecture.space).load()) if sizes else (None, ())
    sized = {name: value for name, value in (sizes or {}).items() if known is None or name in known}
    options = {**sized, **parsed(given)}
    folder = path.absolute().parent
    configs = (one for one in (folder / "operative.gin", folder.parent / "operative.gin") if one.is_file())
    if config := next(configs, None):
        from ..pipeline import finished_runs

        if finished_runs.space_of(config) in (None, architecture.space):
            options = finished_runs.made_with(config, options)
        else:
            config = None
    space = make_space(architecture.space, options)
    return space, space.architecture_of(space.assignment_of(architecture)), options, config


def make_space(name: str, options: dict[str, Any]) -> "SearchSpace":
    """Make a space with options that a person gave.

    Raises:
        TangleNASError: The space is unknown or has no such option, or cannot be made with these values.
    """
    from ..plugins import create_space
    from ..runtime.foreign import place

    try:
        return create_space(name, **options)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, TangleNASError):
            raise
        given = ", ".join(f"{option}={value!r}" for option, value in options.items()) or "its own options"
        raise TangleNASError(
            f"the space {name} cannot be made with {given}: {describe(error)}{place(error)}"
        ) from error


def project_options(space: str) -> dict[str, Any]:
    """Return the options with which the project in the current folder makes a space; {} if it searches another one.

    Raises:
        TangleNASError: The project's config is wrong, or its data are missing.
    """
    from ..pipeline.config.configurables import create
    from ..pipeline.config.params import stage_arguments
    from ..pipeline.config.reader import configured
    from ..pipeline.config.values import macro_value

    arguments = stage_arguments("search")
    if arguments is None:
        return {}
    with configured(arguments):
        if macro_value("SPACE") != space:
            return {}
        return dict(create()[1].created_with or {})


def parsed(given: Sequence[str]) -> dict[str, Any]:
    """Parse options of the form NAME=VALUE. A value is a Python literal, or else a string.

    Raises:
        TangleNASError: An option is not of that form.
    """
    return dict(map(_option, given))


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise TangleNASError(f"the option {text!r} is not of the form NAME=VALUE, such as image_size=32")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
