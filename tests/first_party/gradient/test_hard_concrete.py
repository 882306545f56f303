"""Gates at 0 and 1 between nested options."""

import math

import pytest
import torch
from tiny import tiny

from tanglenas_engine import create_optimizer
from tanglenas_engine.errors import TangleNASError

LOGITS = torch.tensor([0.3, -0.5, 1.1])


def bound(**options):
    """An optimizer whose rows of three options have the logits above."""
    optimizer = create_optimizer("hard_concrete", **options)
    optimizer.bind(tiny("vit", num_heads=(1, 2, 3)), 0)
    optimizer.alphas[3].data.copy_(LOGITS.expand_as(optimizer.alphas[3]))
    return optimizer


def rows(optimizer, count=1200):
    return torch.cat([optimizer.sample(step, "weights").stacks[3].detach() for step in range(count)])


@pytest.mark.slow
def test_samples_are_mixtures_and_often_at_a_corner():
    drawn = rows(bound())
    assert (drawn >= 0).all()
    torch.testing.assert_close(drawn.sum(1), torch.ones(len(drawn)))
    assert float((drawn.amax(1) == 1).float().mean()) > 0.2
    # A gate of even odds is at 0 or 1 in a third of its samples: if s is below 1/12 or above 11/12.
    even = bound()
    even.alphas[3].data.copy_(torch.tensor([0.0, 0.0, -30.0]).expand_as(even.alphas[3]))  # the first gate alone is open
    assert float((rows(even).amax(1) == 1).float().mean()) == pytest.approx(0.336, abs=0.03)
    assert float((rows(bound(temperature=0.1)).amax(1) == 1).float().mean()) > 0.8


@pytest.mark.slow
def test_cold_samples_have_the_frequencies_of_the_mixture_that_alpha_stands_for():
    optimizer = bound(temperature=0.01)
    wanted = LOGITS.softmax(0)
    torch.testing.assert_close(optimizer.expected().stacks[3][0].detach(), wanted)
    torch.testing.assert_close(rows(optimizer).mean(0), wanted, atol=0.04, rtol=0)


def test_alpha_learns_by_the_gates_that_are_neither_0_nor_1():
    optimizer = bound()
    total = sum((optimizer.sample(step, "weights").stacks[3] * torch.arange(3.0)).sum() for step in range(50))
    (gradient,) = torch.autograd.grad(total, [optimizer.alphas[3]])
    assert (gradient[:, 0] < 0).all() and (gradient[:, 2] > 0).all()


@pytest.mark.parametrize(
    "ends", [{"low": 0.0}, {"high": 1.0}, {"low": float("nan")}, {"low": -math.inf}, {"high": math.inf}]
)
def test_ends_that_clamp_nothing_are_refused(ends):
    with pytest.raises(TangleNASError, match="expected a low below 0 and a high above 1"):
        create_optimizer("hard_concrete", **ends)
