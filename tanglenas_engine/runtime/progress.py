"""Progress output for people: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Line(Protocol):
    """The progress line of a running stage."""

    def advance(self) -> None:
        """Count one finished step."""

    def epoch(self, epoch: int, epochs: int, text: str) -> None:
        """Report a finished epoch, counted from 1, with a summary `text`, which may be empty."""


class Progress(Protocol):
    """A receiver of stages' progress."""

    def note(self, text: str) -> None:
        """Print one message."""

    @contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[Line]:
        """Show the line of a stage of `total` steps while the block runs. `done` steps were finished before."""


class SilentProgress:
    """A progress without output, the default of the stage functions."""

    def note(self, text: str) -> None: ...

    def advance(self) -> None: ...

    def epoch(self, epoch: int, epochs: int, text: str) -> None: ...

    @contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[Line]:
        yield self


class ConsoleProgress:
    """A live line (rich) in a terminal, plain lines elsewhere.

    Plain lines come after the first and the last epoch, and otherwise at most every `every` seconds. A derivation
    goes on after its last candidate, when the best ones are judged on more samples.
    """

    def __init__(self, every: float = 5.0):
        self._every = every

    def note(self, text: str) -> None:
        print(text, flush=True)

    @contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[Line]:
        if not sys.stdout.isatty():
            yield _PlainLine(name, total, done, self._every)
            return
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # so that a long text does not squeeze other columns
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", table_column=rest),
        )
        with Bars(*columns, expand=True) as bars:
            yield _LiveLine(bars, bars.add_task(name, total=total, completed=done, text=""))


class _PlainLine:
    def __init__(self, name: str, total: int, done: int, every: float):
        self._name, self._total, self._done, self._every = name, total, done, every
        self._first, self._start, self._said, self._ended = done, time.monotonic(), -float("inf"), False

    def advance(self) -> None:
        self._done += 1

    def epoch(self, epoch: int, epochs: int, text: str) -> None:
        now = time.monotonic()
        if now - self._said < self._every and (epoch < epochs or self._ended):
            return
        self._said, self._ended = now, epoch == epochs
        left = (now - self._start) / max(1, self._done - self._first) * (self._total - self._done)
        eta = f"eta {left:.0f} s" if epoch < epochs else f"{now - self._start:.1f} s"
        print("  ".join(filter(None, (f"{self._name} {epoch}/{epochs}", text, eta))), flush=True)


class _LiveLine:
    def __init__(self, bars: Any, task: Any):
        self._bars, self._task = bars, task

    def advance(self) -> None:
        self._bars.advance(self._task)

    def epoch(self, epoch: int, epochs: int, text: str) -> None:
        self._bars.update(self._task, text=f"epoch {epoch}/{epochs}  {text}")
