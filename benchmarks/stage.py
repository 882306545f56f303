"""The time of a search stage by its parts: steps, loading, history, checkpoints and the rest.

    python -m benchmarks.stage

The script runs the search stage of the project in this folder, as `dvc repro` does, and writes its outputs anew. It
prints seconds on the clock and their share of the stage. The machine should be idle.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from pipelines import search as stage
from tanglenas_engine.data import Stream
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.params import stage_arguments
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.stages import search


class Clock(Counter[str]):
    """A counter of seconds by name; the seconds of an inner part do not count in the outer part."""

    def __init__(self) -> None:
        super().__init__()
        self._inner = [0.0]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                self[name] += spent - self._inner.pop()
                self._inner[-1] += spent

        return run


def measured(main: Callable[[], None]) -> Clock:
    """Run a search stage and time its parts."""
    clock = Clock()
    loop, start = search.run, Stream.start

    def timed_loop(*, step: Callable[..., Any], end_epoch: Callable[..., Any], tracker: Any, **others: Any) -> Any:
        with mock.patch.object(tracker, "log_metrics", clock.timed("tracking", tracker.log_metrics)):
            steps, epochs = clock.timed("steps", step), clock.timed("history", end_epoch)
            return clock.timed("loop", loop)(step=steps, end_epoch=epochs, tracker=tracker, **others)

    def timed_start(stream: Stream, position: int = 0) -> Iterator[Any]:
        batches = start(stream, position)
        load = clock.timed("loading", lambda: next(batches))
        while True:
            yield load()

    with (
        mock.patch.object(search, "run", timed_loop),
        mock.patch.object(search, "measure", clock.timed("validation", search.measure)),
        mock.patch.object(Stream, "start", timed_start),
        mock.patch.object(CheckpointFolder, "save", clock.timed("checkpoints", CheckpointFolder.save)),
    ):
        clock.timed("before and after", main)()
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    arguments = stage_arguments("search")
    if arguments is None:
        raise TangleNASError("no search stage here: run it in a project's folder, beside its dvc.yaml and params.yaml")
    clock = measured(functools.partial(stage.main, arguments))
    for name, seconds in clock.most_common():
        print(f"{name:16} {seconds:7.2f} s  {100 * seconds / clock.total():5.1f} %")


if __name__ == "__main__":
    main()
