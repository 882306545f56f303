"""Discretization: what each method derives, the budget it keeps to, and what it leaves of the supernet."""

import random

import pytest
import torch
from spaces import SPACES, Convolutional, vit
from torch import nn

from tanglenas_engine import SearchSpace
from tanglenas_engine.data import DataView, TensorSamples
from tanglenas_engine.discretize import METHODS, check_budget, discretize, project
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.progress import ConsoleProgress
from tanglenas_engine.size import combinations
from tanglenas_engine.testing import random_data, same
from tanglenas_engine.training import measure, random_inputs, recalibrate

SPLITS = ("weights", "architecture", "validation")
CPU = torch.device("cpu")


def random_mixture(space: SearchSpace, scale: float = 1.0):
    return space.mixture({count: (scale * torch.randn(n, count)).softmax(1) for count, n in space.stacks.items()})


def derive(space: SearchSpace, mixture=None, **options):
    return discretize(space, random_data(space, SPLITS, samples=40), mixture, **options)


def costs(space: SearchSpace):
    """All architectures, as assignments with their costs."""
    return [(picks, space.cost(space.architecture_of(picks))) for picks in combinations(space.rows)]


# Methods


@pytest.mark.parametrize("name", ["convolutional", "vit"])
def test_argmax_takes_the_most_probable_option_of_every_row(name):
    space = SPACES[name]()
    chosen = space.sample()
    mixture = {name: 0.6 * weights + 0.4 / weights.shape[-1] for name, weights in space.one_hot(chosen).items()}
    result = derive(space, mixture, method="argmax")
    assert result.architecture == chosen and result.cost == space.cost(chosen)
    (row,) = result.candidates
    assert row["digest"] == chosen.digest and row["architecture"] == str(chosen)
    assert (row["params"], row["flops"]) == (result.cost.params, result.cost.flops)


def test_random_gives_distinct_architectures_best_first():
    space = vit()
    result = derive(space, method="random", candidates=12)
    accuracies = [row["accuracy"] for row in result.candidates]
    assert accuracies == sorted(accuracies, reverse=True) and len(set(accuracies)) > 1
    assert len({row["digest"] for row in result.candidates}) == 12
    assert result.architecture.digest == result.candidates[0]["digest"]
    data = random_data(space, SPLITS, samples=40)
    space.eval().select(result.architecture)
    assert accuracies[0] == measure(space, data.architecture).accuracy
    assert result.validation_accuracy == measure(space, data.validation).accuracy


def test_random_tries_no_more_than_there_are(capsys):
    space = vit(depth=(1,), num_heads=(1, 3), mlp_ratio=(2,))
    assert space.size == 4
    result = derive(space, method="random", candidates=50, progress=ConsoleProgress(every=0))
    assert len(result.candidates) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"] and "best" in lines[-1]


def test_random_reaches_every_architecture():
    space = vit(depth=(1, 2), num_heads=(1, 3), mlp_ratio=(2,))
    assert len(derive(space, method="random", candidates=space.size).candidates) == space.size == 2 * (2 + 4)


class Noisy(Convolutional):
    """Batch norms behind a dropout."""

    def __init__(self):
        super().__init__()
        self.colours.append(nn.Dropout(0.3))


@pytest.mark.parametrize("make", [Noisy, vit])
def test_equal_seeds_derive_the_same_and_leave_global_generators_alone(make):
    torch.manual_seed(0)
    space = make()
    results = []
    for seed in (1, 1, 2):
        torch.rand(1), random.random()
        before = torch.get_rng_state()
        results.append(derive(space, method="random", candidates=5, seed=seed))
        assert before.equal(torch.get_rng_state())
    assert results[0] == results[1] != results[2]


# Budgets


def within(cost, budget):
    return all(limit is None or getattr(cost, metric) <= limit for metric, limit in budget.items())


@pytest.mark.parametrize("name", ["convolutional", "vit"])
def test_projection_meets_any_budget_and_is_about_the_most_probable_within_it(name):
    torch.manual_seed(0)
    space = SPACES[name]() if name == "convolutional" else vit(depth=(1, 2, 3))
    everything = costs(space)
    exact, gaps = 0, []
    for trial in range(24):
        mixture = random_mixture(space, scale=(0.5, 2)[trial % 2])
        logs = {count: stack.log().tolist() for count, stack in mixture.stacks.items()}

        def regret(picks, logs=logs):
            """How much less probable than the argmax, over the rows in use."""
            rows = [(logs[len(row.options)][row.slot], pick) for row, pick in picks.items() if row.active(picks)]
            return sum(max(row) - row[pick] for row, pick in rows)

        budget = {"params": None, "flops": None}
        for metric in (("params",), ("flops",), ("params", "flops"))[trial % 3]:
            values = [getattr(cost, metric) for _, cost in everything]
            budget[metric] = int(min(values) + float(torch.rand(())) ** 2 * (max(values) - min(values)))
        found = project(space, mixture, budget)
        assert within(space.cost(found), budget), budget
        best = min(regret(picks) for picks, cost in everything if within(cost, budget))
        gaps.append(regret(space.assignment_of(found)) - best)
    assert all(gap > -1e-4 for gap in gaps)
    exact = sum(gap < 1e-4 for gap in gaps)
    assert exact >= 22 and max(gaps) < 1.5, gaps


@pytest.mark.parametrize("name", SPACES)
def test_projection_meets_the_tightest_budgets_there_are(name):
    space = SPACES[name]()
    smallest = space.cost(space.smallest())
    tight = {"params": smallest.params, "flops": smallest.flops}
    assert space.cost(project(space, space.one_hot(space.largest()), tight)) == smallest
    for metric, limit in tight.items():
        cost = space.cost(project(space, random_mixture(space), {metric: limit}))
        assert getattr(cost, metric) == limit


def test_a_budget_that_binds_nothing_changes_nothing():
    space = vit()
    mixture = random_mixture(space)
    largest = space.cost(space.largest())
    free = project(space, mixture, {"params": None, "flops": None})
    assert project(space, mixture, {"params": largest.params, "flops": largest.flops}) == free


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_random_candidates_keep_to_the_budget(share):
    space = Convolutional()
    low, high = space.cost(space.smallest()), space.cost(space.largest())
    params = int(low.params + share * (high.params - low.params))
    flops = int(low.flops + (share + 0.1) * (high.flops - low.flops))
    result = derive(space, method="random", candidates=10, max_params=params, max_flops=flops)
    assert all(row["params"] <= params and row["flops"] <= flops for row in result.candidates)
    assert len({row["digest"] for row in result.candidates}) == len(result.candidates)
    possible = sum(cost.params <= params and cost.flops <= flops for _, cost in costs(space))
    assert len(result.candidates) == 10 if possible > 40 else len(result.candidates) <= possible


def test_argmax_keeps_to_the_budget():
    space = vit()
    limit = (space.cost(space.smallest()).params + space.cost(space.largest()).params) // 2
    mixture = space.one_hot(space.largest())
    assert derive(space, mixture).cost.params > limit
    assert derive(space, mixture, max_params=limit).cost.params <= limit


@pytest.mark.parametrize("metric", ["params", "flops"])
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_nothing_meets_is_refused(method, metric):
    space = vit()
    space.name = "thumbnail"
    least = getattr(space.cost(space.smallest()), metric)
    with pytest.raises(TangleNASError) as caught:
        derive(space, random_mixture(space), method=method, **{f"max_{metric}": least - 1})
    assert f"no architecture of 'thumbnail' has at most {least - 1:,} {metric}" in str(caught.value)
    assert f"the smallest has {least:,}. Raise max_{metric}" in str(caught.value)
    check_budget(space, {metric: least})


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "argmin"}, "unknown discretize.method 'argmin'. Did you mean 'argmax'? Choose one of: argmax, "),
        ({"derivation": "evolve"}, "unknown discretize.method 'evolve'"),
        ({"candidates": 0}, "discretize.candidates is 0, expected a whole number of at least 1"),
        ({"recalibration_batches": -1}, "discretize.recalibration_batches is -1, expected a whole number"),
        ({"max_params": 0}, "max_params is 0, expected a whole number of at least 1"),
        ({"max_flops": 1e9}, "max_flops is 1000000000.0, expected a whole number"),
        ({"batch_size": 0}, "batch size 0: give at least 1"),
        ({"device": "tpu"}, "device 'tpu' cannot be used"),
        ({}, "'argmax' needs the mixture of a gradient search, and the search has none: use method 'random'"),
        ({"mixture": {}}, "'argmax' needs the mixture of a gradient search"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options, message):
    with pytest.raises(TangleNASError) as caught:
        derive(vit(), **options)
    assert message in str(caught.value)


def test_a_mixture_of_another_space():
    with pytest.raises(TangleNASError, match="the mixture's 'embed_dim' has shape None, expected"):
        derive(vit(), {"depth": torch.ones(3) / 3})
    with pytest.raises(TangleNASError, match="unknown choice"):
        derive(vit(), {"width": torch.ones(1)})


# Batch norms


def test_every_candidate_is_judged_with_statistics_of_its_own():
    torch.manual_seed(0)
    space = Convolutional()
    for buffer in space.buffers():
        buffer.add_(3)  # a supernet whose statistics fit no path
    data = random_data(space, SPLITS, samples=64)
    result = discretize(
        space, data, None, method="random", candidates=8, batch_size=16, recalibration_batches=3, seed=5
    )
    statistics = random_inputs(data.weights, 16, 3, seed=5, device=CPU)
    by_text = {str(a): a for a in (space.architecture_of(picks) for picks, _ in costs(space))}
    accuracies = set()
    for row in result.candidates:
        network = space.extract(by_text[row["architecture"]])
        recalibrate(network, statistics)
        assert measure(network, data.architecture, 16).accuracy == row["accuracy"]
        accuracies.add(row["accuracy"])
    assert len(accuracies) > 1
    network = space.extract(result.architecture)
    recalibrate(network, statistics)
    assert measure(network, data.validation, 16).accuracy == result.validation_accuracy


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_supernet_is_left_as_it_was(method, training):
    torch.manual_seed(0)
    space = Convolutional()
    space(space.example_input(8))  # statistics that are not the initial ones
    space.train(training)
    before = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    first = derive(space, random_mixture(space), method=method, candidates=3)
    same({**space.state_dict()}, before, "the supernet")
    assert space.training == training and space.superposition.assignment is None
    if method == "random":
        assert derive(space, method=method, candidates=3) == first


def test_the_supernet_is_left_as_it_was_even_by_an_error():
    class Broken(TensorSamples):
        def batch(self, indices):
            raise RuntimeError("the disk is gone")

    space = Convolutional()
    data = random_data(space, SPLITS)
    before = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    view = DataView(
        {"weights": data.weights, "validation": data.validation, "architecture": Broken(torch.ones(3), torch.ones(3))}
    )
    with pytest.raises(RuntimeError, match="the disk is gone"):
        discretize(space, view, None, method="random", candidates=1)
    same({**space.state_dict()}, before, "the supernet")
    assert space.superposition.assignment is None


def test_recalibration_can_be_off():
    torch.manual_seed(0)
    space = Convolutional()
    for _ in range(20):
        space(space.example_input(8))
    result = derive(space, random_mixture(space), method="argmax", recalibration_batches=0)
    data = random_data(space, SPLITS, samples=40)
    assert result.validation_accuracy == measure(space.extract(result.architecture), data.validation).accuracy
