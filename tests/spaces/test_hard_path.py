"""Real slices whose weights keep their gradient: what a hard, straight-through sample computes (gdas)."""

import pytest
import torch
from tiny import DISTINCT, example, tiny

from tanglenas_engine.superposition.mixture import COVERED

SIZES_ONLY = [
    name for name in DISTINCT if not any(isinstance(o, str) for c in example(name).choices.values() for o in c.options)
]


def leaves(space, architecture):
    """One-hot weights that ask for a gradient, and the mixture of them."""
    stacks = {count: stack.clone().requires_grad_() for count, stack in space.one_hot(architecture).stacks.items()}
    return list(stacks.values()), space.mixture(stacks)


def forward(space):
    torch.manual_seed(0)
    example = space.example_input(4)
    return space(example.double() if example.is_floating_point() else example)


@pytest.mark.parametrize("relaxation", COVERED)
@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.part(3)
def test_the_hard_path_of_a_mixture_computes_the_architecture(name, relaxation):
    space = tiny(name, relaxation=relaxation).double().eval()
    architecture = space.sample(torch.Generator().manual_seed(1))
    weights, mixture = leaves(space, architecture)
    outputs = forward(space.select(mixture))
    torch.testing.assert_close(outputs, forward(space.select(architecture)))
    gradients = torch.autograd.grad(outputs.square().sum(), weights, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert any(g is not None and g.any() for g in gradients)


@pytest.mark.parametrize("relaxation", COVERED)
@pytest.mark.parametrize("name", SIZES_ONLY)
def test_where_everything_is_used_the_hard_path_has_the_gradient_of_the_soft_one(name, relaxation):
    space = tiny(name, relaxation=relaxation).double().eval()
    weights, mixture = leaves(space, space.largest())
    gradients = []
    for enter in (space.relax, space.select):
        enter(mixture)
        loss = forward(space).square().sum()
        gradients.append(torch.autograd.grad(loss, weights, retain_graph=True))
    for soft, hard in zip(*gradients, strict=True):
        assert soft.any()
        torch.testing.assert_close(hard, soft)


def test_an_operation_speaks_for_itself_and_not_for_those_that_were_not_computed():
    space = tiny("nb201").double().train()
    architecture = space.sample(torch.Generator().manual_seed(3))
    weights, mixture = leaves(space, architecture)
    (gradient,) = torch.autograd.grad(forward(space.select(mixture)).square().sum(), weights)
    (chosen,) = (stack.bool() for stack in space.one_hot(architecture).stacks.values())
    entangled = [name in ("nor_conv_1x1", "nor_conv_3x3") for name in next(iter(space.choices.values())).options]
    silent = ~chosen & ~torch.tensor(entangled)
    assert not gradient[silent].any()
    assert gradient[chosen].any()


def test_without_a_gradient_the_hard_path_is_that_of_the_architecture_alone():
    space = tiny("vit")
    architecture = space.sample()
    space.select(space.one_hot(architecture))
    assert space.superposition.mixture is None
    assert space.superposition.assignment == space.assignment_of(architecture)
