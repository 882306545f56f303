"""Searches on a GPU: the numbers of a CPU to rounding, no step that waits for the device, little memory."""

import pytest
import torch
from spaces import random_mixture

from benchmarks.host import watched
from benchmarks.search_step import Bench
from tanglenas_engine import create_space
from tanglenas_engine.elastic.norm import weighted_layer_norm
from tanglenas_engine.stages.retrain import Retraining, retrain
from tanglenas_engine.testing import random_data
from tanglenas_engine.training.options import Computation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]

NAMES = ["gpt_nano", "autoformer_nano", "mobilenetv3_nano", "toy_conv_macro_nano", "nb201_nano"]


@pytest.fixture(autouse=True)
def products_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("relaxation", ["exact", "gated", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_mixtures_and_their_gradients_are_those_of_a_cpu(name, relaxation):
    space = create_space(name, relaxation=relaxation).eval()
    alphas, _ = random_mixture(space)
    space, x = space.float(), space.example_input(2)
    outcomes = []
    for device in ("cpu", "cuda"):
        space.to(device)
        leaves = [alpha.detach().float().to(device).requires_grad_() for alpha in alphas.values()]
        space.relax(space.mixture({n: leaf.softmax(-1) for n, leaf in zip(alphas, leaves, strict=True)}))
        y = space(x.to(device))
        gradients = torch.autograd.grad(
            y.square().sum(), [*leaves, *space.parameters()], allow_unused=True, materialize_grads=True
        )
        outcomes.append([y.detach().cpu(), *(gradient.cpu() for gradient in gradients)])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max().clamp_min(1e-3)))


@pytest.mark.parametrize("name", NAMES)
def test_a_corner_is_the_network_extracted(name):
    space = create_space(name).eval().cuda()
    architecture, x = space.sample(torch.Generator().manual_seed(1)), space.example_input(2).cuda()
    with torch.no_grad():
        soft = space.relax(space.one_hot(architecture))(x)
        alone = space.extract(architecture)(x)
    torch.testing.assert_close(soft, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt_nano", "autoformer_nano", "mobilenetv3_nano"])
def test_no_step_waits_for_the_device(name, precision, monkeypatch):
    monkeypatch.setattr("tanglenas_engine.stages.search.may_ignore", lambda _: True)  # targets are counted, too
    found = watched(create_space(name), 8, "cuda", computation=Computation(precision))
    assert found["waits"] == found["reads"] == found["copies_to_host"] == 0, found["waits_by_line"]


def test_no_step_of_a_retraining_waits_for_the_device(monkeypatch):
    monkeypatch.setattr("tanglenas_engine.stages.retrain.may_ignore", lambda _: True)  # targets are counted, too
    step, taken = Retraining.step, []

    def watched_step(self, position):
        torch.cuda.set_sync_debug_mode("error" if position else "default")  # the first step makes what stays
        try:
            return step(self, position)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            taken.append(position)

    monkeypatch.setattr(Retraining, "step", watched_step)
    space = create_space("gpt_nano")
    retrain(
        space,
        space.largest(),
        random_data(space, ("training", "validation"), samples=24),
        epochs=1,
        batch_size=8,
        device="cuda",
    )
    assert taken == [0, 1, 2]


def test_a_search_needs_hardly_more_memory_than_training():
    # The gradients of the last weight step would count where they are kept.
    bench = Bench(create_space("gpt_char").cuda(), 8, naive=False, sampled=False)
    bench.seconds(rounds=1)
    peaks = bench.peaks()
    assert max(peaks["weight"], peaks["arch"]) < 1.1 * peaks["plain"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 64, 768, 3000])
def test_the_norm_of_one_kernel_is_that_of_many(width, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, width, generator=generator) for shape in ((3, 700), (), ()))
    coverage = torch.rand(width, generator=generator).sort(descending=True).values
    outcomes = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.to(device).requires_grad_() for tensor in (x.to(dtype), coverage, weight, bias)]
        y = weighted_layer_norm(*leaves, 1e-5)
        gradient = torch.linspace(-1, 1, y.numel(), device=device).view_as(y).sin()
        outcomes.append([y.detach(), *torch.autograd.grad(y, leaves, gradient)])
    for ours, theirs in zip(*outcomes, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours.cpu().double() - theirs.cpu().double()).norm() / theirs.cpu().double().norm()
        assert error < (1e-2 if ours.dtype == torch.bfloat16 else 1e-4)


def test_second_derivatives_of_the_norm_are_those_of_torch():
    x = torch.randn(4, 6, device="cuda", requires_grad=True)
    coverage = torch.linspace(1, 0.2, 6, device="cuda", requires_grad=True)
    y = weighted_layer_norm(x, coverage, None, None, 1e-5)
    (first,) = torch.autograd.grad(y.pow(3).sum(), coverage, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), [x, coverage])
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in second)
