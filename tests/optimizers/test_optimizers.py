"""Every optimizer on every space, and each method against its definition."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from tiny import ALL, DISTINCT, example, tiny
from torch import nn

from tanglenas_engine import Architecture, Optimizer, SearchSpace, elastic
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.optimizers.optimizer import Step, l2
from tanglenas_engine.plugins import create_optimizer, manager
from tanglenas_engine.stages.search import search
from tanglenas_engine.superposition.mixture import COVERED
from tanglenas_engine.testing import (
    check_gradients,
    check_optimizer,
    check_resume,
    check_sampling,
    check_stages,
    random_data,
    same,
)
from tanglenas_gradient.darts import DARTS
from tanglenas_gradient.drnas import DrNAS
from tanglenas_gradient.gdas import GDAS
from tanglenas_sampling.spos import SPOS

OPTIMIZERS = manager().names("optimizer")


def bound(optimizer: Optimizer, space: SearchSpace, seed: int = 0) -> Optimizer:
    optimizer.bind(space, seed)
    return optimizer


SHARINGS = ("superposed", "entangled", "separate")
CAN = {(space, sharing): sharing in example(space).sharings for space in DISTINCT for sharing in SHARINGS}
LARGE = "darts_nano"
"""The space whose step takes ten times as long as any other's."""


def pairs(but=()):
    """Every optimizer with every space. The sharings take turns, so that each meets every optimizer and every space."""
    able = {space: [sharing for sharing in SHARINGS if CAN[space, sharing]] for space in DISTINCT if space not in but}
    return [
        (optimizer, space, sharings[number % len(sharings)])
        for number, optimizer in enumerate(OPTIMIZERS)
        for space, sharings in able.items()
    ]


@pytest.mark.parametrize(
    ("optimizer", "space", "sharing"), sorted({*pairs(), *itertools.product(OPTIMIZERS, ["nb201_nano"], SHARINGS)})
)
def test_every_optimizer_samples_and_learns_on_every_space(optimizer, space, sharing):
    given = lambda: create_optimizer(optimizer), lambda: tiny(space, sharing=sharing)
    check_sampling(*given)
    check_gradients(*given)


@pytest.mark.parametrize(("optimizer", "space", "sharing"), pairs(but=[LARGE]))
def test_every_optimizer_goes_through_all_stages_on_every_space(optimizer, space, sharing):
    check_stages(lambda: create_optimizer(optimizer), lambda: tiny(space, sharing=sharing))


# Resumption takes longest: each optimizer resumes on every second space, each space with every second optimizer.
@pytest.mark.parametrize(
    ("optimizer", "space", "sharing"),
    [it for it in pairs(but=[LARGE]) if (OPTIMIZERS.index(it[0]) + DISTINCT.index(it[1])) % 2 == 0],
)
@pytest.mark.part(8)
def test_a_search_of_every_optimizer_and_of_every_space_resumes(optimizer, space, sharing):
    check_resume(lambda: create_optimizer(optimizer), lambda: tiny(space, sharing=sharing))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["pc_drnas", "spos"])
@pytest.mark.exhaustive
def test_a_large_space_is_searched_by_mixtures_and_by_samples(optimizer):
    check_stages(lambda: create_optimizer(optimizer), lambda: tiny(LARGE))


@pytest.mark.parametrize("space", [space for space in ALL if space not in DISTINCT])
def test_every_preset_is_searched(space):
    check_stages(lambda: create_optimizer("drnas"), lambda: tiny(space))


@pytest.mark.parametrize(("space", "sharing"), [pair for pair, can in CAN.items() if not can])
def test_a_sharing_that_a_space_cannot_do_is_refused_with_those_that_it_can(space, sharing):
    with pytest.raises(TangleNASError, match=f"cannot do sharing '{sharing}': .*Choose one of: superposed"):
        tiny(space, sharing=sharing)


@pytest.mark.parametrize("relaxation", COVERED)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_reach_alpha_under_every_relaxation(optimizer, relaxation):
    check_gradients(lambda: create_optimizer(optimizer), lambda: tiny("vit_relative", relaxation=relaxation))


FAMILIES = ("autoformer_nano", "gpt_nano", "mobilenetv3_nano", "toy_conv_macro_nano", "toy_cell_nano", "nb201_nano")


@pytest.mark.parametrize("space", FAMILIES)
@pytest.mark.parametrize("relaxation", [relaxation for relaxation in COVERED if relaxation != "exact"])
@pytest.mark.part(3)
@pytest.mark.slow
def test_the_other_relaxations_are_searched_in_every_family_of_spaces(space, relaxation):
    check_stages(lambda: create_optimizer("drnas"), lambda: tiny(space, relaxation=relaxation))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_choice_of_one_option_is_no_trouble(optimizer):
    given = lambda: create_optimizer(optimizer), lambda: tiny("vit", num_heads=(2,), depth=(2,))
    for check in (check_sampling, check_gradients, check_stages):
        check(*given)


# What the methods have in common


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_seeds_draw_differently(optimizer):
    space = tiny("vit")
    drawn = [bound(create_optimizer(optimizer), space, seed).sample(0, "weight") for seed in (0, 1)]
    states = [str(s) if isinstance(s, Architecture) else {k: v.tolist() for k, v in s.items()} for s in drawn]
    assert states[0] != states[1]


def test_alpha_is_small_noise_in_the_precision_of_the_space():
    space = tiny("vit").double()
    alphas = bound(DARTS(), space).alphas
    assert {count: tuple(alpha.shape) for count, alpha in alphas.items()} == {
        count: (rows, count) for count, rows in space.stacks.items()
    }
    values = torch.cat([alpha.flatten() for alpha in alphas.values()])
    assert values.dtype == torch.float64 and 0 < values.abs().max() < 0.01


def test_the_state_of_an_optimizer_is_taken_up_by_another_one():
    space = tiny("vit")
    one, other = bound(DrNAS(), space, seed=1), bound(DrNAS(), space, seed=2)
    state = one.state_dict()
    with torch.no_grad():
        one.alphas[2].zero_()  # a state is a copy
    other.load_state_dict(state)
    same({**other.alphas}, {**bound(DrNAS(), space, seed=1).alphas}, "alpha")


def test_the_current_architecture_has_the_most_probable_options():
    space = tiny("vit")
    chosen = space.sample(torch.Generator().manual_seed(5))
    assert space.most_probable(space.one_hot(chosen)) == chosen
    optimizer = bound(DARTS(), space)
    corner = space.one_hot(chosen).stacks
    with torch.no_grad():
        for count, alpha in optimizer.alphas.items():
            alpha.copy_(corner[count])
    assert optimizer.current() == chosen
    assert bound(SPOS(), space).current() is None


def test_l2_has_the_gradient_of_weight_decay():
    alphas = [torch.randn(2, 3, requires_grad=True), torch.randn(1, 2, requires_grad=True)]
    gradients = torch.autograd.grad(l2(alphas), alphas)
    assert all(gradient.allclose(alpha) for gradient, alpha in zip(gradients, alphas, strict=True))


# DARTS


def test_darts_mixes_by_the_softmax():
    space = tiny("vit")
    optimizer = bound(DARTS(), space)
    for mixture in (optimizer.expected(), optimizer.sample(7, "weight"), optimizer.sample(8, "architecture")):
        for count, alpha in optimizer.alphas.items():
            exponentials = alpha.exp()
            assert mixture.stacks[count].allclose(exponentials / exponentials.sum(1, keepdim=True))


def test_darts_decays_alpha():
    optimizer = bound(DARTS(weight_decay=0.25), tiny("vit"))
    alphas = list(optimizer.alphas.values())
    gradients = torch.autograd.grad(optimizer.regularizer(), alphas)
    assert all(g.allclose(0.25 * alpha) for g, alpha in zip(gradients, alphas, strict=True))


# DrNAS


def drnas(alpha: torch.Tensor, **options) -> DrNAS:
    """With these architecture parameters, `(rows, K)`, whatever the space has."""
    optimizer = bound(DrNAS(**options), tiny("stages"))
    optimizer.alphas = {alpha.shape[1]: nn.Parameter(alpha)}
    return optimizer


def test_drnas_expects_the_mean_of_its_dirichlet():
    alpha = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    concentration = torch.tensor([1.5, torch.tensor(-1.0).exp(), 3.0], dtype=torch.float64)
    expected = drnas(alpha).expected().stacks[3][0]
    assert expected.allclose(concentration / concentration.sum(), atol=1e-7)
    draws = drnas(alpha.expand(100_000, 3)).sample(0, "weight").stacks[3]
    assert draws.sum(1).allclose(torch.ones(100_000, dtype=torch.float64)) and (draws >= 0).all()
    assert draws.mean(0).allclose(expected, atol=4e-3)


def test_drnas_has_the_pathwise_gradient_of_an_expectation():
    # E[sum_i w_i x_i^2] under Dirichlet(c) is sum_i w_i c_i (c_i + 1) / (C (C + 1)) with C = sum c.
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    alpha = torch.tensor([0.7, -0.8, 1.5], dtype=torch.float64, requires_grad=True)
    c = torch.where(alpha > 0, alpha + 1, alpha.exp())
    exact = (weights * c * (c + 1)).sum() / (c.sum() * (c.sum() + 1))
    (wanted,) = torch.autograd.grad(exact, alpha)

    optimizer = drnas(alpha.detach().expand(400_000, 3).clone())
    draws = optimizer.sample(0, "architecture").stacks[3]
    (gradients,) = torch.autograd.grad((weights * draws.square()).sum(), optimizer.alphas[3])
    error = gradients.std(0) / len(gradients) ** 0.5
    assert ((gradients.mean(0) - wanted).abs() < 4 * error).all()
    assert (error < 0.01 * wanted.abs().max()).all()


def test_drnas_stays_finite_at_the_ends():
    for value in (-100.0, -17.0, -13.0, 0.0, 1000.0):
        for row in ([value] * 3, [value, value, 0.5]):
            optimizer = drnas(torch.tensor([row] * 500), regularizer="kl")
            total = (optimizer.sample(0, "weight").stacks[3] * torch.arange(3.0)).sum() + optimizer.regularizer()
            (gradient,) = torch.autograd.grad(total, optimizer.alphas[3])
            assert gradient.isfinite().all() and optimizer.expected().stacks[3].isfinite().all(), value


def test_drnas_regularizers():
    alpha = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, -0.3]], dtype=torch.float64)
    assert drnas(alpha, regularizer="l2", scale=0.2).regularizer().item() == pytest.approx(
        0.1 * alpha.square().sum().item()
    )
    c = torch.where(alpha > 0, alpha + 1, alpha.exp())
    total = c.sum(1, keepdim=True)
    kl = total.lgamma() - c.lgamma().sum(1, keepdim=True) - torch.tensor(3.0).lgamma()
    kl = kl.sum() + ((c - 1) * (c.digamma() - total.digamma())).sum()
    assert drnas(alpha, regularizer="kl", scale=0.2).regularizer().item() == pytest.approx(0.2 * kl.item(), rel=1e-6)
    assert drnas(torch.zeros(2, 3), regularizer="kl").regularizer().item() == pytest.approx(0, abs=1e-6)
    assert drnas(alpha, regularizer="none").regularizer() is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"regularizer": "L1"}, "unknown regularizer of drnas 'L1'. Did you mean 'l2'"),
        ({"scale": 0}, "the regularizer's scale is 0, expected a positive number"),
        ({"scale": True}, "the regularizer's scale is True, expected a positive number"),
        ({"scale": "1"}, "the regularizer's scale is '1', expected a positive number"),
    ],
)
def test_options_of_drnas_that_cannot_be(options, message):
    with pytest.raises(TangleNASError) as caught:
        create_optimizer("drnas", **options)
    assert message.split(". ")[0] in str(caught.value)


# SPOS


def test_spos_draws_every_option_equally_often():
    space = tiny("vit")
    optimizer = bound(SPOS(), space)
    drawn = [optimizer.sample(step, "weight") for step in range(1500)]
    for name, choice in space.choices.items():
        for layer in range(len(choice)):
            values = [a.choices[name] for a in drawn]
            picks = [v[layer] for v in values if len(v) > layer] if choice.layered else values
            counts = [picks.count(option) for option in choice.options]
            assert chisquare(counts).pvalue > 0.01, (name, layer, counts)


def test_spos_computes_with_real_slices():
    space = tiny("vit")
    optimizer = bound(SPOS(), space)
    optimizer.enter(space.smallest())
    widths = []
    hook = space.norm.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[-1]))
    space(space.example_input(2))
    hook.remove()
    assert widths == [space.choices["embed_dim"].min] != [space.choices["embed_dim"].max]


# The conformance checks find what they are for


class Restless(DARTS):
    """Draws from the global generator."""

    def sample(self, step, stream):
        return self.space.mixture(
            {k: (alpha + 0.1 * torch.randn_like(alpha)).softmax(1) for k, alpha in self.alphas.items()}
        )


class Counting(DARTS):
    """What is sampled depends on how often it was asked."""

    calls = 0

    def sample(self, step, stream):
        self.calls += 1
        return self.space.mixture({k: (alpha * self.calls).softmax(1) for k, alpha in self.alphas.items()})


class OneStream(SPOS):
    """Both halves of a step see the same draw."""

    def sample(self, step, stream):
        return super().sample(step, "weight")


class Sums(DARTS):
    """Forgets to normalise."""

    def sample(self, step, stream):
        return self.space.mixture({k: alpha.exp() for k, alpha in self.alphas.items()})


class Constant(DARTS):
    """Cuts the graph."""

    def sample(self, step, stream):
        return self.expected().detach()


class Backward(DARTS):
    """Back-propagates into the weights as well."""

    def architecture_backward(self, step):
        self.enter(self.sample(step.index, "architecture"))
        loss = self._loss(step, step.architecture_batch)
        torch.autograd.backward(loss)
        return loss.detach()


class Nudging(DARTS):
    """Leaves the weights where a trial step put them."""

    def architecture_backward(self, step):
        loss = super().architecture_backward(step)
        with torch.no_grad():
            next(step.space.parameters()).add_(1e-3)
        return loss


class Leaking(DARTS):
    """Gives alpha a gradient in the weight step."""

    def weight_losses(self, step):
        self.enter(self.sample(step.index, "weight"))
        yield self._loss(step, step.weight_batch)


class Forgetful(SPOS):
    """Keeps a state of its own out of the checkpoint."""

    memory = 0

    def sample(self, step, stream):
        self.memory += 1
        return super().sample(self.memory, stream)


class Roaming(SPOS):
    """Draws from the whole space, whatever the band is."""

    def sample(self, step, stream):
        return self.space.sample(torch.Generator().manual_seed(self.derive_seed(step, stream)))


class RoamingMixtures(GDAS):
    """Draws mixtures of one architecture from the whole space, whatever the band is."""

    def sample(self, step, stream):
        source, self.source = self.source, self.space
        try:
            return super().sample(step, stream)
        finally:
            self.source = source


class Permuted(SPOS):
    """Trains architectures of the whole space, whatever the band is."""

    def weight_losses(self, step):
        self.enter(self.space.sample(torch.Generator().manual_seed(step.index)))
        yield self._loss(step, step.weight_batch)


class Refusing(Permuted):
    """Refuses a band."""

    def draw_from(self, source):
        super().draw_from(source)
        if source is not self.space:
            raise TangleNASError("leave search.target out")


class Seedless(SPOS):
    """Draws the same in every search."""

    def sample(self, step, stream):
        return self.source.sample(torch.Generator().manual_seed(hash((step, stream == "weight"))))


class OnePath(SPOS):
    """Trains one network all the time."""

    def sample(self, step, stream):
        return super().sample(0, stream)


class Unscaled(DARTS):
    """Takes the gradient of the loss as it is, which float16 may not hold."""

    def architecture_backward(self, step):
        return super().architecture_backward(replace(step, scale=torch.tensor(1.0)))


class OneBatch(DARTS):
    """Trains alpha on what the weights are trained on."""

    def architecture_backward(self, step):
        return super().architecture_backward(replace(step, architecture_batch=step.weight_batch))


class Freezing(DARTS):
    """Leaves a weight without gradient."""

    def architecture_backward(self, step):
        loss = super().architecture_backward(step)
        next(step.space.parameters()).requires_grad_(False)
        return loss


class Dissolving(DARTS):
    """Is no distribution any more at the end."""

    def expected(self):
        return self.space.mixture({k: (2 if self.last else 1) * a.softmax(1) for k, a in self.alphas.items()})

    last = False

    def set_progress(self, fraction):
        self.last = fraction == 1


class Undecided(DARTS):
    """Has no mixture, and asks for argmax."""

    derivation = "argmax"

    def expected(self):
        return None

    def sample(self, step, stream):
        return super().expected()


@pytest.mark.parametrize(
    "check, optimizer, message",
    [
        (check_sampling, Restless, "global generator"),
        (check_sampling, Counting, "in another order"),
        (check_sampling, OneStream, "draw the same"),
        (check_sampling, Seedless, "the same for another seed"),
        (check_sampling, OnePath, "the same architecture in each step"),
        (check_sampling, Dissolving, "at the end of the search, expected() is not on the simplex"),
        (check_gradients, Unscaled, "does not grow with step.scale"),
        (check_gradients, OneBatch, "does not depend on the architecture batch"),
        (check_gradients, Freezing, "frozen, or thawed"),
        (check_sampling, Sums, "not on the simplex"),
        (check_sampling, Constant, "does not depend on alpha"),
        (check_sampling, Roaming, "that draw_from() left out"),
        (check_sampling, RoamingMixtures, "sample() gives architectures that draw_from() left out"),
        (check_sampling, Permuted, "weight_losses() gives architectures that draw_from() left out"),
        (check_sampling, Undecided, "learns_architecture is True, but expected"),
        (check_gradients, Backward, "leaves a gradient"),
        (check_gradients, Nudging, "changes"),
        (check_gradients, Leaking, "reach alpha"),
        (check_resume, Forgetful, "the search that was resumed: space"),
        (check_stages, Undecided, "expected() gives no mixture"),
    ],
)
def test_the_checks_find_a_broken_optimizer(check, optimizer, message):
    with pytest.raises(AssertionError) as caught:
        check(optimizer, functools.partial(tiny, "vit"))
    assert message in str(caught.value)


def test_an_optimizer_may_refuse_a_band():
    check_sampling(Refusing, functools.partial(tiny, "vit"))


def test_states_differ_in_a_bit():
    state = {"a": [torch.zeros(3), 1], "b": {"c": 0.5}}
    same(state, {"a": [torch.zeros(3), 1], "b": {"c": 0.5}}, "state")
    for other, message in [
        ({"a": [torch.zeros(3), 1], "b": {"c": 0.25}}, "state: b: c differs: 0.5, 0.25"),
        ({"a": [torch.tensor([0, 0, 1e-30]), 1], "b": {"c": 0.5}}, r"state: a\[0\] differs by up to 1e-30"),
        ({"a": [torch.zeros(3).double(), 1], "b": {"c": 0.5}}, r"state: a\[0\] differs in type or shape"),
        ({"a": [torch.zeros(3)], "b": {"c": 0.5}}, "state: a differs in its length: 2, 1"),
        ({"a": [torch.zeros(3), 1]}, "state differs in its keys"),
    ]:
        with pytest.raises(AssertionError, match=message):
            same(state, other, "state")


# Plugins may go their own way


class TwoPaths(Optimizer):
    """The largest and a sampled network in one weight step, gradients added: no outputs for the accuracy."""

    learns_architecture = False
    derivation = "random"

    def sample(self, step: int, stream: str) -> Architecture:
        return self.draw(step, stream)

    def weight_losses(self, step: Step):
        for architecture in (self.space.largest(), self.sample(step.index, "weight")):
            self.enter(architecture)
            yield step.loss(step.space(step.weight_batch[0]), step.weight_batch[1])


@pytest.mark.slow
def test_an_optimizer_may_have_several_losses_and_no_outputs():
    check_optimizer(TwoPaths, functools.partial(tiny, "convolutional"))
    space = tiny("vit")
    data = random_data(space, ("weights", "architecture", "validation"))
    lines = []

    class Listening:
        def note(self, text): ...
        def advance(self): ...
        def epoch(self, epoch, epochs, text):
            lines.append(text)

        def stage(self, name, total, done):
            from contextlib import nullcontext

            return nullcontext(self)

    (row,) = search(space, TwoPaths(), data, epochs=1, batch_size=4, progress=Listening()).history
    assert "weight_accuracy" not in row and "train" not in lines[0] and "(largest network)" in lines[0]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_space_may_be_its_own_smallest_example():
    class Two(SearchSpace):
        def __init__(self):
            super().__init__()
            width = self.choice("width", (2, 1))
            self.first, self.second = elastic.Linear(2, width), elastic.Linear(width, 3)

        def forward(self, x):
            return self.second(self.first(x).relu())

        def example_input(self, batch):
            return torch.randn(batch, 2)

    for name in OPTIMIZERS:
        torch.manual_seed(3)  # of two units and few samples, others leave alpha of a hard sample without a gradient
        check_optimizer(functools.partial(create_optimizer, name), Two)
