"""The sandwich rule: which networks a step trains, and from what they learn."""

import itertools
from functools import partial

import pytest
import torch
from tiny import tiny

from tanglenas_engine import search
from tanglenas_engine.data import IGNORED
from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.optimizers.optimizer import Step
from tanglenas_engine.testing import random_data, same
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.optim import parameter_groups
from tanglenas_sampling.sandwich import Sandwich


def setting(name="vit", **options):
    space = tiny(name).double().train()
    optimizer = Sandwich(**options)
    optimizer.bind(space, 0)
    inputs, targets = random_data(space, ("weights",)).weights.batch(torch.arange(8))
    sgd = torch.optim.SGD(parameter_groups(space), lr=0.1)
    return optimizer, Step(0, space, cross_entropy, (inputs.double(), targets), None, sgd)


def test_a_step_trains_the_largest_the_smallest_and_random_ones(monkeypatch):
    optimizer, step = setting(random=3)
    entered = []
    enter = optimizer.enter
    monkeypatch.setattr(optimizer, "enter", lambda architecture: (entered.append(architecture), enter(architecture)))
    assert len(list(optimizer.weight_losses(step))) == 5
    assert entered[:2] == [step.space.largest(), step.space.smallest()]
    assert len({architecture.digest for architecture in entered}) == 5


def test_within_a_band_the_largest_network_of_the_space_teaches_networks_of_the_band(monkeypatch):
    optimizer, step = setting(random=2)
    space, entered = step.space, []
    band = Band(Budget(space, {"macs": 0.6 * space.cost(space.largest()).macs}), 0.7)
    optimizer.draw_from(band)
    enter = optimizer.enter
    monkeypatch.setattr(optimizer, "enter", lambda architecture: (entered.append(architecture), enter(architecture)))
    for step.index in range(4):
        assert len(list(optimizer.weight_losses(step))) == 4
    assert entered[::4] == 4 * [space.largest()]
    drawn = [one for number, one in enumerate(entered) if number % 4]
    assert all(band.holds(one) for one in drawn) and len({one.digest for one in drawn}) > 4


def test_smaller_networks_learn_from_the_largest_and_it_from_the_labels():
    optimizer, step = setting(random=0, distillation=1)
    largest, smallest = optimizer.weight_losses(step)
    inputs, targets = step.weight_batch
    teacher = step.space.select(step.space.largest())(inputs)
    student = step.space.select(step.space.smallest())(inputs)
    torch.testing.assert_close(largest, cross_entropy(teacher, targets))
    wanted = torch.nn.functional.cross_entropy(student, teacher.detach().softmax(-1))
    torch.testing.assert_close(smallest, wanted)
    assert step.outputs.equal(teacher) and not step.outputs.requires_grad
    parameters = list(step.space.parameters())
    got = torch.autograd.grad(smallest, parameters, allow_unused=True)
    right = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for one, other in zip(got, right, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_a_share_of_the_loss_is_that_of_the_labels():
    losses = {share: [loss.item() for loss in both(share)] for share in (0, 0.25, 1)}
    assert losses[0][0] == losses[0.25][0] == losses[1][0]
    assert losses[0.25][1] == pytest.approx(0.75 * losses[0][1] + 0.25 * losses[1][1])
    assert losses[0][1] != pytest.approx(losses[1][1])
    with pytest.raises(TangleNASError, match="distillation is 2, expected a share from 0"):
        Sandwich(distillation=2)


def both(share):
    torch.manual_seed(0)
    optimizer, step = setting(random=0, distillation=share)
    return optimizer.weight_losses(step)


def test_a_search_reports_the_loss_of_the_largest_network():
    space = tiny("vit")
    data = random_data(space, ("weights", "architecture", "validation"))
    result = search(space, Sandwich(), data, epochs=1, batch_size=4, weight_optimizer=partial(torch.optim.SGD, lr=0.0))
    inputs, targets = data.weights.batch(torch.arange(len(data.weights)))
    with torch.no_grad():
        loss = cross_entropy(space.select(space.largest()).train()(inputs), targets)
    assert result.history[0]["weight_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_smaller_networks_that_overflow_are_told_though_the_largest_does_not():
    space = tiny("vit")
    data = random_data(space, ("weights", "architecture", "validation"))
    calls = itertools.count()

    def loss(outputs, targets):  # of the largest network in every fourth call
        return cross_entropy(outputs, targets) * (1 if next(calls) % 4 == 0 else float("inf"))

    with pytest.raises(TangleNASError, match="weight_loss is not finite by step 1 of"):
        search(space, Sandwich(), data, epochs=1, batch_size=4, loss=loss, precision="float32", clip=None)


def test_distillation_can_be_turned_off():
    optimizer, step = setting(random=0, distillation=0)
    _, smallest = optimizer.weight_losses(step)
    inputs, targets = step.weight_batch
    student = step.space.select(step.space.smallest())(inputs)
    torch.testing.assert_close(smallest, cross_entropy(student, targets))


def test_text_is_distilled_token_by_token_where_a_token_has_a_target():
    space = tiny("language").double().train()
    optimizer = Sandwich(random=0, distillation=1)
    optimizer.bind(space, 0)
    batch = random_data(space, ("weights",)).weights.batch(torch.arange(4))
    batch[1][0], batch[1][1:, 2:] = IGNORED, IGNORED
    step = Step(0, space, cross_entropy, batch, None, torch.optim.SGD(parameter_groups(space), lr=0.1))
    _, smallest = optimizer.weight_losses(step)
    teacher = space.select(space.largest())(batch[0]).softmax(-1)
    student = space.select(space.smallest())(batch[0]).log_softmax(-1)
    torch.testing.assert_close(smallest, -(teacher * student).sum(-1)[batch[1] != IGNORED].mean())


def test_samples_without_targets_are_not_distilled():
    space = tiny("vit")
    data = random_data(space, ("weights", "architecture", "validation"))
    data.weights.labels.fill_(IGNORED)
    before = {name: weight.clone() for name, weight in space.state_dict().items()}
    search(space, Sandwich(), data, epochs=1, batch_size=4, weight_optimizer=partial(torch.optim.SGD, lr=0.1))
    same({**space.state_dict()}, before, "the supernet")


def test_a_negative_number_of_networks_is_refused():
    with pytest.raises(TangleNASError, match="random is -1, expected a whole number of at least 0"):
        Sandwich(random=-1)
