"""Retraining: where the weights come from in each mode, and that a run is reproducible and resumable."""

import contextlib
import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranked import masked
from spaces import REGISTERED, Convolutional, layered, vit
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from tiny import tiny
from torch import nn
from torch.optim import lr_scheduler as schedules

from tanglenas_darts.training import WithAuxiliaryHead
from tanglenas_engine import SearchSpace, elastic
from tanglenas_engine.data import IGNORED, DataView, TensorSamples
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.progress import ConsoleProgress
from tanglenas_engine.stages import retrain as retrain_stage
from tanglenas_engine.stages.retrain import retrain
from tanglenas_engine.testing import random_data, same
from tanglenas_engine.testing.optimizers import CutAfter, CutOff
from tanglenas_engine.training import stopwatch
from tanglenas_engine.training.distillation import Distillation, hidden_pairs, recorded
from tanglenas_engine.training.losses import auxiliary, cross_entropy
from tanglenas_engine.training.measure import measure, recalibrate, statistics_inputs
from tanglenas_engine.training.optim import cosine

SPLITS = ("training", "validation")
ema = partial(ModelEmaV3, decay=0.7)


def noisy_vit() -> SearchSpace:
    return vit(drop=0.2, drop_path=0.3)


def chosen(space: SearchSpace):
    return space.sample(torch.Generator().manual_seed(1))


def retrained(space, data=None, **options):
    """All that a retraining of two epochs of two steps leaves."""
    if not isinstance(space, SearchSpace):
        torch.manual_seed(0)
        space = space()
    data = data or random_data(space, SPLITS)
    result = retrain(space, chosen(space), data, **{"epochs": 2, "batch_size": 4, **options})
    return {
        "weights": {**result.network.state_dict()},
        "history": result.history,
        "accuracy": result.validation_accuracy,
    }


# Modes


@pytest.mark.parametrize("make", [noisy_vit, Convolutional])
def test_inherit_gives_the_network_of_the_supernet(make):
    space = make()
    space(space.example_input(8))
    data = random_data(space, SPLITS)
    inputs = space.example_input(5)
    result = retrain(space, chosen(space), data, mode="inherit", recalibration_batches=0)
    assert result.history == [] and not result.network.training
    network = space.extract(chosen(space)).eval()
    assert result.network(inputs).equal(network(inputs))
    assert result.validation_accuracy == measure(network, data.validation).accuracy


@pytest.mark.parametrize("which", ["inherit", "teacher"])
def test_statistics_of_batch_norms_are_set_anew_as_discretize_sets_them(monkeypatch, which):
    space = Convolutional()
    before = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    data, augmented = (random_data(space, SPLITS, samples=32, seed=seed) for seed in (0, 1))
    view = DataView({"training": augmented.training, "validation": data.validation}, {"training": data.training})
    options = {"batch_size": 8, "recalibration_batches": 2, "seed": 4}
    if which == "inherit":
        architecture = chosen(space)
        found = retrain(space, architecture, view, mode="inherit", **options).network
    else:
        architecture, teachers = space.largest(), []
        monkeypatch.setattr(
            retrain_stage,
            "Distillation",
            lambda teacher, *rest: teachers.append(teacher) or Distillation(teacher, *rest),
        )
        retrain(space, chosen(space), view, teacher="largest", epochs=1, **options)
        (found,) = teachers
    network = space.extract(architecture).eval()
    recalibrate(network, statistics_inputs(network, data.training, 2, seed=4, device=torch.device("cpu")))
    same({**found.state_dict()}, {**network.state_dict()}, "the network")
    same({**space.state_dict()}, before, "the supernet")


@pytest.mark.parametrize("make", [noisy_vit, Convolutional])
@pytest.mark.slow
def test_finetune_starts_from_the_supernet(make):
    space = make()
    for parameter in space.parameters():
        parameter.data += torch.randn_like(parameter)
    still = partial(torch.optim.SGD, lr=0.0)
    result = retrained(space, mode="finetune", optimizer=still)
    trained = {name: value for name, value in result["weights"].items() if name in dict(space.named_parameters())}
    inherited = space.extract(chosen(space)).state_dict()
    assert trained
    same(trained, {name: inherited[name] for name in trained}, "the network")
    before = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    moved = retrained(space, mode="finetune")
    same({**space.state_dict()}, before, "the supernet")
    assert not moved["weights"][name_of_head(moved["weights"])].equal(inherited[name_of_head(moved["weights"])])


def name_of_head(state):
    return next(name for name in reversed(state) if name.endswith("weight"))


@pytest.mark.parametrize("name", REGISTERED)
@pytest.mark.part(3)
def test_scratch_does_not_depend_on_the_supernet(name):
    spaces = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        spaces.append(tiny(name))
    data = random_data(spaces[0], SPLITS)
    one, two = (retrained(space, data) for space in spaces)
    same(one, two, "the network")
    with pytest.raises(AssertionError):
        same(*(retrained(space, data, mode="finetune") for space in spaces), "the network")


# Kill, resume, seeds


def test_a_training_from_scratch_warns_of_what_its_space_says() -> None:
    space = vit()
    space.scratch_warning = "the weights of Net are trained"
    with pytest.warns(UserWarning, match="the weights of Net are trained"):
        retrained(space, mode="scratch", epochs=1)
    retrained(space, mode="finetune", epochs=1)  # a warning would be an error


@pytest.mark.parametrize("mode", ["scratch", "finetune"])
@pytest.mark.parametrize("average", [None, ema])
@pytest.mark.parametrize("make, every, cut", [(noisy_vit, 1, 4), (noisy_vit, None, 3), (Convolutional, 1, 2)])
@pytest.mark.part(3)
@pytest.mark.slow
def test_a_retraining_that_is_killed_ends_like_one_that_is_not(tmp_path, make, every, cut, average, mode):
    options = {"mode": mode, "ema": average, "checkpoint_every": every}
    whole = retrained(make, **options)
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints, pytest.raises(CutOff):
        retrained(make, **options, checkpoints=checkpoints, progress=CutAfter(cut))
    torch.rand(3)
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
        same(retrained(make, **options, checkpoints=checkpoints), whole, "the resumed retraining")


class Adapter:
    """A schedule of timm as one of this project's, which no class of torch's schedules is."""

    def __init__(self, optimizer, steps):
        self.schedule, self.step_number = CosineLRScheduler(optimizer, steps, warmup_t=2, t_in_epochs=False), 0

    def step(self):
        self.step_number += 1
        self.schedule.step_update(self.step_number)

    def state_dict(self):
        return {"step_number": self.step_number}

    def load_state_dict(self, state):
        self.step_number = state["step_number"]


class Decay(torch.optim.lr_scheduler.LRScheduler):
    """A schedule of the weight decay, with a value of its own in the optimizer's groups."""

    def get_lr(self):
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.05 * 0.9**self.last_epoch
            group["decay_steps"] = self.last_epoch
        return [group["lr"] for group in self.optimizer.param_groups]


class Whole(Decay):
    """A rate that is a whole number at its start, and negative by rounding at its end."""

    def get_lr(self):
        return [1 if self.last_epoch == 0 else 0.1 if self.last_epoch == 1 else -1e-18 for _ in self.base_lrs]


class Warm:
    """A function of the step that counts its calls, which torch keeps in the state of its schedule."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return min(1.0, self.calls / 9)


class Filling(torch.optim.SGD):
    """An optimizer whose groups hold None in the place of numbers that come later."""

    def __init__(self, groups):
        super().__init__(groups, lr=0.1)
        for group in self.param_groups:
            group["seen"] = [None, None]

    def step(self):
        super().step()
        for group in self.param_groups:
            group["seen"][1] = 2.5


SCHEDULES = {
    "an adapter": Adapter,
    "a decay": lambda optimizer, steps: Decay(optimizer),
    "whole": lambda optimizer, steps: Whole(optimizer),
    "counting": lambda optimizer, steps: schedules.LambdaLR(optimizer, Warm()),
    "NumPy": lambda optimizer, steps: schedules.LambdaLR(optimizer, lambda step: np.interp(step, [0, steps], [1, 0])),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("cut", [2, 4])
def test_a_retraining_goes_on_with_any_schedule(tmp_path, schedule, cut):
    goes_on(tmp_path, cut, scheduler=schedule, optimizer=partial(torch.optim.AdamW, lr=0.01))


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.Rprop, step_sizes=(1e-6, math.inf)),
        partial(torch.optim.AdamW, lr=torch.tensor(0.01)),
        partial(torch.optim.SGD, lr=np.float64(0.1)),
        Filling,
    ],
    ids=["infinite", "tensor", "NumPy", "None"],
)
def test_a_retraining_goes_on_with_any_options(tmp_path, optimizer):
    goes_on(tmp_path, 3, optimizer=optimizer)


def goes_on(tmp_path, cut, **options):
    options["checkpoint_every"] = 1
    whole = retrained(vit, **options)
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints, pytest.raises(CutOff):
        retrained(vit, **options, checkpoints=checkpoints, progress=CutAfter(cut))
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
        same(retrained(vit, **options, checkpoints=checkpoints), whole, "the resumed retraining")


@pytest.mark.parametrize("scheduler", [None, cosine, schedules.CosineAnnealingLR])
@pytest.mark.parametrize("option, values", [("lr", (0.1, 0.01)), ("momentum", (0, 0.9)), ("weight_decay", (0, 0.5))])
def test_a_checkpoint_of_other_options_is_refused(tmp_path, scheduler, option, values):
    first, second = ({"optimizer": partial(torch.optim.SGD, **{"lr": 0.1, option: value})} for value in values)
    more = {"scheduler": scheduler, "checkpoint_every": 1}
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints, pytest.raises(CutOff):
        retrained(vit, **first, **more, checkpoints=checkpoints, progress=CutAfter(3))
    with (
        CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints,
        pytest.raises(TangleNASError, match=rf"not of this run \(start.optimizer\[0\].{option} holds "),
    ):
        retrained(vit, **second, **more, checkpoints=checkpoints)


@pytest.mark.parametrize("average", [None, ema])
@pytest.mark.parametrize("make", [noisy_vit, Convolutional])
def test_a_retraining_that_pauses_goes_on_and_ends_like_one_that_does_not(tmp_path, make, average):
    options = {"ema": average, "epochs": 4}
    whole = retrained(make, **options)
    for until in (1, 3, 2, 9):  # one that asks for less than is done gets the history of that
        with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
            result = retrained(make, **options, until=until, checkpoints=checkpoints)
        assert result["history"] == whole["history"][:until]
        assert result["accuracy"] == result["history"][-1]["validation_accuracy"]
        assert retrained(make, **options, until=until)["history"] == result["history"]
    same(result, whole, "the retraining that paused")


def test_the_seconds_of_a_retraining_are_those_of_all_its_processes(tmp_path, monkeypatch):
    class Clock:
        now = 0.0

        def process_time(self):
            return self.now

        def monotonic(self):
            return 2 * self.now

    clock, step = Clock(), retrain_stage.Retraining.step

    def timed(training, position):
        clock.now += 1
        return step(training, position)

    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(retrain_stage.Retraining, "step", timed)
    space = vit()
    data = random_data(space, SPLITS)
    found = []
    for cut, until in ((4, None), (None, None), (None, 1)):
        with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
            clock.now += 100  # another process
            with pytest.raises(CutOff) if cut else contextlib.nullcontext():
                found.append(
                    retrain(
                        space, space.largest(), data, epochs=3, until=until, batch_size=4, checkpoint_every=1,
                        checkpoints=checkpoints, progress=CutAfter(cut),
                    )
                )  # fmt: skip
    assert clock.now == 307  # the fourth of six steps was lost with its process
    assert [(one.seconds, one.wall) for one in found] == [(6, 12), (2, 4)]


def test_the_seconds_of_processors_add_up_over_processes_and_those_on_the_wall_do_not(monkeypatch):
    watch = stopwatch.Stopwatch(1)
    monkeypatch.setattr(stopwatch, "_now", lambda: watch._start + torch.tensor([2.0, 3.0]))
    monkeypatch.setattr(stopwatch.distributed, "gather", lambda own: [own, own + torch.tensor([1.0, -1.0])])
    watch.end_epoch(1)
    torch.testing.assert_close(watch.ends, torch.tensor([[5.0, 3.0]], dtype=watch.ends.dtype))


def test_the_seconds_of_a_training_go_on_with_any_number_of_processes(monkeypatch):
    now = torch.zeros(2, dtype=torch.float64)
    monkeypatch.setattr(stopwatch, "_now", now.clone)
    state = None
    for epoch, processes in ((1, 3), (2, 1), (3, 2)):
        monkeypatch.setattr(stopwatch.distributed, "world_size", lambda processes=processes: processes)
        monkeypatch.setattr(stopwatch.distributed, "gather", lambda own, processes=processes: [own] * processes)
        watch = stopwatch.Stopwatch(3)
        if state:
            watch.load_state_dict(state)
        now += 2
        watch.end_epoch(epoch)
        now += 1  # the first half of the next epoch, which is saved
        state = watch.state_dict()
    assert watch.ends.tolist() == [[6, 2], [6 + 3 + 2, 5], [6 + 3 + 2 + 1 + 4, 8]]


def test_a_retraining_goes_on_after_an_epoch_whose_validation_loss_is_not_finite(tmp_path):
    space = vit()
    data = random_data(space, SPLITS)
    inputs, targets = data.validation.batch(torch.arange(len(data.validation)))
    data = DataView({"training": data.training, "validation": TensorSamples(inputs * torch.inf, targets)})
    whole = retrained(space, data)
    for until in (1, None):
        with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
            result = retrained(space, data, until=until, checkpoints=checkpoints)
    assert [row["validation_loss"] for row in result["history"]] == pytest.approx([math.nan] * 2, nan_ok=True)
    same(result["weights"], whole["weights"], "the network")


def test_equal_seeds_give_equal_bytes_and_leave_global_generators_alone():
    space = noisy_vit()
    data = random_data(space, SPLITS)
    first = retrained(space, data, seed=1)
    torch.manual_seed(9), random.seed(9), np.random.seed(9)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    same(retrained(space, data, seed=1), first, "the same seed")
    assert before[0].equal(torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    with pytest.raises(AssertionError):
        same(retrained(space, data, seed=2), first, "another seed")


def test_what_only_reports_changes_no_number(tmp_path, capsys):
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
        reported = retrained(noisy_vit, checkpoints=checkpoints, checkpoint_every=1, progress=ConsoleProgress())
    same(reported, retrained(noisy_vit), "the retraining")
    assert "retrain 2/2  loss" in capsys.readouterr().out


def test_the_means_of_an_epoch_are_over_its_targets():
    space = vit()
    data = random_data(space, SPLITS, samples=40)
    masked(data.training)
    still = partial(torch.optim.SGD, lr=0.0)
    result = retrain(space, space.largest(), data, mode="finetune", epochs=1, batch_size=2, optimizer=still)
    found = measure(result.network, data.training)
    assert result.history[0]["loss"] == pytest.approx(found.loss, rel=1e-5)
    assert result.history[0]["accuracy"] == pytest.approx(found.accuracy, rel=1e-5)


# What is trained around the network


def darts(**options) -> SearchSpace:
    return tiny("darts", drop_path=0.8, **options)


scaffolded = {"wrap": WithAuxiliaryHead, "loss": auxiliary, "epochs": 3}


@pytest.mark.parametrize(
    "wrap, message",
    [
        (lambda network: None, "makes a NoneType, expected a module that has the network itself"),
        (lambda network: nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), "makes a Sequential without the network's "),
        (lambda network: nn.Sequential(copy.deepcopy(network)), "makes a Sequential without the network's "),
    ],
)
def test_a_wrapper_without_the_network_is_refused(wrap, message):
    space = vit()
    with pytest.raises(TangleNASError, match=f"retrain.wrap {message}"):
        retrain(space, space.smallest(), random_data(space, SPLITS), batch_size=4, wrap=wrap)


class Frozen(nn.Sequential):
    """Modules whose first parameter is not trained, and that yield only the others."""

    def __init__(self, *modules: nn.Module):
        super().__init__(*modules)
        next(super().parameters()).requires_grad_(False)

    def parameters(self, recurse=True):
        return (parameter for parameter in super().parameters(recurse) if parameter.requires_grad)


def test_a_wrapper_may_have_the_network_and_yield_a_part_of_its_parameters() -> None:
    assert retrained(vit, wrap=Frozen)["history"]


class TwoOutputs(nn.Module):
    """A network whose second output is a parameter, and that notes how far its training is."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.second, self.fractions = network, nn.Parameter(torch.zeros(3)), []

    def set_progress(self, fraction: float) -> None:
        self.fractions.append(fraction)

    def forward(self, x):
        return self.network(x), self.second.expand(len(x), -1)


def test_a_network_is_trained_with_what_is_around_it_and_returned_without() -> None:
    made = []

    def wrap(network):
        made.append(TwoOutputs(network))
        return made[-1]

    space = vit()
    # The second output would be right about all of them.
    data = DataView({name: TensorSamples(torch.randn(8, 1, 4, 4), torch.zeros(8).long()) for name in SPLITS})
    still = {"optimizer": partial(torch.optim.SGD, lr=0.0), "scheduler": None, "batch_size": 8}
    alone = retrained(space, data, **still)
    wrapped = retrained(space, data, wrap=wrap, loss=partial(auxiliary, weight=0.5), **still)
    same(wrapped["weights"], alone["weights"], "the network")
    # Equal logits for all three classes cost log 3.
    losses = [row["loss"] + 0.5 * torch.log(torch.tensor(3.0)).item() for row in alone["history"]]
    assert [row["loss"] for row in wrapped["history"]] == pytest.approx(losses)
    assert [row["accuracy"] for row in wrapped["history"]] == [row["accuracy"] for row in alone["history"]]
    assert alone["history"][0]["accuracy"] < 100
    retrained(space, data, wrap=wrap, loss=auxiliary)
    assert made[0].second.equal(torch.zeros(3)) and made[1].second.abs().min() > 0


@pytest.mark.parametrize("cut, expected", [(None, [0, 1 / 3, 2 / 3]), (4, [1 / 3, 2 / 3]), (5, [2 / 3])])
@pytest.mark.slow
def test_modules_are_told_before_each_epoch_how_far_the_training_is(tmp_path, cut, expected) -> None:
    made = []

    def wrap(network):
        made.append(TwoOutputs(network))
        return made[-1]

    options = {"wrap": wrap, "loss": auxiliary, "epochs": 3, "checkpoint_every": 1}
    if cut is not None:
        with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints, pytest.raises(CutOff):
            retrained(vit, **options, checkpoints=checkpoints, progress=CutAfter(cut))
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
        retrained(vit, **options, checkpoints=checkpoints)
    assert made[-1].fractions == pytest.approx(expected)


@pytest.mark.parametrize("average, cut", [(ema, 3), (None, 3), (ema, 4), (None, 4)])
@pytest.mark.exhaustive
def test_drop_path_and_an_auxiliary_head_go_on_exactly(tmp_path, cut, average) -> None:
    whole = retrained(darts, **scaffolded, ema=average)
    assert not any("auxiliary" in name for name in whole["weights"])
    options = {**scaffolded, "ema": average, "checkpoint_every": 1}
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints, pytest.raises(CutOff):
        retrained(darts, **options, checkpoints=checkpoints, progress=CutAfter(cut))
    torch.rand(3)
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
        same(retrained(darts, **options, checkpoints=checkpoints), whole, "the resumed retraining")


def test_the_auxiliary_loss_weighs_what_comes_after_the_logits() -> None:
    logits, other, targets = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    first, second = (F.cross_entropy(outputs, targets) for outputs in (logits, other))
    torch.testing.assert_close(auxiliary((logits, other), targets), first + 0.4 * second)
    torch.testing.assert_close(auxiliary((logits, other, other), targets, weight=0.1), first + 0.2 * second)
    torch.testing.assert_close(auxiliary(logits, targets), first)
    smooth = partial(cross_entropy, label_smoothing=0.5)
    torch.testing.assert_close(
        auxiliary((logits, other), targets, loss=smooth), smooth(logits, targets) + 0.4 * smooth(other, targets)
    )


# The rest


def test_an_average_of_the_weights_is_what_is_judged_and_returned():
    made = []

    def average(network):
        made.append((network, ModelEmaV3(network, decay=0.7)))
        return made[-1][1]

    result = retrained(noisy_vit, ema=average)
    ((network, kept),) = made
    same(result["weights"], {**kept.module.state_dict()}, "the average")
    assert not result["weights"]["head.weight"].equal(network.head.weight)
    same({**network.state_dict()}, retrained(noisy_vit)["weights"], "the network that was trained")


def test_an_average_is_told_the_steps_from_1_if_it_takes_them():
    late = partial(ModelEmaV3, decay=0.7, update_after_step=100)
    same(retrained(vit, ema=late)["weights"], retrained(vit)["weights"], "an average that has not begun")
    steps = []

    class Noted(ModelEmaV3):
        def update(self, model, step=None):
            steps.append(step)
            super().update(model)

    class Plain(ModelEmaV3):
        def update(self, model):
            super().update(model)

    same(retrained(vit, ema=Noted), retrained(vit, ema=Plain), "the same average without a step")
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
def test_training_fits_the_data():
    space = vit()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    images = 0.3 * torch.randn(96, 1, 4, 4, generator=generator) + labels.view(-1, 1, 1, 1) - 1.0
    data = DataView({name: TensorSamples(images, labels) for name in SPLITS})
    result = retrain(
        space, space.smallest(), data, epochs=20, batch_size=16, optimizer=partial(torch.optim.AdamW, lr=0.01)
    )
    assert result.validation_accuracy > 90 and result.history[-1]["validation_accuracy"] == result.validation_accuracy
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert [row["epoch"] for row in result.history] == list(range(1, 21))


def test_no_epoch_trains_nothing_and_checks_the_recipe():
    space = vit()
    found = retrained(space, epochs=3, until=0, mode="finetune")
    same(found["weights"], {**space.extract(chosen(space)).state_dict()}, "the network")
    assert found["history"] == [] and math.isnan(found["accuracy"])
    with pytest.raises(TangleNASError, match=r"retrain\.optimizer"):
        retrained(vit, until=0, optimizer=partial(torch.optim.AdamW, decay=1.0))


class Unsaved:
    """A schedule that can be saved, and not loaded."""

    def __init__(self, optimizer, steps): ...

    def step(self): ...

    def state_dict(self):
        return {}


class Growing(Unsaved):
    """A schedule whose state has another structure after a step."""

    def __init__(self, optimizer, steps):
        self.rates = []

    def step(self):
        self.rates.append(0.1)

    def state_dict(self):
        return {"rates": self.rates}

    def load_state_dict(self, state):
        self.rates = state["rates"]


class Function(Growing):
    """A schedule whose state holds what no checkpoint can."""

    def state_dict(self):
        return {"rule": lambda step: step}


def failing(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"scheduler": CosineLRScheduler},
            r"scheduler cannot be used \(its step\(\) fails: .*'epoch'.* such as cosine",
        ),
        ({"scheduler": lambda o, steps: schedules.ReduceLROnPlateau(o)}, r"scheduler cannot be used .*'metrics'"),
        ({"scheduler": Unsaved}, r"scheduler cannot be used \(it makes a Unsaved, which has no load_state_dict"),
        ({"scheduler": Growing}, r"scheduler cannot be used \(a cut-off .*scheduler.rates holds .* a list of 0"),
        ({"scheduler": Function}, r"scheduler cannot be used \(a cut-off training could not go on"),
        ({"scheduler": failing(ValueError())}, r"scheduler cannot be used \(ValueError .*in fail\)\)"),
        ({"scheduler": partial(cosine, warmup=5)}, "cosine.warmup is 5, expected a share from 0 to 1"),
        ({"scheduler": partial(cosine, final=-1)}, "cosine.final is -1, expected a share from 0 to 1"),
        ({"optimizer": partial(torch.optim.SparseAdam, lr=0.1)}, r"optimizer cannot be used \(its step.* dense grad"),
        ({"optimizer": failing(AssertionError("CUDA"))}, r"optimizer cannot be used \(AssertionError: CUDA"),
        ({"loss": partial(cross_entropy, label_smoothing="0.1")}, r"loss cannot be used .*label_smoothing"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "retrain.loss gives a tensor of shape"),
        ({"ema": copy.deepcopy}, r"ema cannot be used .* which has no module\). Expected .* timm.utils.ModelEmaV3"),
        ({"ema": torch.nn.DataParallel}, "ema cannot be used .* which has no update"),
    ],
)
def test_what_would_fail_in_the_first_step_or_in_a_resumed_training_fails_without_a_step(options, message):
    with pytest.raises(TangleNASError, match=message):
        retrained(vit, until=0, **options)


@pytest.mark.parametrize("until", [0, None])
def test_each_factory_is_called_once(until):
    calls = []

    def optimizer(groups):
        calls.append("optimizer")
        return torch.optim.SGD(groups, lr=0.1)

    def schedule(optimizer, steps):
        calls.append("schedule")
        return cosine(optimizer, steps)

    retrained(vit, until=until, optimizer=optimizer, scheduler=schedule)
    assert calls == ["optimizer", "schedule"]


def test_an_optimizer_has_groups():
    with pytest.raises(
        TangleNASError, match=r"retrain.optimizer cannot be used \(it makes a Linear, .* no param_groups"
    ):
        retrained(vit, optimizer=lambda groups: nn.Linear(2, 2))


def test_a_schedule_of_another_interface_ends_a_training_in_a_sentence():
    with pytest.raises(TangleNASError, match=r"retrain.scheduler cannot be used \(its step\(\) fails: .*'metrics'"):
        retrained(vit, scheduler=lambda optimizer, steps: schedules.ReduceLROnPlateau(optimizer))


def test_no_epoch_tries_the_loss_with_the_pieces_of_a_batch():
    sizes = []

    def loss(outputs, targets):
        sizes.append(len(targets))
        return cross_entropy(outputs, targets)

    retrained(vit, until=0, loss=loss, batch_size=8, accumulate=2)
    assert sizes == [4]


class Normalized(torch.optim.SGD):
    """Descends along the direction of the gradient, which a gradient of zeros has not."""

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.div_(norm)
        return super().step(closure)


def test_an_optimizer_of_the_direction_of_the_gradient_is_taken_at_the_start():
    assert retrained(vit, until=0, optimizer=partial(Normalized, lr=0.1, momentum=0.9))["history"] == []


def test_a_state_that_no_checkpoint_can_hold_is_refused_before_a_step(tmp_path):
    class Keeping(schedules.StepLR):
        def __init__(self, optimizer, steps):
            super().__init__(optimizer, 1)
            self.function = lambda step: step

    steps = []

    def loss(outputs, targets):
        steps.append(None)
        return cross_entropy(outputs, targets)

    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
        with pytest.raises(TangleNASError, match=r"retrain.scheduler cannot be used: the state .* cannot be written"):
            retrained(vit, scheduler=Keeping, loss=loss, checkpoints=checkpoints)
    assert not steps


def test_a_rate_of_one_is_that_of_a_whole_number(tmp_path):
    for lr in (1, 1.0):
        with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
            found = retrained(
                vit, optimizer=partial(torch.optim.SGD, lr=lr), checkpoints=checkpoints, until=1 + (type(lr) is float)
            )
    assert len(found["history"]) == 2


def test_a_moving_average_of_torch_is_returned(tmp_path):
    average = torch.optim.swa_utils.AveragedModel
    options = {"ema": average, "optimizer": partial(torch.optim.SGD, lr=0.1), "checkpoint_every": 1}
    weights = []

    class Watched(average):
        def update_parameters(self, network):
            weights.append(network.head.weight.detach().clone())
            super().update_parameters(network)

    found = retrained(vit, **{**options, "ema": Watched})
    assert found["weights"]["head.weight"].allclose(torch.stack(weights).mean(0), atol=1e-6)
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints, pytest.raises(CutOff):
        retrained(vit, **options, checkpoints=checkpoints, progress=CutAfter(3))
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
        same(retrained(vit, **options, checkpoints=checkpoints), found, "the resumed retraining")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "fine-tune"}, "retrain.mode is 'fine-tune', expected one of: scratch, inherit, finetune"),
        ({"epochs": 0}, "retrain.epochs is 0, expected a whole number of at least 1"),
        ({"until": -1}, "retrain.until is -1, expected a whole number of at least 0"),
        ({"recalibration_batches": -1}, "retrain.recalibration_batches is -1, expected a whole number of at least 0"),
        ({"batch_size": 4.0}, "retrain.batch_size is 4.0, expected a whole number of at least 1"),
        ({"num_workers": -1}, "num_workers is -1, expected a whole number of at least 0"),
        ({"batch_size": 9}, "batch size 9 is larger than the 8 samples to draw from"),
        ({"checkpoint_every": 0}, "retrain.checkpoint_every is 0"),
        ({"device": "tpu"}, "device 'tpu' cannot be used"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(TangleNASError) as caught:
        retrained(vit, **options)
    assert message in str(caught.value)


def test_an_architecture_of_another_space():
    other = Convolutional()
    space = vit()
    space.name = "thumbnail"
    with pytest.raises(TangleNASError, match="the architecture is of the space 'Convolutional', not of 'thumbnail'"):
        retrain(space, other.smallest(), random_data(space, SPLITS))


def test_data_that_do_not_fit_the_space():
    space = vit()
    data = DataView({name: TensorSamples(torch.randn(8, 3, 4, 4), torch.zeros(8).long()) for name in SPLITS})
    with pytest.raises(TangleNASError, match="the data are of shape 3 x 4 x 4"):
        retrain(space, space.smallest(), data)


@pytest.mark.parametrize("mode", ["scratch", "finetune"])
@pytest.mark.slow
def test_divergence_is_told_and_the_checkpoint_before_it_stays(tmp_path, mode):
    calls = []

    def loss(outputs, targets):
        calls.append(None)
        return cross_entropy(outputs, targets) * (1 if len(calls) <= 3 else float("nan"))

    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
        with pytest.raises(
            TangleNASError, match=r"retrain: loss is not finite by step 4 of 4.*Lower the learning rate"
        ):
            retrained(vit, mode=mode, loss=loss, checkpoints=checkpoints, checkpoint_every=1)
        state = checkpoints.load()
    assert state["position"] == 3 and all(weight.isfinite().all() for weight in state["network"].values())


@pytest.mark.parametrize("reduction, given", [(None, "nothing"), ("none", r"a tensor of shape \(4,\)")])
def test_a_loss_that_is_not_one_number(reduction, given):
    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction=reduction) if reduction else "nothing"

    with pytest.raises(TangleNASError, match=f"retrain.loss gives '?{given}'?, expected a tensor with one number"):
        retrained(vit, loss=loss)


# A teacher


@pytest.mark.parametrize("targets", [[0, IGNORED, 1], [[0, 1, IGNORED], 3 * [IGNORED]]], ids=["images", "text"])
def test_the_loss_with_a_teacher_is_the_published_one_over_what_has_a_target(targets):
    kept = (targets := torch.tensor(targets)) != IGNORED
    teacher, logits, x = nn.Linear(3, 4), torch.randn(*targets.shape, 4), torch.randn(*targets.shape, 3)
    ours, theirs = (logits[kept] / 2).log_softmax(-1), (teacher(x[kept]) / 2).softmax(-1)
    expected = 0.7 * 1.5 + 0.3 * 4 * F.kl_div(ours, theirs, reduction="batchmean")
    found = Distillation(teacher, 0.3, 2.0)(torch.tensor(1.5), logits, x, targets)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad and not teacher.training


def test_with_the_whole_weight_on_the_teacher_labels_do_not_matter():
    def with_labels(number):
        options = dict(mode="finetune", teacher="largest", teacher_weight=1.0)
        loss = lambda outputs, targets: cross_entropy(outputs, torch.full_like(targets, number))  # noqa: E731
        return retrained(vit, loss=loss, **options)["weights"]

    same(with_labels(0), with_labels(1), "the labels")


def test_padding_teaches_nothing():
    space = tiny("gpt_nano")
    network = space.extract(space.smallest()).eval()
    pairs = hidden_pairs(space, space.smallest(), network)
    distillation = Distillation(space.extract(space.largest()), 0.5, 2.0, 1.0, pairs)
    tokens, targets = random_data(space, ("training",)).training.batch(torch.arange(4))

    def learned(tokens, targets):
        with recorded(network, distillation.watched) as states:
            logits = network(tokens)
        loss = distillation(cross_entropy(logits, targets), logits, tokens, targets, states)
        return [loss, *torch.autograd.grad(loss, list(network.parameters()))]

    cut = learned(tokens[:, :4], targets[:, :4])
    targets[:, 4:] = IGNORED
    torch.testing.assert_close(learned(tokens, targets), cut)


@pytest.mark.parametrize("make", [vit, partial(tiny, "gpt_nano")])
def test_a_teacher_teaches_nothing_without_targets(make):
    space = make()
    data = random_data(space, SPLITS)
    data.training.labels.fill_(IGNORED)
    options = dict(mode="finetune", epochs=1, batch_size=4, teacher="largest", teacher_hidden=1.0)
    sgd = partial(torch.optim.SGD, lr=0.1)
    network = retrain(space, space.smallest(), data, optimizer=sgd, **options).network
    same({**network.state_dict()}, {**space.extract(space.smallest()).state_dict()}, "the network")


@pytest.mark.parametrize("shape, masked", [((2, 3, 4), True), ((3, 2, 4), False)])
def test_a_hidden_state_without_a_vector_for_each_target_counts_as_a_whole(shape, masked):
    teacher, targets = nn.Sequential(nn.Linear(4, 4)), torch.tensor([[0, 1, IGNORED], 3 * [IGNORED]])
    state, whole = torch.randn(shape), torch.randn(shape)
    teacher[0].register_forward_hook(lambda *_: whole)
    teacher.register_forward_hook(lambda *_: torch.zeros(2, 3, 5))
    distillation = Distillation(teacher, 0.0, 1.0, 1.0, [("state", "0")])
    found = distillation(torch.tensor(0.0), torch.zeros(2, 3, 5), torch.randn(2, 4), targets, {"state": state})
    errors = (state - whole).square().sum(-1) / whole.square().sum(-1)
    if not masked:
        errors = (state - whole).square().flatten(1).sum(1) / whole.square().flatten(1).sum(1)
    torch.testing.assert_close(found, (errors[targets != IGNORED] if masked else errors).mean())


@pytest.mark.slow
def test_a_retraining_with_a_teacher_that_is_killed_ends_like_one_that_is_not(tmp_path):
    options = {"mode": "scratch", "teacher": "largest", "temperature": 2.0, "checkpoint_every": 1}
    whole = retrained(Convolutional, **options)
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints, pytest.raises(CutOff):
        retrained(Convolutional, **options, checkpoints=checkpoints, progress=CutAfter(2))
    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
        same(retrained(Convolutional, **options, checkpoints=checkpoints), whole, "the resumed retraining")


@pytest.mark.slow
def test_a_network_with_a_teacher_comes_nearer_to_it():
    torch.manual_seed(0)
    space = Convolutional()
    x = space.example_input(64)
    data = random_data(space, SPLITS)
    adam = partial(torch.optim.Adam, lr=0.01)
    options = dict(mode="finetune", epochs=8, batch_size=4, optimizer=adam, teacher="largest", recalibration_batches=0)
    teacher = space.extract(space.largest()).eval()(x)

    def distance(weight):
        network = retrain(space, chosen(space), data, teacher_weight=weight, **options).network
        return float((network.eval()(x) - teacher).square().mean().detach())

    assert distance(1.0) < distance(0.0)


def test_hidden_states_are_those_before_the_next_layer_that_is_kept():
    space = vit(depth=(1, 2, 3))
    sizes = dict(embed_dim=8, num_heads=[1, 3], mlp_ratio=[2, 2], depth=2)
    architecture = space.architecture(**sizes)
    assert hidden_pairs(space, architecture, space.extract(architecture)) == [
        ("blocks.0", "blocks.0"),
        ("blocks.1", "blocks.2"),
    ]
    space.blocks.put_in_order([0, 2, 1])
    assert hidden_pairs(space, architecture, space.extract(architecture)) == [
        ("blocks.0", "blocks.1"),
        ("blocks.1", "blocks.2"),
    ]

    model = layered()
    model.get_submodule("layers").put_in_order([0, 4, 2, 1, 3])
    assert hidden_pairs(model, model.smallest(), model.extract(model.smallest())) == [
        ("layers.0", "layers.3"),
        ("layers.1", "layers.4"),
    ]

    pairs = hidden_pairs(space, architecture, space.extract(architecture))
    teacher, network = space.extract(space.largest()).eval(), space.extract(architecture).eval()
    x, distillation = space.example_input(3), Distillation(teacher, 0.0, 1.0, 2.0, pairs)
    with recorded(network, distillation.watched) as states:
        logits = network(x)
    shown = []
    for block in (teacher.blocks[1], teacher.blocks[2]):
        block.register_forward_hook(lambda _, __, output: shown.append(output[..., :8]))
    teacher(x)
    errors = [
        ((s - t).square().sum((1, 2)) / t.square().sum((1, 2))).mean()
        for s, t in zip(states.values(), shown, strict=True)
    ]
    found = distillation(torch.tensor(1.5), logits, x, torch.zeros(3, dtype=torch.long), states)
    torch.testing.assert_close(found, 1.5 + 2 * (errors[0] + errors[1]) / 2)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("name", ["gpt_nano", "llama_nano", "resnet_nano", "convnext_nano", "mobilenetv3_nano"])
@pytest.mark.exhaustive
def test_hidden_states_come_nearer_to_the_teacher_s(name):
    torch.manual_seed(0)
    space = tiny(name)
    data = random_data(space, SPLITS)
    adam = partial(torch.optim.Adam, lr=0.003)
    options = dict(mode="finetune", epochs=4, batch_size=4, optimizer=adam, scheduler=None, teacher="largest",
                   teacher_weight=0.0, recalibration_batches=0)  # fmt: skip
    smallest = space.smallest()
    x, targets = data.validation.batch(torch.arange(8))
    pairs = hidden_pairs(space, smallest, space.extract(smallest))

    def distance(weight):
        network = retrain(space, smallest, data, teacher_hidden=weight, **options).network.eval()
        distillation = Distillation(space.extract(space.largest()), 0.0, 1.0, 1.0, pairs)
        with torch.no_grad(), recorded(network, distillation.watched) as states:
            logits = network(x)
        return float(distillation(torch.tensor(0.0), logits, x, targets, states))

    assert distance(10.0) < distance(0.0)


@pytest.mark.parametrize(
    "space, options, message",
    [
        (vit, {"teacher_hidden": -1.0}, "retrain.teacher_hidden is -1.0, expected a number of at least 0"),
        (vit, {"teacher_hidden": 1.0, "compile": True}, "which a compiled network does not show"),
        (partial(tiny, "nb201_nano"), {"teacher_hidden": 1.0}, "'nb201_nano' have none by the names of its depths"),
    ],
)
@pytest.mark.slow
def test_hidden_states_that_cannot_be_learned_are_refused(space, options, message):
    with pytest.raises(TangleNASError, match=message):
        retrained(space, teacher="largest", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher": "smallest"}, "retrain.teacher is 'smallest', expected 'largest' or None"),
        ({"teacher_hidden": 1.0}, "retrain.teacher_hidden is 1.0, but retrain.teacher is None"),
        ({"teacher_weight": 7.0}, "retrain.teacher_weight is 7.0, expected a share from 0 to 1"),
        ({"temperature": -3}, "retrain.temperature is -3, expected a positive number"),
        ({"teacher": "largest", "mode": "inherit"}, "trains nothing that a teacher could teach"),
        ({"teacher": "largest", "teacher_weight": 1.5}, "retrain.teacher_weight is 1.5, expected a share from 0 to 1"),
        ({"teacher": "largest", "temperature": 0.0}, "retrain.temperature is 0.0, expected a positive number"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(options, message):
    with pytest.raises(TangleNASError, match=message):
        retrained(vit, **options)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(TangleNASError, match=r"\(5, 4\), the network's \(5, 2\): a teacher needs the same classes"):
        distillation = Distillation(nn.Linear(3, 4), 0.5, 1.0)
        distillation(torch.tensor(0.0), torch.randn(5, 2), torch.randn(5, 3), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_losses_are_in_float32(precision):
    seen = []

    def loss(outputs, targets):
        seen.append(outputs.dtype)
        return cross_entropy(outputs, targets)

    space = vit()
    retrain(space, space.smallest(), random_data(space, SPLITS), epochs=1, batch_size=4, loss=loss, precision=precision)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("pads", [False, True])
def test_a_teacher_weighs_the_same_however_a_batch_is_cut(pads):
    space = tiny("gpt_nano")
    data = random_data(space, SPLITS)
    if pads:
        data.training.labels[::2, 1:], data.training.labels[1] = IGNORED, IGNORED
    losses = []
    for pieces in (1, 4):
        torch.manual_seed(0)
        options = dict(mode="finetune", epochs=1, batch_size=4, teacher="largest", teacher_hidden=1.0)
        found = retrain(space, space.smallest(), data, accumulate=pieces, **options)
        losses.append(found.history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


class Pooled(SearchSpace):
    """A batch norm behind a pool: one value per channel and sample."""

    def __init__(self):
        super().__init__()
        width = self.choice("width", (2, 4))
        self.conv, self.norm = elastic.Conv2d(2, width, 3), elastic.BatchNorm2d(width)
        self.head = elastic.Linear(width, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).mean((2, 3), keepdim=True)).flatten(1))

    def example_input(self, batch):
        return torch.randn(batch, 2, 4, 4)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4, "accumulate": 4}])
def test_a_batch_norm_that_gets_one_value_per_channel_is_named(options):
    with pytest.raises(TangleNASError, match=r"a batch norm .* got one value per channel .* or lower accumulate, to 2"):
        retrained(Pooled, **{"epochs": 1, **options})
    retrained(Pooled, epochs=1, batch_size=4, accumulate=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clip": -1.0}, "retrain.clip is -1.0, expected a positive number"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_start(options, message):
    space = vit()
    with pytest.raises(TangleNASError, match=message):
        retrain(space, space.smallest(), random_data(space, SPLITS), epochs=1, batch_size=4, **options)
