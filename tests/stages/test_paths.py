"""Epochs at the end of a search in which the weights learn by random architectures."""

import itertools
from functools import partial

import pytest
import torch
from spaces import vit
from tiny import tiny
from torch.optim import lr_scheduler as schedules

from tanglenas_engine import cosine, create_objective, create_optimizer
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.optimizers.stopping import EarlyStopping
from tanglenas_engine.plugins import manager
from tanglenas_engine.runtime import timer
from tanglenas_engine.runtime.progress import SilentProgress
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.stages.search import Search, search
from tanglenas_engine.testing import check_resume, random_data, same

OPTIMIZERS = manager().names("optimizer")
LEARNING = [name for name in OPTIMIZERS if create_optimizer(name).learns_architecture]
SPLITS = ("weights", "architecture", "validation")


def searched(optimizer="drnas", space=vit, **options):
    """The space and the optimizer after a search with two steps an epoch, and its result."""
    torch.manual_seed(0)
    space = space()
    optimizer = create_optimizer(optimizer) if isinstance(optimizer, str) else optimizer
    data = random_data(space, SPLITS)
    result = search(space, optimizer, data, **{"epochs": 3, "path_epochs": 1, "batch_size": 4, **options})
    return space, optimizer, result


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.part(3)
def test_a_search_goes_on_before_within_and_at_the_border_of_its_path_epochs(name):
    check_resume(partial(create_optimizer, name), vit, (3, 4, 5, 7), epochs=4, path_epochs=2)


@pytest.mark.parametrize("name", LEARNING)
def test_alpha_rests_and_the_epochs_before_are_those_of_a_shorter_search(name):
    _, alone, short = searched(name, epochs=2, path_epochs=0)
    space, optimizer, long = searched(name)
    same({**optimizer.alphas}, {**alone.alphas}, "alpha")
    same(long.history[:2], short.history, "the history")
    assert long.architecture == short.architecture
    assert "architecture_loss" in long.history[1] and "architecture_loss" not in long.history[2]
    assert space.superposition.channel_divisor == 1


def test_a_method_that_draws_all_the_time_searches_as_without_them():
    found = [searched("spos", path_epochs=count) for count in (0, 1)]
    same(found[1][0].state_dict(), found[0][0].state_dict(), "the weights")


class Rates(SilentProgress):
    """A progress output that notes the learning rate of each step."""

    def __init__(self):
        self.optimizer, self.rates = None, []

    def advance(self):
        self.rates.append(self.optimizer.param_groups[0]["lr"])


class Own:
    """A schedule that is none of torch's."""

    def __init__(self, optimizer, steps):
        self.optimizer, self.done = optimizer, 0

    def step(self):
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def warm_then_cosine(optimizer, steps):
    first = schedules.LinearLR(optimizer, 0.1, total_iters=2)
    return schedules.SequentialLR(optimizer, [first, schedules.CosineAnnealingLR(optimizer, steps)], [2])


SCHEDULES = {
    "cosine": partial(cosine, warmup=0.3),
    "one cycle": lambda optimizer, steps: schedules.OneCycleLR(optimizer, 0.2, total_steps=steps),
    "sequential": warm_then_cosine,
    "chained": lambda optimizer, steps: schedules.ChainedScheduler([schedules.ExponentialLR(optimizer, 0.9)]),
    "multiplicative": lambda optimizer, steps: schedules.MultiplicativeLR(optimizer, lambda step: 0.9),
    "of one's own": Own,
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_learning_rate_has_a_schedule_of_its_own(schedule):
    def rates(**options):
        seen = Rates()

        def make(groups):
            seen.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
            return seen.optimizer

        searched(weight_optimizer=make, scheduler=schedule, progress=seen, **options)
        return seen.rates

    both = rates(epochs=5, path_epochs=2)
    first, second = (rates(epochs=epochs, path_epochs=0) for epochs in (3, 2))
    assert both == pytest.approx([*first, *second])


@pytest.mark.parametrize("schedule", ["one cycle", "sequential", "multiplicative"])
def test_schedules_go_on_in_path_epochs(schedule):
    options = {"scheduler": SCHEDULES[schedule], "weight_optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
    check_resume(partial(create_optimizer, "drnas"), vit, (3, 4, 5, 7), epochs=4, path_epochs=2, **options)


def test_a_schedule_that_waits_for_a_measurement_is_refused():
    with pytest.raises(TangleNASError, match=r"search.scheduler cannot be used \(its step\(\) fails: .*'metrics'"):
        searched(scheduler=lambda optimizer, steps: schedules.ReduceLROnPlateau(optimizer))


@pytest.mark.parametrize("epochs", [4, 50])
def test_the_trial_of_a_search_by_seconds_times_steps_as_they_are(epochs, monkeypatch):
    """With partial channels, steps of path epochs have all channels and others do not."""
    space, seen = partial(tiny, "toy_cell"), []
    own = Search._step

    def step(self, position, phase):
        found = own(self, position, phase)
        seen.append((phase, self.space.superposition.channel_divisor))
        return found

    monkeypatch.setattr(Search, "_step", step)
    ticks = itertools.count()  # a second for each look at the clock, however busy the machine is
    monkeypatch.setattr(timer.time, "process_time", lambda: float(next(ticks)))
    searched("pc_darts", space, seconds=20.0, epochs=epochs, path_epochs=4)
    assert set(seen) == {("search", 4), ("path", 1)}


@pytest.mark.parametrize("strategy", ["alternating", "simultaneous"])
def test_architectures_are_drawn_at_random_within_the_band_of_a_target(strategy):
    optimizer = create_optimizer("drnas")
    entered = []
    own = optimizer.enter
    optimizer.enter = lambda sampled: (entered.append(sampled), own(sampled))
    space = partial(tiny, "vit", embed_dim=(8, 16, 24, 32), num_heads=(1, 2, 4))
    target = Target(create_objective("params"), share=0.6)
    made, *_ = searched(optimizer, space, epochs=12, path_epochs=10, strategy=strategy, targets=[target])
    drawn = [one for one in entered if isinstance(one, Architecture)]
    assert len(drawn) == 20 and len(set(drawn)) > 5
    assert not any(isinstance(one, Architecture) for one in entered[:-20])
    costs = [made.cost(one).params for one in drawn]
    assert max(costs) <= target.limit and min(costs) >= 0.93 * target.limit


@pytest.mark.parametrize(
    "options, message",
    [
        ({"path_epochs": -1}, "search.path_epochs is -1, expected a whole number of at least 0"),
        (
            {"path_epochs": 3},
            "search.warmup_epochs is 0, search.path_epochs 3 and search.epochs 3, so alpha would learn",
        ),
        (
            {"warmup_epochs": 2},
            "search.warmup_epochs is 2, search.path_epochs 1 and search.epochs 3, so alpha would learn",
        ),
        (
            {"stop": EarlyStopping(min_entropy=0.5)},
            "search.stop may end the search before its 1 path epochs",
        ),
        ({"seconds": 1e-9}, "search.seconds is 1e-09, but 1 path epochs and one more need"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(TangleNASError, match=message):
        searched(**options)


def test_a_search_by_seconds_has_its_path_epochs(monkeypatch):
    _, _, result = searched(seconds=2.0, path_epochs=2)
    assert len(result.history) >= 3
    assert ["architecture_loss" in row for row in result.history[-3:]] == [True, False, False]
