"""TuNAS: its gradient is that of the expected loss, in the whole space and in a band."""

import itertools
from collections import Counter

import pytest
import torch
from tiny import tiny

from tanglenas_engine import SearchSpace, create_objective, create_optimizer, elastic, search
from tanglenas_engine.data import SPLITS
from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.optimizers.optimizer import Step
from tanglenas_engine.testing import check_resume, random_data
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.optim import parameter_groups
from tanglenas_gradient.tunas import TuNAS


def bound(space, **options):
    optimizer = TuNAS(**options)
    optimizer.bind(space, 0)
    with torch.no_grad():
        for alpha in optimizer.alphas.values():
            alpha.copy_(torch.randn(alpha.shape, generator=torch.Generator().manual_seed(1)))
    return optimizer


def step_of(space, index, progress):
    return Step(index, space, cross_entropy, (), (), None, progress=progress)


def loss_of(space, architecture):
    """A loss in which the options of two choices matter only together."""
    picks = space.assignment_of(architecture)
    values = [1.0 + picks[row] for row in space.rows if row.active(picks)]
    return torch.tensor(float(sum(values) + values[0] * values[-1])).double()


def exact_gradient(optimizer, holds):
    """The gradient of the expected loss over the architectures that hold, by going through all assignments."""
    space, total, mass = optimizer.space, 0.0, 0.0
    chances = {count: alpha.softmax(1) for count, alpha in optimizer.alphas.items()}
    for parts in itertools.product(*space.decisions()):
        picks = {row: option for part in parts for row, option in part.items()}
        architecture = space.architecture_of(picks)
        if not holds(architecture):
            continue
        chance = torch.stack([chances[len(row.options)][row.slot, option] for row, option in picks.items()]).prod()
        total, mass = total + chance * loss_of(space, architecture), mass + chance
    return torch.autograd.grad(total / mass, optimizer.parameters())


@pytest.mark.parametrize("name", ["stages", "convolutional"])
@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.part(4)
@pytest.mark.exhaustive
def test_the_gradient_is_that_of_the_expected_loss(name, banded):
    space = tiny(name).double()
    optimizer, holds = bound(space), lambda architecture: True
    if banded:
        most = (space.cost(space.smallest()).macs + space.cost(space.largest()).macs) // 2
        band = Band(Budget(space, {"macs": most}), 0.6)
        optimizer.draw_from(band)
        holds = band.holds
    wanted = exact_gradient(optimizer, holds)
    found = []
    for step in range(1200):
        drawn = [optimizer._draw(step, str(i)) for i in range(optimizer.samples)]
        assert all(map(holds, drawn))
        objective = optimizer._objective(drawn, [loss_of(space, one) for one in drawn])
        found.append(torch.autograd.grad(objective, optimizer.parameters()))
    for exact, *samples in zip(wanted, *found, strict=True):
        sampled = torch.stack(samples)
        error = sampled.std(0) / len(sampled) ** 0.5
        assert ((sampled.mean(0) - exact).abs() <= 4.5 * error + 1e-9).all()
        assert exact.abs().max() > 4.5 * error.max(), "the test could not tell a wrong gradient"


def test_an_architecture_step_goes_forward_only():
    space = tiny("vit").train()
    optimizer = bound(space, samples=3)
    data = random_data(space, ("weights", "architecture"))
    batches = [getattr(data, name).batch(torch.arange(8)) for name in ("weights", "architecture")]
    seen = []
    hook = space.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    step = Step(0, space, cross_entropy, *batches, torch.optim.SGD(parameter_groups(space), lr=0.1))
    optimizer.architecture_backward(step)
    hook.remove()
    assert seen == [False] * 3


def test_the_weights_warm_up_in_the_widest_architectures():
    space = tiny("convolutional")
    optimizer = bound(space, warmup=0.5)
    shares = []
    for progress in (0.0, 0.25, 0.5, 0.75):
        drawn = [optimizer.trained(step_of(space, index, progress)) for index in range(200)]
        shares.append(sum(one == space.largest() for one in drawn) / len(drawn))
        assert optimizer.schedules()["widest"] == max(0.0, 1 - 2 * progress)
    assert shares[0] == 1 and 0.35 < shares[1] < 0.7 and shares[2] < 0.2 and shares[3] < 0.2
    assert len({optimizer.sample(step, "architecture") for step in range(50)}) > 5
    optimizer = bound(space, warmup=0)
    assert len({optimizer.trained(step_of(space, index, 0.0)) for index in range(50)}) > 5


@pytest.mark.parametrize("path_epochs", [0, 2])
def test_the_warm_up_is_a_share_of_the_steps(path_epochs):
    space, chances = tiny("convolutional"), []
    optimizer = create_optimizer("tunas", warmup=0.25)
    trained = optimizer.trained
    optimizer.trained = lambda step: (trained(step), chances.append(optimizer.schedules()["widest"]))[0]
    data = random_data(space, SPLITS, samples=32)
    search(space, optimizer, data, epochs=1 + path_epochs, batch_size=2, path_epochs=path_epochs)
    assert len(chances) >= 8
    assert chances == pytest.approx([max(0.0, 1 - 4 * index / len(chances)) for index in range(len(chances))])


def test_random_operations_warm_up_too():
    space = tiny("toy_cell_nano")
    optimizer = bound(space)
    drawn = {optimizer.trained(step_of(space, index, 0.0)) for index in range(20)}
    assert len(drawn) > 10


class Layers(SearchSpace):
    """Layers of one of three operations, up to a depth."""

    def __init__(self, **options):
        super().__init__(**options)
        depth, width = self.choice("depth", (1, 2, 3)), self.choice("width", (8, 4))
        rows = self.choice("operation", ("a", "b", "c"), per=depth)
        self.blocks = elastic.Depth(
            depth,
            [
                elastic.MixedOperation({
                    name: (row.map(lambda chosen, name=name: int(chosen == name)), elastic.Linear(width, width))
                    for name in "abc"
                })
                for row in rows
            ],
        )  # fmt: skip

    def forward(self, x):
        return self.blocks(x)

    def example_input(self, batch):
        return torch.randn(batch, 8)


def test_the_operations_of_deep_layers_warm_up_alike():
    space = Layers()
    optimizer = bound(space)
    drawn = [optimizer.trained(step_of(space, index, 0.0)).choices for index in range(300)]
    assert all((one["depth"], one["width"]) == (3, 8) for one in drawn)
    for layer in range(3):
        counts = Counter(one["operation"][layer] for one in drawn)
        assert min(counts[name] for name in "abc") > 70


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_with_a_target_stays_in_the_band_and_resumes():
    def target():
        return Target(create_objective("macs"), share=0.7)

    space, seen = tiny("vit"), []
    limit = 0.7 * space.cost(space.largest()).macs
    optimizer = TuNAS(warmup=0)
    sample = optimizer.sample
    optimizer.sample = lambda step, stream: (seen.append(sample(step, stream)), seen[-1])[1]
    data = random_data(space, ("weights", "architecture", "validation"))
    result = search(space, optimizer, data, epochs=2, batch_size=4, targets=[target()], band=(0.5, 1.0))
    assert seen and all(0.5 * limit <= space.cost(one).macs <= limit for one in seen)
    assert "penalty_macs" not in result.history[0] and "expected_macs" in result.history[0]
    result = search(tiny("vit"), TuNAS(), data, epochs=1, batch_size=4, targets=[target()], band=None)
    assert "penalty_macs" in result.history[0]
    check_resume(
        lambda: create_optimizer("tunas"), lambda: tiny("vit"), targets=[target()], band=(0.5, 1.0), warmup_epochs=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples is 1, expected a whole number of at least 2"),
        ({"warmup": 1}, "the warmup of tunas is 1, expected a share of the search from 0 to below 1"),
        ({"warmup": True}, "the warmup of tunas is True"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(TangleNASError, match=message):
        create_optimizer("tunas", **options)


def test_the_gradient_is_that_of_the_probability_that_is_drawn_from():
    """On `darts` an absent edge has no part in an architecture's score."""
    space = tiny("darts")
    optimizer = bound(space)
    (alpha,) = optimizer.alphas.values()
    alpha.data.normal_(generator=torch.Generator().manual_seed(0))
    drawn = [optimizer.sample(step, "architecture") for step in range(2)]
    assert drawn[0] != drawn[1]
    scores = space.scores(optimizer.expected())
    logs = []
    for architecture in drawn:
        picks = space.assignment_of(architecture)
        kept = [(row, option) for row, option in picks.items() if scores[row][option]]
        assert len(kept) < len(picks)
        logs.append(sum(alpha.log_softmax(1)[row.slot, option] for row, option in kept))
        assert logs[-1].item() == pytest.approx(sum(scores[row][picks[row]] for row in picks), abs=1e-4)
    optimizer.samples = 2
    losses = [torch.tensor(1.0), torch.tensor(3.0)]
    (got,) = torch.autograd.grad(optimizer._objective(drawn, losses), [alpha])
    (expected,) = torch.autograd.grad(0.5 * ((1 - 3) * logs[0] + (3 - 1) * logs[1]), [alpha])
    assert torch.allclose(got, expected, atol=1e-5)


def test_the_history_has_a_warm_up_only_where_there_is_one():
    space = tiny("convolutional")
    told = {}
    for strategy in ("alternating", "simultaneous"):
        torch.manual_seed(0)
        optimizer = create_optimizer("tunas", warmup=0.9)
        data = random_data(space, SPLITS)
        told[strategy] = search(space, optimizer, data, epochs=2, batch_size=4, strategy=strategy).history[0]["widest"]
    assert told["alternating"] > 0.4 and told["simultaneous"] == 0.0
