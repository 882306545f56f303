"""Second-order DARTS: its hypergradient against a numerical one, and no traces."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny

from tanglenas_engine import create_optimizer
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.optimizers.optimizer import Step
from tanglenas_engine.testing import random_data
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.optim import parameter_groups
from tanglenas_gradient.darts2 import SecondOrderDARTS, _moved

RATE, DECAY, MOMENTUM = 0.05, 0.01, 0.9


def setting(name, dtype=torch.float64, **options):
    """An optimizer on a tiny space, and a step whose weight optimizer has taken one before."""
    space = tiny(name).to(dtype).train()
    optimizer = SecondOrderDARTS(**{"weight_decay": 0.0, **options})
    optimizer.bind(space, 0)
    data = random_data(space, ("weights", "architecture"))
    batches = [
        tuple(t.to(dtype) if t.is_floating_point() else t for t in samples.batch(torch.arange(8)))
        for samples in (data.weights, data.architecture)
    ]
    sgd = torch.optim.SGD(parameter_groups(space), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    step = Step(3, space, cross_entropy, *batches, sgd)
    for term in optimizer.weight_losses(step):
        torch.autograd.backward(term)
    sgd.step()
    sgd.zero_grad()
    return optimizer, step


def loss_after_a_step(optimizer, step):
    """L_val(w - rate * (dL_train/dw + decay * w + momentum * velocity), alpha), written down anew."""
    space = step.space
    state = {name: value.clone() for name, value in space.state_dict().items()}
    space.relax(optimizer.expected().detach())
    parameters = list(space.parameters())
    slopes = torch.autograd.grad(step.loss(space(step.weight_batch[0]), step.weight_batch[1]), parameters)
    decayed = {id(p) for p in step.weight_optimizer.param_groups[0]["params"]}
    with torch.no_grad():
        for p, slope in zip(parameters, slopes, strict=True):
            velocity = step.weight_optimizer.state[p]["momentum_buffer"]
            p -= RATE * (slope + (DECAY if id(p) in decayed else 0.0) * p + MOMENTUM * velocity)
        value = float(step.loss(space(step.architecture_batch[0]), step.architecture_batch[1]))
        space.load_state_dict(state)
    return value


@pytest.mark.parametrize("name", ["vit_relative", "convolutional", "language", "nb201"])
def test_both_hypergradients_are_the_numerical_one(name):
    found = {}
    for way, options in (("autograd", {"hypergradient": "autograd"}), ("differences", {"radius": 1e-5})):
        torch.manual_seed(0)
        optimizer, step = setting(name, **options)
        optimizer.architecture_backward(step)
        found[way] = {count: alpha.grad for count, alpha in optimizer.alphas.items()}
    for count, alpha in optimizer.alphas.items():
        wanted = torch.zeros_like(alpha)
        for index in range(alpha.numel()):
            ends = []
            for change in (1e-5, -2e-5):
                alpha.data.view(-1)[index] += change
                ends.append(loss_after_a_step(optimizer, step))
            alpha.data.view(-1)[index] += 1e-5
            wanted.view(-1)[index] = (ends[0] - ends[1]) / 2e-5
        for way, tolerance in (("autograd", 1e-8), ("differences", 1e-6)):
            torch.testing.assert_close(
                found[way][count], wanted, rtol=1e-5, atol=tolerance, msg=lambda text, way=way: f"{way}: {text}"
            )


@pytest.mark.parametrize("hypergradient", ["autograd", "finite_differences"])
def test_gradients_that_float16_cannot_hold_are_scaled(hypergradient):
    def small(outputs, targets):
        return 1e-5 * cross_entropy(outputs, targets)

    found = {}
    for half in (False, True):
        torch.manual_seed(0)
        optimizer, step = setting("vit_relative", torch.float32, hypergradient=hypergradient)
        step = replace(step, loss=small, scale=torch.tensor(2.0**17))
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = optimizer.architecture_backward(step)
        found[half] = loss, torch.cat([alpha.grad.flatten() for alpha in optimizer.parameters()])
    torch.testing.assert_close(found[True][0], found[False][0], rtol=0.01, atol=0)
    assert (found[True][1] - found[False][1]).norm() < 0.02 * found[False][1].norm()


def test_it_is_not_the_first_order_gradient():
    optimizer, step = setting("vit", hypergradient="autograd")
    optimizer.architecture_backward(step)
    second = {count: alpha.grad.clone() for count, alpha in optimizer.alphas.items()}
    for group in step.weight_optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.architecture_backward(step)
    difference = max(float((second[c] - a.grad).abs().max()) for c, a in optimizer.alphas.items())
    assert difference > 1e-4
    first = create_optimizer("darts", weight_decay=0.0)
    first.bind(step.space, 0)
    first.architecture_backward(step)
    for count, alpha in optimizer.alphas.items():
        torch.testing.assert_close(alpha.grad, first.alphas[count].grad)


@pytest.mark.parametrize("hypergradient", ["autograd", "finite_differences"])
def test_a_step_that_is_tried_out_leaves_no_trace(hypergradient):
    optimizer, step = setting("convolutional", hypergradient=hypergradient)
    before = {name: value.clone() for name, value in step.space.state_dict().items()}
    generator = torch.get_rng_state()
    optimizer.architecture_backward(step)
    assert generator.equal(torch.get_rng_state())
    assert all(value.equal(before[name]) for name, value in step.space.state_dict().items())
    assert all(parameter.grad is None for parameter in step.space.parameters())


def test_the_regularizer_is_added():
    optimizer, step = setting("vit")
    optimizer.architecture_backward(step)
    plain = {count: alpha.grad.clone() for count, alpha in optimizer.alphas.items()}
    optimizer.weight_decay = 0.5
    optimizer.architecture_backward(step)
    for count, alpha in optimizer.alphas.items():
        torch.testing.assert_close(alpha.grad, plain[count] + 0.5 * alpha.detach())


def test_options_that_cannot_be():
    with pytest.raises(TangleNASError, match="unknown hypergradient of darts2 'exact'"):
        create_optimizer("darts2", hypergradient="exact")
    with pytest.raises(TangleNASError, match="radius is 0, expected a positive number"):
        create_optimizer("darts2", radius=0)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("options", [{"nesterov": True}, {"dampening": 0.5}, {}], ids=str)
def test_the_step_is_that_of_sgd(options, steps):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=MOMENTUM, weight_decay=DECAY, **options)
    slopes = [torch.tensor([0.5, 1.0]), torch.tensor([-1.0, 0.25]), torch.tensor([2.0, 0.1])]
    for slope in slopes[:steps]:
        weight.grad = slope.clone()
        sgd.step()
    (moved,) = _moved(sgd, {"weight": weight}, slopes[steps:][:1]).values()
    weight.grad = slopes[steps].clone()
    sgd.step()
    assert torch.allclose(moved, weight, atol=1e-6)


@pytest.mark.parametrize("hypergradient", ["autograd", "finite_differences"])
def test_weights_that_need_no_gradient_or_are_left_out_stay(hypergradient):
    optimizer, step = setting("vit", hypergradient=hypergradient)
    optimizer.architecture_backward(step)
    expected = [alpha.grad.clone() for alpha in optimizer.parameters()]
    frozen = next(iter(step.space.parameters()))
    step.space.register_parameter("unused", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    optimizer.architecture_backward(step)
    for alpha, value in zip(optimizer.parameters(), expected, strict=True):
        assert torch.allclose(alpha.grad, value, rtol=1e-5)
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer.architecture_backward(step)
    assert torch.equal(frozen, before)
