"""CUDA graphs: the numbers of forwards that run as they are. On a CPU, static memory stands in for a graph."""

import pytest
import torch

from benchmarks.search_step import _batch
from tanglenas_engine import create_optimizer, create_space
from tanglenas_engine.optimizers.optimizer import Step
from tanglenas_engine.training.execution import Graphed, executing
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.options import Computation

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]
captured = []


def emulated(module, samples, **_):
    """Write inputs, outputs and gradients into the same memory in each call, as a graph does."""
    forward, surface = module.forward, (*samples, *module.parameters())
    learning = [tensor for tensor in surface if tensor.requires_grad]
    outputs = forward(*samples).detach()  # a warm-up, which must not count
    gradients = [torch.zeros_like(tensor) for tensor in learning]
    captured.append(module)

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            for static, given in zip(samples, arguments, strict=False):
                static.detach().copy_(given)
            with torch.enable_grad():
                ctx.outputs = forward(*samples)
            return outputs.copy_(ctx.outputs.detach()).detach()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            found = torch.autograd.grad(ctx.outputs, learning, gradient, allow_unused=True, materialize_grads=True)
            for static, new in zip(gradients, found, strict=True):
                static.copy_(new)
            by_tensor = {id(tensor): static.detach() for tensor, static in zip(learning, gradients, strict=True)}
            return tuple(by_tensor.get(id(tensor)) for tensor in surface)

    module.forward = lambda *arguments: Replay.apply(*arguments, *module.parameters())
    return module


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    captured.clear()
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", emulated)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return torch.device(request.param)


def steps(name, device, graphed, precision="float32", count=3):
    """Take steps of plain gradient descent, and return the weights, statistics and alpha's last gradients."""
    torch.manual_seed(0)
    space, optimizer = create_space(name).to(device).train(), create_optimizer("drnas")
    optimizer.bind(space, seed=0)
    batches = [_batch(space, 4) for _ in range(count)]
    ways = [Computation(precision).precise(device).forward, *([Graphed(space).forward] if graphed else [])]
    with executing(space, *ways):
        for index, batch in enumerate(batches):
            step = Step(index, space, cross_entropy, batch, batch, None)
            space.zero_grad()
            optimizer.architecture_backward(step)
            for _ in range(2):  # the second adds to gradients, and runs as it is
                for loss in optimizer.weight_losses(step):
                    torch.autograd.backward(loss)
            with torch.no_grad():
                for parameter in space.parameters():
                    parameter -= 0.01 * parameter.grad
    return dict(space.state_dict()) | {f"alpha {n}": alpha.grad for n, alpha in optimizer.alphas.items()}


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt_nano", "autoformer_nano", "mobilenetv3_nano", "toy_cell"])
@pytest.mark.part(2)
@pytest.mark.slow
def test_replayed_steps_are_the_same(name, precision, device):
    exact = device.type == "cpu"
    ours, theirs = (steps(name, device, graphed, precision) for graphed in (True, False))
    assert len(captured) == (2 if exact else 0)  # the step of the weights and that of alpha
    for key, value in theirs.items():
        tolerance = 0.0 if exact else (1e-2 if precision == "float32" else 1e-1)
        scale = float(value.abs().max().clamp_min(1e-3)) if value.is_floating_point() else 0.0
        torch.testing.assert_close(ours[key], value, rtol=tolerance, atol=tolerance * scale)


def test_other_forwards_run_as_they_are(device):
    space = create_space("gpt_nano").to(device).train()
    graphed, optimizer = Graphed(space), create_optimizer("gdas")
    optimizer.bind(space, seed=0)
    x, _ = _batch(space, 2)
    with executing(space, graphed.forward):
        optimizer.enter(optimizer.sample(0, "architecture"))  # a hard path with a gradient for alpha
        space(x).sum().backward()
        assert all(alpha.grad is not None for alpha in optimizer.alphas.values())
        space.relax(optimizer.expected().detach())
        space(x).sum().backward()  # adds to gradients
        with torch.no_grad():
            space(x)
        space.zero_grad()
        space.eval()
        space(x)
    assert not graphed._graphs
