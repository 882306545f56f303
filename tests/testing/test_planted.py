"""Planted truths: they are true, and every optimizer finds what it promises."""

import itertools

import pytest
import torch

from tanglenas_engine import create_optimizer
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import manager
from tanglenas_engine.testing import TRUTHS, check_finds, check_space, find
from tanglenas_engine.training.measure import estimate_loss
from tanglenas_sampling.spos import SPOS

NOT_PROMISED = {}


def alone(truth, architecture, seed):
    """Train one architecture from scratch, and return its loss on the architecture split."""
    torch.manual_seed(seed)
    space, data = truth.make_space(), truth.data(seed)
    optimizer = torch.optim.AdamW(space.parameters(), lr=3e-2, weight_decay=0.0)
    for _ in range(60):
        inputs, targets = data.weights.batch(torch.randint(len(data.weights), (32,)))
        outputs = space.select(architecture).train()(inputs)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten()).backward()
        optimizer.step()
    return estimate_loss(space.eval(), data.architecture).mean


@pytest.mark.parametrize("name", TRUTHS)
def test_what_is_planted_is_best(name):
    truth = TRUTHS[name]
    space = truth.make_space()
    assignments = ({r: o for part in parts for r, o in part.items()} for parts in itertools.product(*space.decisions()))
    # One architecture for each combination of the choices that matter, to save time.
    every = {}
    for one in map(space.architecture_of, assignments):
        if truth.fits(space, one):
            every.setdefault(str([one.choices[choice] for choice in truth.best]), one)
    losses = {str(one): alone(truth, one, seed=1) for one in every.values()}
    (best,) = (str(one) for one in every.values() if truth.is_best(one))
    assert len(losses) > 1
    assert losses[best] < 0.9 * min(loss for one, loss in losses.items() if one != best), losses


@pytest.mark.parametrize("name", ["kernel_small", "width_small", "bottleneck", "depth_small"])
def test_the_spaces_keep_the_contract(name):
    torch.manual_seed(0)
    check_space(TRUTHS[name].make_space)


@pytest.mark.parametrize("optimizer", manager().names("optimizer"))
def test_every_optimizer_finds_what_it_promises(optimizer):
    promised = [name for name in TRUTHS if name not in NOT_PROMISED.get(optimizer, ())]
    check_finds(lambda: create_optimizer(optimizer), promised)


class Stubborn(SPOS):
    """Trains the smallest architecture in every step."""

    def sample(self, step, stream):
        return self.source.smallest()


def test_an_optimizer_that_does_not_find_is_told_what_it_missed():
    with pytest.raises(AssertionError) as caught:
        check_finds(Stubborn, ["depth_small", "depth_large"])
    assert "1 of 2 planted truths were not found: depth_large (the signal arrives after" in str(caught.value)
    assert "best is {'depth': 3}, random took depth=" in str(caught.value)


def test_a_truth_that_is_unknown_is_refused():
    with pytest.raises(TangleNASError, match="unknown planted truth 'kernel_larg'"):
        find(SPOS(), "kernel_larg")
