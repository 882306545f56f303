"""A search by seconds: it is the search of as many epochs as fit, and goes on as such."""

import math

import pytest
import torch
from spaces import vit

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import create_optimizer, manager
from tanglenas_engine.runtime import timer
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.progress import SilentProgress
from tanglenas_engine.stages.pace import Pace
from tanglenas_engine.stages.search import search
from tanglenas_engine.testing import random_data, same
from tanglenas_engine.testing.optimizers import CutAfter, CutOff

SPLITS = ("weights", "architecture", "validation")
CPU = torch.device("cpu")


class Clock:
    """A clock that goes on by one second whenever it is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seconds = 0.0
        monkeypatch.setattr(timer.time, "process_time", self.read)
        monkeypatch.setattr(timer.time, "monotonic", self.read)

    def read(self) -> float:
        self.seconds += 1.0
        return self.seconds


def searched(optimizer: str = "drnas", **options):
    """All that a search of epochs of two steps leaves, and what it said."""
    torch.manual_seed(0)
    space, method = vit(drop=0.2, drop_path=0.3), create_optimizer(optimizer)
    result = search(space, method, random_data(space, SPLITS), batch_size=4, **options)
    return {
        "weights": {**space.state_dict()},
        "alphas": {**method.alphas},
        "history": result.history,
        "architecture": str(result.architecture),
    }


@pytest.mark.parametrize("optimizer", manager().names("optimizer"))
@pytest.mark.part(4)
@pytest.mark.exhaustive
def test_a_search_by_seconds_is_that_of_as_many_epochs(optimizer, monkeypatch):
    Clock(monkeypatch)
    # Each measurement takes one second: an epoch of two of 20 steps and a validation takes 1.1.
    found = searched(optimizer, seconds=11.0, warmup_epochs=1)
    epochs = len(found["history"])
    assert epochs >= 2
    same(found, searched(optimizer, epochs=epochs, warmup_epochs=1), f"the search of {epochs} epochs")


@pytest.mark.parametrize("cut", [2, 3, 5])
@pytest.mark.part(3)
@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_by_seconds_goes_on_with_its_number_of_epochs(tmp_path, monkeypatch, cut):
    Clock(monkeypatch)
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        options = {"seconds": 11.0, "checkpoints": checkpoints, "checkpoint_every": 1}
        with pytest.raises(CutOff):
            searched(progress=CutAfter(cut), **options)
        planned = checkpoints.load()["pace"]["epochs"]
        monkeypatch.setattr(timer.time, "process_time", lambda: 0.0)  # another speed plans nothing anew
        found = searched(**options)
    assert len(found["history"]) == planned
    same(found, searched(epochs=planned), "the search that was not cut off")


def test_the_trial_counts_and_no_epoch_begins_that_does_not_fit(monkeypatch):
    clock = Clock(monkeypatch)
    pace = Pace(100.0, "wall", CPU)
    assert pace.measure(lambda number: setattr(clock, "seconds", clock.seconds + 0.5)) == (1 + 20 * 0.5) / 20
    used = clock.seconds
    fixed = [("warm-up epochs", 3, 2.0), ("path epochs", 2, 4.0)]
    assert pace.fit(10.0, fixed) == 3 + 2 + math.floor((100 - used - 3 * 2 - 2 * 4) / 10)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_seconds_that_leave_no_epoch_are_refused(monkeypatch):
    Clock(monkeypatch)
    with pytest.raises(
        TangleNASError, match=r"search.seconds is 3, but 5 warm-up epochs and one more need .* processor"
    ):
        searched(seconds=3.0, warmup_epochs=5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seconds": 0}, "search.seconds is 0, expected a positive number"),
        ({"seconds": math.inf}, "search.seconds is inf, expected a finite number"),
        ({"seconds": math.nan}, "search.seconds is nan, expected a positive number"),
        ({"seconds": 5.0, "clock": "cpu"}, "search.clock is 'cpu', expected 'processor' or 'wall'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(TangleNASError, match=message):
        searched(**options)


@pytest.mark.parametrize("plan", [None, {}, {"epochs": 0}, {"epochs": 2.0}, {"epochs": True}])
def test_a_checkpoint_without_a_plan_is_refused(plan):
    with pytest.raises(TangleNASError, match="expected a number of epochs"):
        Pace(1.0, "wall", CPU).load_state_dict(plan)


@pytest.mark.slow
def test_the_search_says_how_to_have_the_same_result_again(monkeypatch):
    Clock(monkeypatch)

    class Notes(SilentProgress):
        said: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.said.append(text)

    found = searched("spos", seconds=9.0, progress=Notes())
    epochs = len(found["history"])
    assert (
        f"search: 9 processor seconds are {epochs} epochs of 2 steps. search.epochs = {epochs} gives" in Notes.said[0]
    )
