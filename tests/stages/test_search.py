"""The search: reproducible, resumable, blind to test data, and finding what there is to find."""

import itertools
import os
import random
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
from spaces import Convolutional, Language, vit
from timm.scheduler import CosineLRScheduler
from torch import nn

from tanglenas_engine import Dataset, SearchSpace, elastic
from tanglenas_engine.data import IGNORED, DataView, TensorSamples, TokenSamples, make_splits, open_splits
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.errors import OutOfReachError, TangleNASError
from tanglenas_engine.optimizers.optimizer import l2
from tanglenas_engine.optimizers.stopping import EarlyStopping
from tanglenas_engine.plugins import create_objective, create_optimizer, create_space, manager
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.progress import ConsoleProgress, SilentProgress
from tanglenas_engine.runtime.weights import load_into, save_weights
from tanglenas_engine.spaces.fit import check_fit
from tanglenas_engine.stages.discretize import discretize
from tanglenas_engine.stages.evaluate import rank_correlation
from tanglenas_engine.stages.retrain import retrain
from tanglenas_engine.stages.search import search
from tanglenas_engine.testing import check_resume, random_data, same
from tanglenas_engine.testing.optimizers import CutAfter, CutOff
from tanglenas_engine.training.loop import Interrupted
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.measure import measure_inherited
from tanglenas_gradient.annealed import Annealed
from tanglenas_gradient.darts import DARTS
from tanglenas_gradient.drnas import DrNAS
from tanglenas_sampling.spos import SPOS

OPTIMIZERS = manager().names("optimizer")
SIMULTANEOUS = [name for name in OPTIMIZERS if create_optimizer(name).simultaneous]
STRATEGIES = ("alternating", "simultaneous")
SPLITS = ("weights", "architecture", "validation")


def noisy_vit(**options) -> SearchSpace:
    """A vision transformer whose forward draws from the global generator."""
    return vit(drop=0.2, drop_path=0.3, **options)


def searched(space=noisy_vit, optimizer="drnas", data=None, **options):
    """All that a search of two epochs of two steps leaves."""
    torch.manual_seed(0)
    space = space() if callable(space) and not isinstance(space, SearchSpace) else space
    optimizer = create_optimizer(optimizer) if isinstance(optimizer, str) else optimizer
    data = data or random_data(space, SPLITS)
    result = search(space, optimizer, data, **{"epochs": 2, "batch_size": 4, **options})
    return {
        "weights": {**space.state_dict()},
        "alphas": {**optimizer.alphas},
        "history": result.history,
        "mixture": {**result.mixture} if result.mixture is not None else None,
        "architecture": str(result.architecture),
    }


# Kill and resume (the table of all spaces is in test_optimizers)


@pytest.mark.parametrize(
    "optimizer, strategy, every, cut",
    [
        *((name, "alternating", 3, 4) for name in OPTIMIZERS),
        *((name, "simultaneous", *cut) for name in SIMULTANEOUS for cut in ((1, 4), (None, 3))),
    ],
)
@pytest.mark.part(6)
@pytest.mark.slow
def test_a_search_that_is_killed_ends_like_one_that_is_not(optimizer, strategy, every, cut):
    check_resume(
        partial(create_optimizer, optimizer),
        noisy_vit,
        (cut,),
        strategy=strategy,
        warmup_epochs=1,
        checkpoint_every=every,
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.slow
@pytest.mark.exhaustive
def test_batch_norms_schedules_and_other_optimizers_resume_too(strategy):
    options = {
        "strategy": strategy,
        "weight_optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        "architecture_optimizer": partial(torch.optim.Adam, lr=0.1),
        "scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps),
    }
    check_resume(partial(DrNAS, regularizer="kl"), Convolutional, (2,), **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_search_that_is_asked_to_stop_goes_on_where_it_was(tmp_path, number):
    class Signal(CutAfter):
        def advance(self):
            try:
                super().advance()
            except CutOff:
                os.kill(os.getpid(), number)

    space = noisy_vit()
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        with pytest.raises(Interrupted, match="search stopped at step 3 of 4 and is saved"):
            searched(space, checkpoints=checkpoints, progress=Signal(3))
        assert space.superposition.mixture is None  # it is not left in the middle of a step
        same(searched(checkpoints=checkpoints), searched(), "the resumed search")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_search_that_is_resumed_after_its_last_step_has_the_same_result(name, tmp_path):
    """It was killed between its last checkpoint and the end of its stage, so it takes no step."""
    falling = isinstance(create_optimizer(name), Annealed)
    options = {"temperature": 5.0, "final_temperature": 0.1} if falling else {}
    found = []
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        for _ in range(2):
            torch.manual_seed(0)
            space, optimizer = vit(), create_optimizer(name, **options)
            rate = partial(torch.optim.Adam, lr=0.1)
            data = random_data(space, SPLITS)
            result = search(
                space, optimizer, data, epochs=2, batch_size=4, architecture_optimizer=rate, checkpoints=checkpoints
            )
            mixture = result.mixture and {**result.mixture}
            found.append(
                (str(result.architecture), mixture, result.history, result.split_losses, optimizer.schedules())
            )
    same(found[1], found[0], "the result")


class Cooling(DARTS):
    """A temperature that only `set_progress` sets."""

    temperature = None

    def set_progress(self, fraction):
        self.temperature = 1 - 0.5 * fraction

    def expected(self):
        return self.space.mixture({k: (alpha / self.temperature).softmax(1) for k, alpha in self.alphas.items()})


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_that_is_resumed_amid_an_epoch_tells_the_optimizer_how_far_it_is():
    check_resume(Cooling, vit, (4,), architecture_optimizer=partial(torch.optim.Adam, lr=0.5))
    told = []
    optimizer = DARTS()
    optimizer.set_progress = told.append
    searched(optimizer=optimizer, epochs=4)
    assert told == pytest.approx([0, 1 / 3, 2 / 3, 1])


# Determinism


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.part(2)
def test_equal_seeds_give_equal_bytes_whatever_the_global_generators(optimizer):
    first = searched(optimizer=optimizer, seed=3)
    torch.manual_seed(0)
    space = noisy_vit()
    torch.manual_seed(99), random.seed(99), np.random.seed(99)

    class Draws(SilentProgress):
        def note(self, text): ...

    second = create_optimizer(optimizer)
    result = search(space, second, random_data(space, SPLITS), epochs=2, batch_size=4, seed=3, progress=Draws())
    same({**space.state_dict()}, first["weights"], "weights")
    same(result.history, first["history"], "history")
    other = searched(optimizer=optimizer, seed=4)
    with pytest.raises(AssertionError):
        same(other["weights"], first["weights"], "weights")


def test_a_search_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    space = noisy_vit()
    data = random_data(space, SPLITS)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    search(space, DrNAS(), data, epochs=1, batch_size=4)
    assert before[0].equal(torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.slow
def test_a_search_trains_a_space_that_was_left_in_eval_mode():
    same(searched(lambda: noisy_vit().eval()), searched(noisy_vit), "the search")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.part(3)
def test_what_only_reports_changes_no_number(tmp_path, capsys, optimizer):
    class Tracker:
        run_id = None
        calls = 0

        def log_metrics(self, metrics, step):
            self.calls += 1

    plain = searched(optimizer=optimizer)
    tracker = Tracker()
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        reported = searched(
            optimizer=optimizer,
            checkpoints=checkpoints,
            checkpoint_every=1,
            tracker=tracker,
            progress=ConsoleProgress(),
        )
    same(reported, plain, "the search")
    assert tracker.calls == 2 and "search 2/2" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_change_no_number():
    same(searched(num_workers=1, epochs=1), searched(epochs=1), "the search")


# Who moves when


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("optimizer", ["darts", "drnas"])
@pytest.mark.slow
def test_alpha_waits_for_the_end_of_the_warm_up_and_the_weights_do_not(optimizer, strategy):
    space, searcher = vit(), create_optimizer(optimizer)
    seen = []

    class Watch(SilentProgress):
        def advance(self):
            alphas = {count: alpha.detach().clone() for count, alpha in searcher.alphas.items()}
            seen.append((alphas, space.head.weight.detach().clone()))

    searcher.bind(space, 0)
    start = {count: alpha.detach().clone() for count, alpha in searcher.alphas.items()}
    data = random_data(space, SPLITS)
    rate = partial(torch.optim.Adam, lr=0.01)
    result = search(
        space, searcher, data, epochs=3, batch_size=4, warmup_epochs=2, strategy=strategy,
        architecture_optimizer=rate, progress=Watch(),
    )  # fmt: skip
    for alphas, _ in seen[:4]:
        same(alphas, start, "alpha in the warm-up")
    for alphas, _ in seen[4:]:
        assert all((alphas[count] != start[count]).any(1).all() for count in start)
    weights = [weight for _, weight in seen]
    assert all(not a.equal(b) for a, b in itertools.pairwise(weights))
    assert ["architecture_loss" in row for row in result.history] == [False, False, strategy == "alternating"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in SIMULTANEOUS if not create_optimizer(name).learns_architecture])
def test_a_method_without_alpha_takes_weight_steps_alone(name, strategy):
    found = searched(vit, create_optimizer(name), strategy=strategy, epochs=1)
    assert not any(part in row for row in found["history"] for part in ("architecture_loss", "entropy"))
    assert not found["weights"]["head.weight"].equal(vit().state_dict()["head.weight"])


@pytest.mark.slow
def test_the_architecture_split_trains_alpha_and_not_the_weights():
    # Alternating: the weights see the architecture split through alpha only, and alpha is fixed here.
    space = vit()
    data = random_data(space, SPLITS)
    other = DataView(
        {**{n: getattr(data, n) for n in SPLITS}, "architecture": random_data(vit(), SPLITS, seed=9).weights}
    )
    still = partial(torch.optim.SGD, lr=0.0)
    one, two = (searched(vit, data=d, architecture_optimizer=still) for d in (data, other))
    same(one["weights"], two["weights"], "weights")
    assert one["history"][0]["architecture_loss"] != two["history"][0]["architecture_loss"]
    # Simultaneous: the architecture split is not read at all.
    one, two = (searched(vit, data=d, strategy="simultaneous") for d in (data, other))
    same(one, two, "the search")


@pytest.mark.slow
def test_a_simultaneous_search_moves_alpha_by_the_loss_and_the_regularizer():
    rate = partial(torch.optim.SGD, lr=1.0)
    one, two = (
        searched(
            vit, DARTS(weight_decay=decay), strategy="simultaneous", architecture_optimizer=rate, epochs=1, batch_size=8
        )
        for decay in (1e-9, 0.5)
    )
    start = DARTS()
    start.bind(vit(), 0)
    for count, alpha in start.alphas.items():
        assert (one["alphas"][count] - two["alphas"][count]).allclose(0.5 * alpha, atol=1e-6)
    assert l2(start.alphas.values()) > 0


def test_gradients_of_the_weights_are_clipped():
    def length(clip):
        space = vit()
        before = {k: v.detach().clone() for k, v in space.named_parameters()}
        search(
            space, SPOS(), random_data(space, SPLITS), epochs=1, batch_size=8, clip=clip, scheduler=None,
            weight_optimizer=partial(torch.optim.SGD, lr=1.0),
        )  # fmt: skip
        return sum((v.detach() - before[k]).square().sum().item() for k, v in space.named_parameters()) ** 0.5

    torch.manual_seed(0)
    assert length(1e-3) == pytest.approx(1e-3, rel=1e-2) and length(None) > 0.01


def test_the_history_describes_what_alpha_says():
    space = vit()
    optimizer = DrNAS()
    history = search(
        space, optimizer, random_data(space, SPLITS), epochs=2, batch_size=4,
        architecture_optimizer=partial(torch.optim.Adam, lr=0.1),
    ).history  # fmt: skip
    row = history[-1]
    mixture = {name: torch.tensor(weights) for name, weights in row["mixture"].items()}
    assert all(mixture[name].allclose(weights) for name, weights in optimizer.expected().items())
    current = optimizer.current()
    assert (row["params"], row["macs"]) == (space.cost(current).params, space.cost(current).flops)
    assert row["expected_params"] == pytest.approx(float(space.expected_cost(mixture).params), rel=1e-6)
    assert row["digest"] == current.digest and row["architecture"] == str(current) and 0 < row["entropy"] <= 1
    assert [r["epoch"] for r in history] == [1, 2]


# Test data are out of reach


def test_a_search_and_a_discretization_cannot_read_test_data():
    space = vit()
    data = random_data(space, SPLITS)

    class Peeking(DARTS):
        def sample(self, step, stream):
            return data.test and super().sample(step, stream)

    def peeking(outputs, targets):
        return cross_entropy(outputs, data.test.labels[targets])

    for optimizer, loss in ((Peeking(), cross_entropy), (DARTS(), peeking)):
        with pytest.raises(OutOfReachError, match="the test split is out of reach: this stage sees weights"):
            search(space, optimizer, data, epochs=1, batch_size=4, loss=loss)
    with pytest.raises(OutOfReachError):
        discretize(space, DataView({"validation": data.validation}), None, method="random")


class Pool(Dataset):
    """Random images of which some can be spoilt."""

    name, num_classes, image_size, in_channels, class_names = "pool", 3, 4, 1, ("a", "b", "c")
    fingerprint = "pool"

    def __init__(self):
        self.labels = torch.arange(300) % 3
        self.images = torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def subset(self, indices, *, train):
        return TensorSamples(self.images[indices], self.labels[indices])


def found_in(spoilt, optimizer):
    """What a search and a derivation give where one split of the data is spoilt, or none."""
    splits, pool = make_splits(Pool(), seed=0), Pool()
    if spoilt:
        pool.images[splits.indices(spoilt)] *= float("nan") if spoilt == "test" else -9
    data = open_splits(pool, splits, SPLITS)
    torch.manual_seed(0)
    space = vit()
    state = searched(space, optimizer, data, batch_size=32)
    derived = discretize(
        space,
        data,
        space.mixture(state["mixture"]) if state["mixture"] else None,
        derivation=create_optimizer(optimizer).derivation,
        candidates=3,
    )
    return [state, derived.architecture.to_json(), derived.validation_accuracy, derived.candidates]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_in_the_test_data_changes_no_byte(optimizer):
    same(found_in("test", optimizer), found_in(None, optimizer), "what was found")


@pytest.mark.slow
def test_what_is_in_any_other_split_changes_what_is_found():
    clean = found_in(None, "drnas")
    for split in SPLITS:
        with pytest.raises(AssertionError):
            same(found_in(split, "drnas"), clean, "what was found")


# Something to find


class Lines(SearchSpace):
    """One convolution and the mean over the image."""

    def __init__(self):
        super().__init__()
        kernel = self.choice("kernel", (1, 5, 3))
        width = self.choice("width", (8, 6))
        self.convolution = elastic.Conv2d(1, width, kernel)
        self.head = elastic.Linear(width, 2)

    def forward(self, x):
        return self.head(self.convolution(x).relu().mean((2, 3)))

    def example_input(self, batch):
        return torch.randn(batch, 1, 12, 12)


def echoes(count: int, generator: torch.Generator) -> TensorSamples:
    """Noise with an echo of itself four pixels on, added or subtracted: only a window of five sees both."""
    labels = torch.arange(count) % 2
    noise = torch.randn(count, 1, 12, 12, generator=generator)
    sign = (2.0 * labels - 1).view(-1, 1, 1, 1)
    return TensorSamples((noise + sign * noise.roll(4, 3)) / 2**0.5, labels)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.part(4)
def test_the_search_finds_the_one_kernel_that_can_see_the_difference(optimizer):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    space, searcher = Lines(), create_optimizer(optimizer)
    data = DataView({name: echoes(256, generator) for name in SPLITS})
    result = search(
        space, searcher, data, epochs=20, batch_size=32, seed=0,
        weight_optimizer=partial(torch.optim.Adam, lr=0.02),
        architecture_optimizer=partial(torch.optim.Adam, lr=0.02),
    )  # fmt: skip
    found = discretize(space, data, result.mixture, derivation=searcher.derivation, candidates=6)
    assert found.architecture.choices["kernel"] == 5
    assert found.validation_accuracy > 90
    if result.mixture is not None:
        assert result.mixture["kernel"].argmax() == 1 and result.mixture["kernel"][1] > 0.5
        assert result.history[-1]["entropy"] < result.history[0]["entropy"]


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 0}, "search.epochs is 0, expected a whole number of at least 1"),
        ({"epochs": 1.5}, "search.epochs is 1.5, expected"),
        ({"warmup_epochs": -1}, "search.warmup_epochs is -1, expected a whole number of at least 0"),
        (
            {"warmup_epochs": 2},
            "search.warmup_epochs is 2 and search.epochs 2, so alpha would learn in no epoch: lower the first",
        ),
        ({"strategy": "both"}, "search.strategy is 'both', expected 'alternating' or 'simultaneous'"),
        ({"batch_size": 9}, "batch size 9 is larger than the 8 samples to draw from"),
        ({"batch_size": 0}, "search.batch_size is 0, expected a whole number of at least 1"),
        ({"device": "tpu"}, "device 'tpu' cannot be used"),
        ({"checkpoint_every": 0}, "search.checkpoint_every is 0, expected a whole number of at least 1"),
        ({"clip": -0.5}, "search.clip is -0.5, expected a positive number"),
        ({"clip": 0}, "search.clip is 0, expected a positive number"),
        ({"clip": True}, "search.clip is True, expected a positive number"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(TangleNASError) as caught:
        searched(vit, **options)
    assert message in str(caught.value)


def test_an_architecture_step_of_its_own_is_not_dropped_by_a_simultaneous_search():
    assert {*OPTIMIZERS} - {*SIMULTANEOUS} == {"darts2"}
    for optimizer in ("darts2", Leaning(1)):
        with pytest.raises(TangleNASError, match=r"search\.strategy is 'simultaneous', but .* in a step of its own"):
            searched(vit, optimizer, strategy="simultaneous")


def test_warm_up_epochs_matter_to_gradient_methods_only():
    assert len(searched(vit, "spos", warmup_epochs=2)["history"]) == 2


def test_a_space_without_choices():
    class Fixed(SearchSpace):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

    with pytest.raises(TangleNASError, match="the space 'Fixed' has no choices: there is nothing to search"):
        search(Fixed(), DARTS(), DataView({}))


def view(inputs: torch.Tensor, labels: torch.Tensor) -> DataView:
    return DataView({name: TensorSamples(inputs, labels) for name in SPLITS})


@pytest.mark.parametrize(
    "shape, classes, message",
    [
        ((1, 5, 5), 3, "the data are of shape 1 x 5 x 5 (C x H x W), but the space 'thumbnail' takes 1 x 4 x 4"),
        ((3, 4, 4), 3, "the data are of shape 3 x 4 x 4 (C x H x W)"),
        ((16,), 3, "the data are of shape 16, but"),
        ((1, 4, 4), 5, "have a class 4, but the space 'thumbnail' has 3 outputs: create it with the dataset's num"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["search", "discretize"])
def test_data_that_do_not_fit_the_space(stage, shape, classes, message):
    space = vit()
    space.name = "thumbnail"
    data = view(torch.randn(10, *shape), torch.arange(10) % classes)
    with pytest.raises(TangleNASError) as caught:
        search(space, DARTS(), data) if stage == "search" else discretize(space, data, None, method="random")
    assert message in str(caught.value)
    assert "create the space with" in str(caught.value) or "create it with" in str(caught.value)


STAGES = {
    "search": lambda space, data, seed: search(space, SPOS(), data, epochs=1, batch_size=4, seed=seed, device="cpu"),
    "discretize": lambda space, data, seed: discretize(space, data, None, method="random", candidates=2, seed=seed),
    "retrain": lambda space, data, seed: retrain(space, space.smallest(), data, epochs=1, batch_size=4, seed=seed),
    "rank_correlation": lambda space, data, seed: rank_correlation(
        space, data, lambda _: {"table_value": 1.0, "table_rank": 1}, architectures=2, seed=seed
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_seeds_are_whole_numbers_of_64_bits(stage):
    space = vit()
    data = random_data(space, (*SPLITS, "training"))
    STAGES[stage](space, data, 2**63 - 1)
    STAGES[stage](space, data, np.int64(2**63 - 1))
    for seed in (-5, 1.5, True, "0", None, 2**63, 2**70):
        with pytest.raises(TangleNASError, match=rf"{stage}\.seed is {seed!r}, expected a whole number from 0 to 9223"):
            STAGES[stage](space, data, seed)


def text(vocabulary: int, length: int) -> DataView:
    """Tokens that count up."""
    rows = torch.arange(40 * (length + 1)).reshape(40, -1) % vocabulary
    return DataView({name: TokenSamples(rows, torch.arange(40)) for name in SPLITS})


@pytest.mark.slow
def test_text_is_searched_with_the_same_defaults():
    result = search(Language(vocab_size=7, block_size=5), DrNAS(), text(7, 5), epochs=3, batch_size=8)
    assert result.history[-1]["weight_loss"] < result.history[0]["weight_loss"]
    assert all(0 <= row["validation_accuracy"] <= 100 for row in result.history)


def test_text_that_does_not_fit_the_space():
    space = Language(vocab_size=7, block_size=5)
    with pytest.raises(TangleNASError, match=r"of shape 6 tokens, but the space 'Language' takes 5 tokens.*block_size"):
        search(space, DARTS(), text(7, 6))
    with pytest.raises(TangleNASError, match=r"have a token 7, but the space 'Language' has 7 outputs.*vocab_size"):
        search(space, DARTS(), text(8, 5))
    with pytest.raises(TangleNASError, match=r"of shape 5 tokens, but the space 'AutoFormer' takes 1 x 4 x 4"):
        search(vit(), DARTS(), text(7, 5))


def test_a_look_at_the_data_changes_nothing():
    space = noisy_vit().train()
    before = torch.get_rng_state()
    check_fit(space, random_data(space, SPLITS).weights)
    assert before.equal(torch.get_rng_state()) and space.training


@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.part(3)
@pytest.mark.slow
def test_divergence_is_told_with_its_step_and_the_checkpoint_before_it_stays(tmp_path, optimizer, every):
    class Steps(SilentProgress):
        done = 0

        def advance(self):
            self.done += 1

    steps = Steps()

    def loss(outputs, targets):
        return cross_entropy(outputs, targets) * (1 if steps.done < 2 else float("nan"))

    space = vit()
    data = random_data(space, SPLITS)
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        with pytest.raises(
            TangleNASError, match=r"search: .*_loss is not finite by step 3 of 8.*Lower the learning rate"
        ):
            search(
                space, create_optimizer(optimizer), data, epochs=4, batch_size=4, loss=loss, progress=steps,
                checkpoints=checkpoints, checkpoint_every=every,
            )  # fmt: skip
        state = checkpoints.load()
    assert state["position"] == 2 and steps.done == (3 if every else 4)
    assert all(weight.isfinite().all() for weight in state["space"].values())


# Stopping early


class Leaning(DARTS):
    """Skips more and more: alpha goes by steps of its own, and not by the loss."""

    def __init__(self, option: int, speed: float = 0.5):
        super().__init__()
        self.option, self.speed = option, speed

    def architecture_backward(self, step):
        loss = super().architecture_backward(step)
        for count, alpha in self.alphas.items():
            alpha.grad = torch.zeros_like(alpha)
            edge = step.index // 2 % len(alpha)
            alpha.grad[edge, self.option % count] = -self.speed
        return loss


SKIPS_OF_ALL_KINDS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


def leaning(optimizer=None, **options):
    space = create_space("nb201", channels=2, cells=1, image_size=8, num_classes=3)
    rate = partial(torch.optim.SGD, lr=1.0)
    return searched(space, optimizer or Leaning(1), architecture_optimizer=rate, **{"epochs": 6, **options})


@pytest.mark.exhaustive
def test_a_search_stops_when_a_cell_has_too_many_skip_connections():
    def skips(history):
        return [row["architecture"].count("skip_connect") for row in history]

    whole = leaning()["history"]
    counts = skips(whole)
    assert len(counts) == 6 and counts[1] < counts[2] < counts[3] and not any("stopped" in row for row in whole)
    history = leaning(stop=EarlyStopping(max_skips=counts[2]))["history"]
    assert skips(history) == counts[:4]
    assert [row.get("stopped") for row in history] == [
        *[None] * 3,
        f"operation has {counts[3]} of skip_connect, more than {counts[2]}",
    ]
    # The warm-up is not judged.
    late = leaning(stop=EarlyStopping(max_skips=0, skip_options=SKIPS_OF_ALL_KINDS), warmup_epochs=3)["history"]
    assert len(late) == 4 and late[-1]["stopped"].startswith("operation has 6 of avg_pool_3x3, none, nor_conv_1x1, ")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_stops_when_alpha_has_decided(capsys):
    fast = partial(Leaning, 1, 20.0)
    entropies = [row["entropy"] for row in leaning(fast())["history"]]
    assert entropies[-1] < entropies[2] < entropies[1]
    limit = (entropies[1] + entropies[2]) / 2
    history = leaning(fast(), stop=EarlyStopping(min_entropy=limit), progress=ConsoleProgress())["history"]
    assert len(history) == 3
    reason = f"the mixture's entropy is {entropies[2]:.3g}, below {limit:g}"
    assert history[-1]["stopped"] == reason
    assert f"search: stopped after epoch 3 of 6: {reason}" in capsys.readouterr().out
    # The warm-up is not judged.
    assert len(leaning(fast(), stop=EarlyStopping(min_entropy=0.9999), warmup_epochs=4)["history"]) == 5


@pytest.mark.parametrize("cuts", [(3,), (2, 4)])
@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_search_that_stops_early_resumes_like_any_other(cuts):
    options = {"architecture_optimizer": partial(torch.optim.SGD, lr=1.0), "epochs": 6}
    space = partial(create_space, "nb201", channels=2, cells=1, image_size=8, num_classes=3)
    check_resume(partial(Leaning, 1, 20.0), space, cuts, stop=EarlyStopping(min_entropy=0.75), **options)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_that_stopped_early_is_not_taken_up_again(tmp_path):
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        first = leaning(Leaning(1, 20.0), stop=EarlyStopping(min_entropy=0.75), checkpoints=checkpoints)
        assert "stopped" in first["history"][-1] and len(first["history"]) < 6
        same(
            leaning(Leaning(1, 20.0), stop=EarlyStopping(min_entropy=0.75), checkpoints=checkpoints),
            first,
            "the search",
        )


@pytest.mark.parametrize(
    "options, optimizer, message",
    [
        ({"max_skips": -1}, "drnas", "EarlyStopping.max_skips is -1, expected a whole number of at least 0"),
        ({"max_skips": 2}, "drnas", "no choice of 'AutoFormer' has an option among skip_options, skip_connect: name"),
        ({"min_entropy": 1}, "drnas", "EarlyStopping.min_entropy is 1, expected a number between 0 and 1"),
        ({"min_entropy": 0}, "drnas", "EarlyStopping.min_entropy is 0, expected a positive number"),
        ({"min_entropy": 0.5}, "spos", "EarlyStopping.min_entropy is about what alpha says, and spos has no"),
        ({"max_skips": 2}, "spos", "EarlyStopping.max_skips is about what alpha says, and spos has no"),
        ({}, "drnas", "EarlyStopping stops for nothing: give min_entropy, max_skips or both"),
        ({"max_skips": 2, "skip_options": "skip"}, "drnas", "EarlyStopping.skip_options is 'skip', expected a list of"),
    ],
)
def test_rules_for_stopping_that_do_not_apply(options, optimizer, message):
    with pytest.raises(TangleNASError) as caught:
        searched(vit, optimizer=optimizer, stop=EarlyStopping(**options))
    assert message in str(caught.value)


@pytest.mark.parametrize("reduction, given", [(None, "nothing"), ("none", r"a tensor of shape \(4,\)")])
def test_a_loss_that_is_not_one_number(reduction, given):
    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction=reduction) if reduction else "nothing"

    with pytest.raises(TangleNASError, match=f"search.loss gives '?{given}'?, expected a tensor with one number"):
        searched(noisy_vit, loss=loss)


def test_a_loss_that_fails_is_told_with_what_it_got():
    shapes = r"outputs of shape \(4, 3\) and torch.int64 targets of shape \(4,\)"
    with pytest.raises(TangleNASError, match=rf"search.loss cannot be used \(for {shapes}, ValueError"):
        searched(noisy_vit, loss=nn.functional.binary_cross_entropy_with_logits)


@pytest.mark.parametrize("order", ["magnitude", "taylor"])
@pytest.mark.slow
def test_a_search_orders_the_units_of_a_trained_network_first(order):
    """The rate of learning is 0, so the largest network at the end is the one of the start."""
    torch.manual_seed(1)
    space = vit()
    x = space.example_input(2)
    with torch.no_grad():
        for parameter in space.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    before, weight = space.eval()(x), space.norm.weight.clone()
    still = partial(torch.optim.SGD, lr=0.0)
    found = searched(space, order=order, weight_optimizer=still)
    torch.testing.assert_close(space.eval()(x), before, rtol=1e-5, atol=1e-5)
    assert not torch.equal(space.norm.weight, weight)
    assert torch.equal(space.norm.weight.sort().values, weight.sort().values)
    assert found["architecture"]


@pytest.mark.slow
def test_a_search_orders_the_layers_of_a_trained_network_first(tmp_path):
    """The supernet's file says so to the stages that follow."""
    torch.manual_seed(3)
    space = vit(depth=(1, 3))
    before = space.eval()(x := space.example_input(2))
    searched(space, order_layers=True, weight_optimizer=partial(torch.optim.SGD, lr=0.0))
    assert sorted(space.blocks.order) == [0, 1, 2] and space.blocks.order != (0, 1, 2)
    torch.testing.assert_close(space.eval()(x), before, rtol=0, atol=0)
    save_weights(tmp_path / "supernet.safetensors", space.state_dict())
    other = vit(depth=(1, 3))
    load_into(other, tmp_path / "supernet.safetensors")
    network = other.extract(other.architecture(embed_dim=12, depth=1, num_heads=[3], mlp_ratio=[2]))
    kept = space.blocks[space.blocks.order[0]]
    assert torch.equal(network.blocks[0].norm1.weight, kept.norm1.weight)
    assert torch.equal(network.blocks[0].attn.qkv.weight, kept.attn.qkv.weight)


def test_batches_without_targets_are_left_out_of_the_order(capsys):
    data = random_data(vit(), SPLITS, samples=80)
    data.weights.labels[16:] = IGNORED  # most of the first batches have no target
    searched(partial(vit, depth=(1, 3)), "spos", data, order="taylor", order_layers=True, progress=ConsoleProgress())
    assert re.search(r"the loss is \d\.\d+ with all of them and \d\.\d+ without these", capsys.readouterr().out)


@pytest.mark.parametrize("optimizer", ["drnas", "spos"])
@pytest.mark.exhaustive
def test_a_search_with_an_order_of_layers_that_is_killed_ends_like_one_that_is_not(tmp_path, optimizer):
    options = dict(order="taylor", order_layers=True, checkpoint_every=1)
    whole = searched(partial(vit, depth=(1, 3)), optimizer, **options)
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints, pytest.raises(CutOff):
        searched(partial(vit, depth=(1, 3)), optimizer, **options, checkpoints=checkpoints, progress=CutAfter(2))
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        resumed = searched(partial(vit, depth=(1, 3)), optimizer, **options, checkpoints=checkpoints)
    assert "blocks.order" in whole["weights"]
    same(resumed, whole, "the resumed search")


class Enough:
    """A rule that ends the search after its second epoch."""

    def check(self, space, optimizer): ...

    def __call__(self, current, record):
        self.current = current
        return "enough" if record["validation_loss"] and self.calls() == 2 else None

    def calls(self):
        self.called = getattr(self, "called", 0) + 1
        return self.called


@pytest.mark.parametrize("optimizer", ["spos", "darts"])
def test_a_rule_of_ones_own_ends_a_search_with_and_without_alpha(tmp_path, optimizer):
    rule = Enough()
    options = {"optimizer": optimizer, "epochs": 3, "stop": rule}
    for _ in range(2):  # the second one reads it from its checkpoint
        with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
            history = searched(vit, **options, checkpoints=checkpoints)["history"]
        assert [row.get("stopped") for row in history] == [None, "enough"]
    assert (rule.current is None) == (optimizer == "spos") and rule.called == 2


def test_an_order_that_is_none_is_refused():
    with pytest.raises(TangleNASError, match=r"unknown search\.order 'size'"):
        searched(vit, order="size")


def test_a_search_whose_table_lacks_an_architecture_goes_on(tmp_path):
    """The first epoch's architecture is not in the table, and the one at the start is."""

    def run(table, steps):
        with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
            return searched(table=table, checkpoints=checkpoints, checkpoint_every=1, progress=CutAfter(steps))

    with pytest.raises(CutOff):
        run(lambda architecture: {}, 3)
    found = run(lambda architecture: {"table_value": 1.0}, None)
    assert [record.get("table_value") for record in found["history"]] == [None, 1.0]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"validation_accuracy": 93.7}, "a value 'validation_accuracy', which is the search's own.* 'table_validation"),
        ({"entropy": 0.0}, "a value 'entropy', which is the search's own"),
        ({"architecture_loss": 0.0}, "a value 'architecture_loss', which is the search's own"),
        ({"stopped": 1.0}, "a value 'stopped', which is the search's own"),
        ({"rank": None}, "search.table gives None for 'rank', expected a number: leave out what is not known"),
        ({"rank": True}, "search.table gives True for 'rank', expected a number"),
    ],
)
def test_values_of_a_table_that_the_history_cannot_hold_are_refused(values, message):
    with pytest.raises(TangleNASError, match=message):
        searched(vit, table=lambda _: values)


@pytest.mark.parametrize("value", [float("nan"), -3.0, 1e9, np.float32(0.5), 7])
def test_a_search_goes_on_with_any_number_of_a_table(tmp_path, value):
    options = {"table": lambda _: {"neg_accuracy": value}, "checkpoint_every": 1}
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints, pytest.raises(CutOff):
        searched(vit, **options, checkpoints=checkpoints, progress=CutAfter(4))
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        history = searched(vit, **options, checkpoints=checkpoints)["history"]
    assert [str(row["neg_accuracy"]) for row in history] == [str(float(value))] * 2


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"weight_optimizer": partial(torch.optim.SparseAdam, lr=0.1)},
            r"search.weight_optimizer .* dense grad",
        ),
        ({"weight_optimizer": torch.optim.SparseAdam, "seconds": 9.0}, r"search.weight_optimizer cannot .* dense grad"),
        ({"architecture_optimizer": torch.optim.SparseAdam}, r"search.architecture_optimizer cannot .* dense grad"),
        ({"scheduler": CosineLRScheduler}, r"search.scheduler cannot be used \(its step\(\) fails: .*'epoch'"),
        ({"loss": partial(cross_entropy, label_smoothing=1.5)}, "search.loss cannot be used .*label_smoothing"),
    ],
)
def test_what_a_search_cannot_use_is_told_by_its_option(options, message):
    with pytest.raises(TangleNASError, match=message):
        searched(vit, **options)


def test_a_tensor_as_the_rate_stays_as_it_is_and_begins_the_path_epochs_again():
    """A schedule moves it in place, and the factory gives it to each optimizer that it makes."""
    rates, schedule = [1e-3, torch.tensor(1e-3)], torch.optim.lr_scheduler.ExponentialLR
    one, two = (
        searched(
            noisy_vit,
            weight_optimizer=partial(torch.optim.AdamW, lr=rate),
            scheduler=lambda optimizer, steps: schedule(optimizer, 0.1),
            path_epochs=1,
        )
        for rate in rates
    )
    assert rates[1] == torch.tensor(1e-3)
    for row, other in zip(one["history"], two["history"], strict=True):
        assert row["weight_loss"] == pytest.approx(other["weight_loss"], rel=1e-6)


def test_a_search_in_low_precision_measures_as_discretize_does():
    space = noisy_vit()
    data = random_data(space, SPLITS)
    found = searched(space, data=data, precision="bfloat16")
    measured = measure_inherited(space, space.from_string(found["architecture"]), data.validation, [])
    assert found["history"][-1]["validation_loss"] == measured.loss


def test_a_sampled_search_in_a_band_validates_a_network_of_the_band(monkeypatch):
    space, optimizer, validated = noisy_vit(), create_optimizer("spos"), set()

    def measuring(space, architecture, *rest, **options):
        validated.add(architecture)
        return measure_inherited(space, architecture, *rest, **options)

    monkeypatch.setattr("tanglenas_engine.stages.search.measure_inherited", measuring)
    searched(space, optimizer, targets=[Target(create_objective("macs"), share=0.5)])
    (network,) = validated
    assert optimizer.source.holds(network) and network != space.largest()
