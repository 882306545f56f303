"""GDAS: what it samples, and that alpha learns from it."""

import pytest
import torch
from scipy.stats import chisquare, kstest, logistic
from tiny import tiny

from tanglenas_engine import create_optimizer, create_space
from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_gradient.gdas import GDAS, gumbel_given


def bound(space, seed=0, **options):
    optimizer = GDAS(**options)
    optimizer.bind(space, seed)
    return optimizer


@pytest.mark.slow
def test_samples_are_one_hot_and_as_frequent_as_the_softmax_says():
    space = tiny("vit", num_heads=(1, 2, 3))
    optimizer = bound(space)
    rows = torch.tensor([2.0, 0.5, -1.0]).expand_as(optimizer.alphas[3]).clone()
    optimizer.alphas[3].data = rows
    counts = torch.zeros(3)
    for step in range(2000):
        (stack,) = (s for k, s in optimizer.sample(step, "weight").stacks.items() if k == 3)
        assert set(stack.detach().unique().tolist()) == {0.0, 1.0}
        counts += stack.detach()[0]
    expected = 2000 * rows[0].softmax(0)
    assert chisquare(counts, expected).pvalue > 0.01


def test_the_gradient_is_that_of_the_soft_sample():
    space = tiny("vit").double()
    optimizer = bound(space, temperature=2.0)
    weights = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    alpha = optimizer.alphas[3]
    (found,) = torch.autograd.grad((weights * optimizer.sample(5, "weight").stacks[3]).sum(), alpha)
    generator = torch.Generator().manual_seed(optimizer.derive_seed(5, "weight"))
    for count, other in optimizer.alphas.items():  # the noise of the stacks comes one after the other
        noise = -torch.empty_like(other).exponential_(generator=generator).log()
        if count == 3:
            soft = ((alpha.log_softmax(1) + noise) / 2.0).softmax(1)
    (wanted,) = torch.autograd.grad((weights * soft).sum(), alpha)
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().max() > 1e-3


def test_noise_given_a_sample_is_the_noise_that_draws_it():
    alpha = torch.tensor([[1.0, -0.5, 0.2]], dtype=torch.float64).expand(40_000, 3)
    chances, generator = alpha.softmax(1), torch.Generator().manual_seed(1)
    picks = torch.multinomial(chances, 1, generator=generator)[:, 0]
    hard = torch.nn.functional.one_hot(picks, 3).double()
    sums = chances.log() + gumbel_given(alpha, hard, generator)
    assert sums.argmax(1).equal(picks)
    # Over all samples, noise is unconditional. The difference of two Gumbel variables has a logistic distribution.
    for k, j in ((0, 1), (1, 2), (0, 2)):
        shift = float((chances[0, k] / chances[0, j]).log())
        assert kstest((sums[:, k] - sums[:, j]).numpy(), logistic(loc=shift).cdf).pvalue > 0.01


def test_samples_of_a_search_with_a_target_are_in_its_band():
    space = tiny("vit")
    most = int(0.7 * space.cost(space.largest()).macs)
    band = Band(Budget(space, {"macs": most}), 0.5)
    optimizer = bound(space)
    optimizer.draw_from(band)
    for step in range(50):
        sampled = optimizer.sample(step, "architecture")
        assert band.holds(space.most_probable(sampled))
        (gradient,) = torch.autograd.grad(sampled.stacks[2][:, 0].sum(), optimizer.alphas[2])
        assert gradient.any()


@pytest.mark.parametrize("gap", [100.0, 110.0, 1e4, 1e30])
def test_gradients_within_a_band_are_finite_however_decided_alpha_is(gap):
    space = tiny("vit")
    most = int(0.7 * space.cost(space.largest()).macs)
    optimizer = bound(space, temperature=1.0)
    optimizer.draw_from(Band(Budget(space, {"macs": most}), 0.5))
    for alpha in optimizer.alphas.values():
        alpha.data.zero_()[:, 0] = -gap
    for step in range(10):
        stacks = optimizer.sample(step, "architecture").stacks
        total = sum((stack * torch.arange(stack.shape[1])).sum() for stack in stacks.values())
        gradients = torch.autograd.grad(total, optimizer.parameters())
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert all(set(stack.detach().unique().tolist()) == {0.0, 1.0} for stack in stacks.values())


def test_it_computes_with_real_slices_in_both_steps():
    space = tiny("vit")
    optimizer = bound(space)
    widths = set()
    hook = space.norm.register_forward_hook(lambda module, inputs, output: widths.add(output.shape[-1]))
    for step in range(20):
        optimizer.enter(optimizer.sample(step, "architecture"))
        space(space.example_input(2))
    hook.remove()
    assert widths == set(space.choices["embed_dim"].options)


def test_the_temperature_falls_linearly_and_sharpens_the_gradient():
    optimizer = GDAS(temperature=10.0, final_temperature=0.1)
    seen = []
    for fraction in (0.0, 0.5, 1.0):
        optimizer.set_progress(fraction)
        seen.append(optimizer.temperature)
    assert seen == pytest.approx([10.0, 5.05, 0.1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight_decay": -5.0}, "weight_decay is -5.0, expected a number of at least 0"),
        ({"weight_decay": "1"}, "weight_decay is '1', expected a number of at least 0"),
        ({"temperature": 0}, "temperature is 0, expected a positive number"),
        ({"final_temperature": -1}, "final_temperature is -1, expected a positive number"),
        ({"temperature": 0.1, "final_temperature": 10.0}, "would rise from 0.1 to 10.0"),
    ],
)
def test_temperatures_that_cannot_be(options, message):
    with pytest.raises(TangleNASError, match=message):
        create_optimizer("gdas", **options)


def mean_gradient(**options) -> float:
    """Of the loss by the weight of what was sampled, in the toy cell at its initialisation."""
    torch.manual_seed(0)
    space = create_space("toy_cell", channels=8, **options).train()
    optimizer = bound(space)
    inputs, targets = space.example_input(16), torch.randint(10, (16,))
    gradients = []
    for step in range(12):
        stack = optimizer.sample(step, "architecture").stacks[4].detach().requires_grad_()
        optimizer.enter(space.mixture({4: stack}))
        (gradient,) = torch.autograd.grad(cross_entropy(space(inputs), targets), stack)
        gradients.append(gradient[stack.bool()].abs().mean())
    return float(torch.stack(gradients).mean())


@pytest.mark.slow
def test_alpha_learns_behind_a_batch_norm():
    separate, superposed = mean_gradient(sharing="separate"), mean_gradient()
    assert 1 / 3 < superposed / separate < 3
    # The published form scales the kernel in front of the batch norm, which removes the scale.
    assert mean_gradient(relaxation="paper") < 0.01 * superposed
