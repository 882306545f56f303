"""The loop under search and retrain: what it reports, saves and resumes, and what stops it."""

import contextlib
import io
import itertools
import random
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from trainings import run

from tanglenas_engine.data import TensorSamples
from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.devices import device_of, to_device
from tanglenas_engine.runtime.progress import ConsoleProgress, SilentProgress
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.testing import same
from tanglenas_engine.testing.optimizers import CutAfter, CutOff
from tanglenas_engine.training import loop
from tanglenas_engine.training.loop import Interrupted
from tanglenas_engine.training.measure import measure, random_inputs, recalibrate
from tanglenas_engine.training.optim import call_factory, cosine, parameter_groups

EPOCHS, STEPS = 2, 3


class Walk(nn.Module):
    """A parameter that walks at random: its place tells which steps were taken, and from which generator."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(2))

    def step(self, position: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self.place += torch.randn(2) * (1 + position) + random.random() + np.random.rand()
        return {"loss": self.place.sum(), "weighed": (self.place.mean(), torch.tensor(position / EPOCHS / STEPS))}


def walk(checkpoints: CheckpointFolder | None = None, module: Walk | None = None, **options):
    """The history and the end of a walk of EPOCHS x STEPS steps."""
    module = module or Walk()
    with seeded(0):
        history = run(
            **{
                "name": "walk",
                "epochs": EPOCHS,
                "steps_per_epoch": STEPS,
                "step": module.step,
                "end_epoch": lambda epoch, means: {**means, "noise": float(torch.rand(()))},
                "describe": lambda row: f"loss {row['loss']:.2f}",
                "stateful": {"walk": module},
                "parameters": list(module.parameters()),
                "checkpoints": checkpoints,
                **options,
            }
        )
    return history, module.state_dict()


def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", "walk")


class SignalAfter(CutAfter):
    """Sends this process signals where its parent would raise."""

    def __init__(self, steps: int, *numbers: signal.Signals):
        super().__init__(steps)
        self.numbers = numbers

    def advance(self):
        try:
            super().advance()
        except CutOff:
            for number in self.numbers:
                signal.raise_signal(number)  # at once, where kill may make one of two


# Kill and resume


@pytest.mark.parametrize("every", [1, 2, None])
@pytest.mark.parametrize("cut", range(1, EPOCHS * STEPS + 1))
def test_a_run_that_is_killed_ends_like_one_that_is_not(tmp_path, cut, every):
    whole = walk()
    with folder(tmp_path) as checkpoints, pytest.raises(CutOff):
        walk(checkpoints, progress=CutAfter(cut), checkpoint_every=every)
    torch.rand(3), random.random(), np.random.rand()
    with folder(tmp_path) as checkpoints:
        same(walk(checkpoints, checkpoint_every=every), whole, "the resumed run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("cut", range(1, EPOCHS * STEPS + 1))
def test_a_run_that_is_asked_to_stop_saves_first(tmp_path, cut, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    module = Walk()
    with folder(tmp_path) as checkpoints:
        with pytest.raises(Interrupted, match=rf"walk stopped at step {cut} of 6 and is saved in .*Run the same"):
            walk(checkpoints, module, progress=SignalAfter(cut, number))
        state = checkpoints.load()
        assert state["position"] == cut
        same(state["walk"], {**module.state_dict()}, "what was saved")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    with folder(tmp_path) as checkpoints:
        same(walk(checkpoints), walk(), "the resumed run")


@pytest.mark.parametrize("where", ["validation", "line"])
def test_a_stop_at_the_end_of_the_last_epoch_is_not_lost(tmp_path, where):
    """Other trainings may follow, as in a race. The signal comes in the validation, or when nobody looks any more."""

    def validate(epoch, means):
        if where == "validation" and epoch == EPOCHS:
            signal.raise_signal(signal.SIGINT)
        return {**means, "noise": float(torch.rand(()))}

    class Closing(SilentProgress):
        @contextlib.contextmanager
        def stage(self, *args):
            yield self
            if where == "line":
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with folder(tmp_path) as checkpoints, pytest.raises(KeyboardInterrupt):
            walk(checkpoints, progress=Closing(), end_epoch=validate)
    finally:
        signal.signal(signal.SIGINT, before)
    with folder(tmp_path) as checkpoints:
        same(walk(checkpoints), walk(), "the resumed run")


def test_a_stop_without_a_place_to_save_says_so():
    with pytest.raises(Interrupted, match="step 2 of 6, but it had nowhere to save"):
        walk(progress=SignalAfter(2, signal.SIGTERM))


def test_a_signal_that_comes_twice_at_once_is_one_request(tmp_path):
    """Schedulers send one to all processes, and torchrun passes its own on to them."""
    with folder(tmp_path) as checkpoints:
        with pytest.raises(Interrupted, match="stopped at step 2 of 6 and is saved"):
            walk(checkpoints, progress=SignalAfter(2, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM))
    with folder(tmp_path) as checkpoints:
        same(walk(checkpoints), walk(), "the resumed run")


def test_a_second_signal_does_not_wait_for_the_step(monkeypatch):
    monkeypatch.setattr(loop, "REPEATED", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            walk(progress=SignalAfter(2, signal.SIGINT, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(caught.value, Interrupted)


def test_a_run_outside_the_main_thread_leaves_signals_alone():
    results = []
    thread = threading.Thread(target=lambda: results.append(walk()))
    thread.start()
    thread.join()
    same(results[0], walk(), "the run in a thread")


def test_a_finished_run_is_not_run_again(tmp_path):
    with folder(tmp_path) as checkpoints:
        first = walk(checkpoints)
        same(walk(checkpoints, step=None), first, "the second run")


# Divergence


def broken_at(module: Walk, at: int, value: float):
    def step(position: int) -> dict[str, torch.Tensor]:
        means = module.step(position)
        return {**means, "loss": torch.tensor(value)} if position == at else means

    return step


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("every", [1, None])
def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(tmp_path, every, value):
    module = Walk()
    with folder(tmp_path) as checkpoints:
        with pytest.raises(TangleNASError, match=r"walk: loss is not finite by step .* Lower the learning rate"):
            walk(checkpoints, module, step=broken_at(module, 3, value), checkpoint_every=every)
        state = checkpoints.load()
        assert state["position"] == 3 and state["walk"]["place"].isfinite().all()


@pytest.mark.parametrize("position", [1, 2])
def test_a_parameter_that_is_not_finite_is_caught_before_it_is_saved(tmp_path, position):
    module = Walk()

    def step(at: int) -> dict[str, torch.Tensor]:
        loss = module.step(at)["loss"].clone()  # of the step before, and finite
        if at == position:
            nn.init.constant_(module.place, float("inf"))
        return {"loss": loss}

    with folder(tmp_path) as checkpoints:
        with pytest.raises(TangleNASError, match=f"a parameter is not finite by step {position + 1} of 6"):
            walk(checkpoints, module, step=step, checkpoint_every=1)
        assert checkpoints.load()["position"] == position


def test_a_stop_of_a_training_that_diverges_tells_of_the_divergence(tmp_path):
    module = Walk()
    with folder(tmp_path) as checkpoints, pytest.raises(Interrupted, match="diverged"):
        walk(checkpoints, module, step=broken_at(module, 1, float("nan")), progress=SignalAfter(2, signal.SIGTERM))


@pytest.mark.parametrize("every", [0, -1, 2.0])
def test_checkpoint_every_is_a_positive_number(every):
    with pytest.raises(TangleNASError, match=f"walk.checkpoint_every is {every}, expected a whole number of at least"):
        walk(checkpoint_every=every)


# Reports


class Record:
    """A tracker that keeps what it is told."""

    run_id = None

    def __init__(self):
        self.metrics = []

    def log_metrics(self, metrics, step):
        self.metrics.append((step, metrics))


def test_the_history_has_means_and_the_tracker_its_numbers():
    extra = {"architecture": "E=8", "mixture": [0.5]}
    tracker = Record()
    history, _ = walk(
        step=lambda position: {"position": torch.tensor(float(position))},
        end_epoch=lambda epoch, means: {**means, **extra},
        describe=str,
        tracker=tracker,
    )
    assert history == [{"epoch": 1, "position": 1.0, **extra}, {"epoch": 2, "position": 4.0, **extra}]
    assert tracker.metrics == [
        (1, {"walk/position": 1.0}),
        (2, {"walk/position": 4.0}),
    ]


def test_a_value_with_weights_has_a_weighted_mean():
    def step(position):
        value = torch.tensor(float(position))
        return {"some": (value, value), "none": (value, torch.zeros(()))}

    history, _ = walk(step=step, end_epoch=lambda epoch, means: means, describe=str)
    assert history == [{"epoch": 1, "some": pytest.approx(5 / 3), "none": 0}, {"epoch": 2, "some": 50 / 12, "none": 0}]


def test_plain_lines_tell_the_first_and_the_last_epoch(capsys):
    walk(epochs=4, progress=ConsoleProgress(every=1e6))
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("walk 1/4  loss ") and "eta " in first
    assert last.startswith("walk 4/4  loss ") and last.endswith(" s") and "eta" not in last


def test_plain_lines_come_as_often_as_asked(capsys):
    walk(epochs=4, progress=ConsoleProgress(every=0))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]


def test_a_resumed_run_says_where_it_goes_on(tmp_path, capsys):
    with folder(tmp_path) as checkpoints, pytest.raises(CutOff):
        walk(checkpoints, progress=CutAfter(4), checkpoint_every=1)
    with folder(tmp_path) as checkpoints:
        walk(checkpoints, progress=ConsoleProgress())
    first, last = capsys.readouterr().out.splitlines()
    assert first == "walk: resuming at step 3 of 6" and last.startswith("walk 2/2")


def test_a_terminal_gets_a_live_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    for name in ("NO_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("rich._console", None)  # rich keeps the console of an earlier stdout
    end, _ = walk(progress=ConsoleProgress()), None
    shown = sys.stdout.getvalue()
    assert "walk" in shown and f"epoch 2/2  loss {end[0][-1]['loss']:.2f}" in shown and "\x1b[" in shown
    assert "epoch" not in shown.rsplit("epoch 2/2", 1)[1]


# Pieces


def test_seeded_leaves_all_global_generators_alone():
    def draws():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    undisturbed = draws()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    inside = []
    for seed in (1, 1, 2, 2**32 + 2):
        with pytest.raises(CutOff), seeded(seed):
            inside.append(draws())
            raise CutOff
    assert draws() == undisturbed
    assert inside[0] == inside[1] and inside[1][0] != inside[2][0] and inside[1][1] != inside[2][1]


def test_the_schedule_warms_up_and_then_falls_to_its_end():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = cosine(optimizer, 20, warmup=0.2, final=0.1)
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[12] == pytest.approx(2 * (0.1 + 0.9 / 2)) and rates[20] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_only_the_weights_of_layers_decay():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3))
    network[4].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(network), weight_decay=0.5)
    decayed, free = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [network[0].weight.shape, network[3].weight.shape]
    assert decayed["weight_decay"] == 0.5 and free["weight_decay"] == 0
    assert len(free["params"]) == len([p for p in network.parameters() if p.requires_grad]) - 2


class Rows(nn.Module):
    """A linear layer whose weight has a row for each input, as transformers' `Conv1D` has."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.zeros(8))


class Gain(nn.Module):
    """The gain of a norm over the last of four dimensions, as in transformers' ConvNeXt V2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 1, 4))


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 5, 4))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight


@pytest.mark.parametrize(
    "layer, names",
    [
        (Rows(), ["weight"]),
        (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (nn.LSTM(4, 3), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.Bilinear(2, 3, 4), ["weight"]),
        (nn.Linear(4, 1), ["weight"]),  # a vector, but of a layer that multiplies
        (nn.Conv2d(4, 4, 1, groups=4), ["weight"]),
        (Tied(), ["table.weight"]),  # the head multiplies with it
        (nn.Embedding(5, 4), []),
        (nn.EmbeddingBag(5, 4), []),
        (nn.LayerNorm((3, 4)), []),
        (nn.RMSNorm((3, 4)), []),
        (nn.PReLU(4), []),
        (Gain(), []),
        (Places(), []),
    ],
)
def test_what_a_layer_multiplies_with_decays_whatever_the_layer(layer, names):
    decayed, free = parameter_groups(layer)
    known = {parameter: name for name, parameter in layer.named_parameters()}
    assert [known[parameter] for parameter in decayed["params"]] == names
    assert len(decayed["params"]) + len(free["params"]) == len(known)


@pytest.mark.parametrize(
    "factory",
    [
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    ],
)
def test_steps_in_one_pass_are_those_of_one_operation_after_another(factory):
    ends = []
    for make in (factory, lambda parameters: call_factory("weights", factory, parameters)):
        torch.manual_seed(0)
        network = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
        optimizer = make(parameter_groups(network))
        for step in range(5):
            optimizer.zero_grad()
            network[step % 2](torch.randn(4, 3)).square().sum().backward()  # a path has a part of the parameters
            optimizer.step()
        ends.append(dict(network.named_parameters()))
    assert all(group["fused"] for group in optimizer.param_groups)
    torch.testing.assert_close(*ends)


def test_a_gradient_that_lies_otherwise_in_memory_than_its_parameter_moves_the_same_entries():
    ends, gradient = [], torch.arange(6.0).view(3, 2)
    for laid in (gradient, gradient.T.contiguous().T):
        weight = nn.Parameter(torch.zeros(3, 2))
        optimizer = call_factory("alpha", partial(torch.optim.Adam, lr=0.1), [weight])
        weight.grad = laid
        optimizer.step()
        ends.append(weight.detach())
    assert ends[0][0, 0] == 0 > ends[0][0, 1]
    assert ends[0].equal(ends[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_with_their_channels_last_in_memory_and_stay_so(channels):
    images, targets = torch.randn(2, channels, 6, 6), torch.tensor([0, 1])
    laid, same_targets = to_device((images, targets), torch.device("cpu"))
    assert laid.equal(images) and same_targets.equal(targets)
    convolution = nn.Conv2d(channels, 4, 3)
    outputs = convolution(laid)
    assert outputs.stride(1) == 1 < convolution(images).stride(1)
    torch.testing.assert_close(outputs, convolution(images))
    samples, seen = TensorSamples(images, targets), []
    network = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    convolution.register_forward_hook(lambda module, given, output: seen.append(output.stride(1)))
    measure(network, samples)
    recalibrate(network, random_inputs(samples, 2, 1, 0, torch.device("cpu")))
    network(random_inputs(samples, 2, 1, 0, torch.device("cpu"))[0])
    assert seen == [1, 1]


def test_tokens_stay_as_they_are():
    tokens = torch.arange(6).view(2, 3)
    assert to_device((tokens, tokens), torch.device("cpu"))[0] is tokens


class Own(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    ("factory", "fused"),
    [
        (partial(torch.optim.AdamW, lr=0.1, fused=False), False),
        (partial(torch.optim.Adam, lr=0.1, foreach=True), None),
        (partial(torch.optim.Adam, lr=0.1, differentiable=True), None),
        (partial(Own, lr=0.1), None),
    ],
)
def test_an_optimizer_that_was_told_how_to_step_does_so(factory, fused):
    optimizer = call_factory("weights", factory, [nn.Parameter(torch.ones(1))])
    assert [group["fused"] for group in optimizer.param_groups] == [fused]


def test_parameters_that_no_fused_step_takes_are_stepped_one_by_one():
    optimizer = call_factory(
        "weights", partial(torch.optim.Adam, lr=0.1), [nn.Parameter(torch.ones(1, dtype=torch.complex64))]
    )
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1, dtype=torch.complex64)
    optimizer.step()
    assert not optimizer.param_groups[0]["fused"]


def test_accuracy_counts_in_eval_mode_and_restores_the_mode():
    class Echo(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * x * (1 if not self.training else -1)

    guesses = torch.eye(3)[torch.tensor([0, 1, 2, 2, 1])]
    samples = TensorSamples(guesses, torch.tensor([0, 1, 0, 2, 2]))
    network = Echo().train()
    assert measure(network, samples, batch_size=2).accuracy == pytest.approx(60) and network.training
    tokens = TensorSamples(guesses[None].repeat(2, 1, 1), torch.tensor([[0, 1, 0, 2, 2], [0, 1, 2, 2, 1]]))
    assert measure(network.eval(), tokens).accuracy == pytest.approx(80) and not network.training


def test_random_inputs_are_of_all_classes_and_of_one_seed():
    samples = TensorSamples(torch.arange(60.0), torch.arange(60) // 20)
    first, second = random_inputs(samples, 12, 2, seed=0, device=torch.device("cpu"))
    assert len(first) == len(second) == 12 and not set(first.tolist()) & set(second.tolist())
    assert {int(value) // 20 for value in first.tolist()} == {0, 1, 2}
    same(random_inputs(samples, 12, 2, seed=0, device=torch.device("cpu")), [first, second], "the same seed")
    assert [len(b) for b in random_inputs(samples, 500, 1, seed=0, device=torch.device("cpu"))] == [60]
    assert random_inputs(samples, 12, 0, seed=0, device=torch.device("cpu")) == []


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta:x"])
def test_a_device_that_cannot_be_used(name):
    with pytest.raises(TangleNASError, match=f"device '{name}' cannot be used: .*Use 'cpu', or leave it out"):
        device_of(name)


def test_a_device_that_can():
    assert device_of("cpu") == torch.device("cpu")
    assert device_of(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_whole_numbers_are_checked():
    assert at_least("search.epochs", 1, 1) == 1
    for value in (0, 1.0, True, "1", None):
        with pytest.raises(TangleNASError, match=f"search.epochs is {value!r}, expected a whole number of at least 1"):
            at_least("search.epochs", value, 1)


def test_silence_is_silent(capsys):
    walk(progress=SilentProgress())
    assert capsys.readouterr() == ("", "")
