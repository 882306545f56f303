"""Exceptions of code that a user configures, such as a loss: sentences that name the option and the line."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import tanglenas_engine
from tanglenas_engine.errors import TangleNASError, describe, shown


@contextmanager
def blamed(option: str, expected: str, what: Callable[[], str] = str) -> Iterator[None]:
    """Turn an exception of the block into a TangleNASError about an option. Others than errors of the code pass.

    Args:
        option: The option's name.
        expected: What the option should be, for the message.
        what: A function that returns what fails, such as "its step() fails: ". It is called after an exception only.

    Raises:
        TangleNASError: The block raised an exception. Its own TangleNASErrors stay as they are.
    """
    try:
        yield
    except (TangleNASError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise unusable(option, what() + describe(error) + place(error), expected) from error


def unusable(option: str, problem: str, expected: str) -> TangleNASError:
    """Return the error for an option whose object does not do what a stage needs."""
    return TangleNASError(f"{option} cannot be used ({problem}). Expected {expected}")


def place(error: BaseException | None) -> str:
    """Return where an error was raised, in its innermost line outside of this package and torch, or ""."""
    if error is None or isinstance(error, TangleNASError):  # whose message says what to do
        return ""
    ours = [Path(module.__file__ or "").parent for module in (tanglenas_engine, torch)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(Path(frame.filename).is_relative_to(folder) for folder in ours):
            return f" ({shown(frame.filename)}:{frame.lineno}, in {shown(frame.name)})"
    return ""
