"""A training made of functions, for tests of the loop."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.training.loop import Training
from tanglenas_engine.training.options import Session
from tanglenas_engine.training.state import Stateful


class Steps(Training):
    """A training whose step, end of an epoch and description are functions."""

    def __init__(
        self,
        name: str,
        epochs: int,
        steps_per_epoch: int,
        step: Callable[[int], Mapping[str, Tensor]],
        end_epoch: Callable[[int, Record], Record],
        describe: Callable[[Record], str],
        stateful: Mapping[str, Stateful],
        parameters: Sequence[Tensor],
        **session,
    ):
        super().__init__(name, epochs, steps_per_epoch, Session(**session))
        self._step, self._end, self._describe, self._stateful = step, end_epoch, describe, stateful
        self.parameters = parameters

    def step(self, position: int) -> Mapping[str, Tensor]:
        return self._step(position)

    def end_epoch(self, epoch: int, means: Record) -> Record:
        return self._end(epoch, means)

    def describe(self, record: Record) -> str:
        return self._describe(record)

    def stateful(self) -> Mapping[str, Stateful]:
        return self._stateful


def run(**options) -> list[Record]:
    """Run a training made of functions, and return its history."""
    return Steps(**options).run()
