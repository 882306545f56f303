"""Forged checkpoints: each one ends in a sentence, before a number of it is used."""

import copy
import math

import pytest
import torch
from spaces import vit
from torch import nn

from tanglenas_engine.data import DataView
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import create_optimizer
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.stages.retrain import retrain
from tanglenas_engine.stages.search import search
from tanglenas_engine.testing import random_data
from tanglenas_engine.testing.optimizers import CutAfter, CutOff
from tanglenas_engine.training.optim import call_factory
from tanglenas_engine.training.state import UnfitError, check_part

NAN = float("nan")


def searched(checkpoints: CheckpointFolder, cut: int | None = None, optimizer: str = "pc_darts") -> None:
    torch.manual_seed(0)
    space = vit()
    data = random_data(space, ("weights", "architecture", "validation"))
    search(
        space,
        create_optimizer(optimizer),
        data,
        epochs=3,
        batch_size=4,
        checkpoint_every=1,
        checkpoints=checkpoints,
        progress=CutAfter(cut),
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The state of a search of 6 steps after its third, which is amid its second epoch."""
    with CheckpointFolder(tmp_path_factory.mktemp("sound") / "checkpoints", "search") as checkpoints:
        with pytest.raises(CutOff):
            searched(checkpoints, cut=4)
        state = checkpoints.load()
    assert state is not None and state["position"] == 3 and state["ranks"][0]["sums"]
    return state


def test_a_sound_state_goes_on(sound, tmp_path):
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        checkpoints.save(sound)
        searched(checkpoints)


def at(state, *path):
    for key in path:
        state = state[key]
    return state


def assign(*path, value):
    def forge(state):
        at(state, *path[:-1])[path[-1]] = value(at(state, *path)) if callable(value) else value

    return pytest.param(forge, id=f"{'.'.join(map(str, path))} {getattr(value, '__name__', str(value)[:30])}")


def drop(*path):
    def forge(state):
        del at(state, *path[:-1])[path[-1]]

    return pytest.param(forge, id=f"without {'.'.join(map(str, path))}")


def named(name):
    def wrap(function):
        function.__name__ = name
        return function

    return wrap


@named("wider")
def wider(tensor):
    return torch.zeros(*(2 * size for size in tensor.shape)) if tensor.dim() else torch.zeros(2)


@named("one value")
def single(tensor):
    return torch.zeros(1)


@named("one value, expanded")
def expanded(tensor):
    return torch.zeros(1).expand(tensor.numel()).view(tensor.shape)


@named("transposed")
def transposed(tensor):
    return torch.zeros(tensor.shape[::-1]).permute(*reversed(range(tensor.dim())))


@named("float64")
def doubled(tensor):
    return tensor.double()


@named("int32")
def whole(tensor):
    return tensor.int()


@named("NaN")
def poisoned(tensor):
    return torch.full_like(tensor, NAN)


@named("infinite")
def infinite(tensor):
    return torch.full_like(tensor, math.inf)


@named("negative")
def negative(tensor):
    return torch.full_like(tensor, -1.0)


@named("requires grad")
def learning(tensor):
    return tensor.clone().requires_grad_()


WEIGHT = ("space", "blocks.0.mlp.fc1.weight")
MOMENT = ("weight_optimizer", "state", 0, "exp_avg")
SQUARE = ("weight_optimizer", "state", 0, "exp_avg_sq")
GROUP = ("weight_optimizer", "param_groups", 0)
START = ("start", "weight_optimizer", 0)
ALPHA = ("architecture_optimizer", "state", 0)
RNG = ("ranks", 0, "rng")
JUNK = (None, 3, "text", [], {}, NAN, torch.zeros(2))

FORGERIES = [
    *(assign(name, value=value)
      for name in ("space", "optimizer", "weight_optimizer", "architecture_optimizer", "scheduler", "history", "ranks")
      for value in JUNK),
    *(drop(name) for name in ("space", "optimizer", "weight_optimizer", "scheduler", "position", "history", "ranks")),
    *(assign("position", value=value) for value in (-1, 7, 10**30, True, 1.5, NAN, "3", None, [], torch.tensor(3))),
    *(assign("position", value=value) for value in (0, 2, 4, 5)),
    *(assign("threads", value=value) for value in (0, -1, True, 1.0, "1", None)), drop("threads"),
    *(assign(*MOMENT, value=forge)
      for forge in (wider, single, expanded, transposed, doubled, whole, poisoned, infinite, learning)),
    *(assign(*SQUARE, value=forge) for forge in (wider, single, expanded, poisoned, negative)),
    *(assign(*ALPHA, "exp_avg", value=forge) for forge in (wider, single, doubled, poisoned)),
    *(assign(*MOMENT, value=value) for value in (None, 0.5, "text", [], {})),
    *(assign("weight_optimizer", "state", 0, "step", value=torch.tensor(value)) for value in (NAN, -1.0, 4.0, 1e9)),
    *(assign("weight_optimizer", "state", 0, "step", value=value) for value in (torch.zeros(2), 1, "1", None)),
    assign("weight_optimizer", "state", 0, "step", value=torch.tensor(1)),
    drop(*MOMENT), drop("weight_optimizer", "state", 0, "step"),
    assign("weight_optimizer", "state", 0, value={}), assign("weight_optimizer", "state", 0, value=[]),
    pytest.param(lambda s: s["weight_optimizer"]["state"].update({10**6: {}}), id="state of no parameter"),
    pytest.param(lambda s: s["weight_optimizer"]["state"].update({-1: {}}), id="state of parameter -1"),
    pytest.param(lambda s: s["weight_optimizer"]["state"].update({"0": {}}), id="state of parameter '0'"),
    pytest.param(lambda s: at(s, "weight_optimizer", "state", 0).update(more=1), id="more in the state"),
    pytest.param(lambda s: at(s, *SQUARE[:-1]).update(exp_avg_sq=at(s, *MOMENT)), id="shared memory"),
    *(assign(*GROUP, "lr", value=value) for value in (NAN, math.inf, "1", None, [], True, torch.tensor(1.0))),
    *(assign(*GROUP, "betas", value=value)
      for value in ((0.9,), (NAN, 0.9), [0.9, 0.9], 0.9, (True, 0.9), None)),
    *(assign(*GROUP, name, value=value) for name in ("weight_decay", "eps") for value in (NAN, -math.inf, "0", None)),
    *(assign(*GROUP, name, value=value)
      for name in ("amsgrad", "maximize", "capturable", "differentiable", "foreach") for value in (True, 1, "yes")),
    *(assign(*GROUP, "fused", value=value) for value in (False, None, "yes")),
    *(assign(*GROUP, "params", value=value) for value in ([], [0], [0, 0], [10**6], None)),
    assign(*GROUP, "initial_lr", value=NAN), drop(*GROUP, "lr"), drop(*GROUP, "params"),
    assign("weight_optimizer", "param_groups", value=[]), assign(*GROUP, value=None),
    *(assign(*WEIGHT, value=forge) for forge in (wider, doubled, whole, poisoned, infinite, learning)),
    *(assign(*WEIGHT, value=value) for value in JUNK), drop(*WEIGHT),
    pytest.param(lambda s: s["space"].update(more=torch.zeros(1)), id="more weights"),
    pytest.param(lambda s: s.update(more=torch.zeros(1)), id="more parts"),
    *(assign("scheduler", "last_epoch", value=value) for value in (0, 2, -1, 10**9, NAN, "3", None, True)),
    *(assign("scheduler", "base_lrs", value=value) for value in ([], [1.0, 1.0], [NAN, NAN], None)),
    *(assign("scheduler", "_last_lr", value=value) for value in ([], [1.0, 1.0], ["a", "b"])),
    *(assign("start", value=value) for value in JUNK), *(assign(*START[:-1], value=value) for value in JUNK),
    *(assign(*START, "lr", value=value) for value in (NAN, 1.0, True, None, "0", [], torch.tensor(1.0))), drop("start"),
    drop(*START, "lr"), assign(*START, "more", value=1),
    drop("scheduler", "last_epoch"), assign("scheduler", "lr_lambdas", value=[{"x": 1}, None]),
    *(assign("optimizer", "stage", value=value) for value in (-1, 99, 1.5, "0", None)),
    *(assign("optimizer", "edges", value=value) for value in (torch.zeros(9), None)),
    *(assign("optimizer", "alphas", value=value) for value in ({}, [], {2: torch.zeros(1)})),
    assign("optimizer", "kept", value={}), drop("optimizer", "alphas"),
    *(assign("history", value=value) for value in ([], [{}], [3], [{"epoch": 1}], "history", [{"epoch": True}])),
    *(assign("history", 0, "epoch", value=value) for value in (0, 2, True, 1.0, "1")),
    *(assign("history", 0, "validation_accuracy", value=value) for value in ("50", None, 101.0, -1.0, NAN, [])),
    *(assign("history", 0, "mixture", value=value) for value in ({}, [], None, {"x": [[1.0]]})),
    *(assign("history", 0, "weight_loss", value=value) for value in ("1", None, NAN)),
    assign("history", 0, "digest", value=3), drop("history", 0, "entropy"), drop("history", 0, "weight_loss"),
    pytest.param(lambda s: s["history"][0].update(stopped="enough"), id="stopped"),
    pytest.param(lambda s: s["history"][0].update(more="\x1b[2J"), id="more in the history"),
    pytest.param(lambda s: s["history"].append(s["history"][0]), id="an epoch twice"),
    *(assign("ranks", value=value) for value in ([], [{}], [None], {0: {}})),
    *(assign("ranks", 0, "sums", "weight_loss", value=value)
      for value in (torch.tensor(NAN), torch.tensor(math.inf), torch.zeros(2), torch.tensor(1), 1.0, None)),
    assign("ranks", 0, "sums", value={}), assign("ranks", 0, "sums", value={"x": torch.tensor(1.0)}),
    drop("ranks", 0, "sums", "weight_loss"), drop("ranks", 0, "rng"), assign("ranks", 0, "sums", value=None),
    *(assign(*RNG, name, value=value) for name in ("torch", "python", "numpy") for value in JUNK),
    assign(*RNG, "torch", value=torch.zeros(5056, dtype=torch.uint8)),
    assign(*RNG, "python", value=(3, (0,) * 624 + (10**6,), None)),
    *(assign(*RNG, "numpy", "state", "pos", value=value) for value in (-1, 625, 10**8, 1.5, "0", None, True)),
    *(assign(*RNG, "numpy", "state", "key", value=value)
      for value in ([], [0] * 623, [-1] * 624, [2**32] * 624, [0.5] * 624, None)),
    *(assign(*RNG, "numpy", name, value=value)
      for name, value in (("bit_generator", "PCG64"), ("has_gauss", 7), ("gauss", "x"), ("gauss", NAN))),
]  # fmt: skip


@pytest.mark.parametrize("forge", FORGERIES)
@pytest.mark.part(24)
def test_a_forged_state_ends_in_a_sentence(sound, tmp_path, forge):
    state = copy.deepcopy(sound)
    forge(state)
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        checkpoints.save(state)
        with pytest.raises(TangleNASError, match=r"not of this run.*[Dd]elete (the|its) folder") as error:
            searched(checkpoints)
    assert len(str(error.value)) < 1000 and "\x1b" not in str(error.value)


def test_there_are_enough_forgeries():
    assert len(FORGERIES) >= 200


def test_a_forged_state_of_a_retraining_ends_in_a_sentence(tmp_path):
    torch.manual_seed(0)
    space = vit()
    data: DataView = random_data(space, ("training", "validation"))

    def retrained(checkpoints, cut=None):
        retrain(space, space.largest(), data, epochs=2, batch_size=4, mode="scratch", checkpoint_every=1,
                checkpoints=checkpoints, progress=CutAfter(cut))  # fmt: skip

    with CheckpointFolder(tmp_path / "checkpoints", "retrain") as checkpoints:
        with pytest.raises(CutOff):
            retrained(checkpoints, cut=2)
        state = checkpoints.load()
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
        checkpoints.save(state)
        with pytest.raises(TangleNASError, match="exp_avg holds a tensor of shape"):
            retrained(checkpoints)


# Optimizers of other kinds


class Closing(torch.optim.SGD):
    """An optimizer that cannot step without a closure."""

    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize(
    "factory",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.RMSprop(p, centered=True),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.LBFGS(p),
        lambda p: Closing(p, lr=0.1),
    ],
    ids=["SGD", "AMSGrad", "Adafactor", "RMSprop", "NAdam", "LBFGS", "closure"],
)
def test_sound_states_of_other_optimizers_fit(factory):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5))
    optimizer = call_factory("optimizer", lambda parameters: factory(parameters), list(network.parameters()))

    def closure():
        optimizer.zero_grad()
        loss = network(torch.randn(2, 3, 5, 5)).square().sum()
        loss.backward()
        return loss

    fresh = call_factory("optimizer", lambda parameters: factory(parameters), list(network.parameters()))
    for _ in range(3):
        optimizer.step(closure)
    check_part("optimizer", fresh, copy.deepcopy(optimizer.state_dict()), 100)


def test_timm_s_optimizers_fit_too():
    import timm.optim

    for name in ("adan", "lookahead_adam", "lamb", "madgrad", "lion", "adafactor"):
        network = nn.Linear(36, 5)
        made = [timm.optim.create_optimizer_v2(network, opt=name, lr=0.01) for _ in range(2)]
        for _ in range(8):
            network(torch.randn(2, 36)).square().sum().backward()
            made[0].step()
        check_part(name, made[1], copy.deepcopy(made[0].state_dict()), 8)


def test_an_epoch_average_of_foreign_shape_is_refused():
    with pytest.raises(UnfitError, match=r"ema.weight holds a tensor of shape"):
        check_part("ema", nn.Linear(2, 2), nn.Linear(3, 2).state_dict(), 1)


def test_a_sparse_tensor_is_refused():
    state = nn.Linear(3, 2).state_dict()
    with pytest.raises(UnfitError, match="a tensor that is not plain"):
        check_part("network", nn.Linear(3, 2), {**state, "weight": state["weight"].to_sparse()}, 1)
