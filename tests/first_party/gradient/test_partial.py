"""Partial channels, edge normalization and progressive shrinking: pc_darts and pc_drnas."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

from tanglenas_engine import create_optimizer
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.optimizers.optimizer import Step
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.stages.retrain import retrain
from tanglenas_engine.stages.search import search
from tanglenas_engine.testing import random_data
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.measure import measure, measure_inherited, recalibrate, statistics_inputs
from tanglenas_engine.training.optim import parameter_groups
from tanglenas_gradient.partial import PartialDARTS, PartialDrNAS

CELLS = ["toy_cell", "nb201", "darts"]


def bound(space, optimizer=None):
    optimizer = optimizer or PartialDARTS(channels=(2,))
    optimizer.bind(space, 0)
    return optimizer


def first_edge(space):
    return next(m for m in space.modules() if type(m).__name__ == "MixedOperation" and len(m) > 1)


@pytest.mark.parametrize("name", CELLS)
def test_operations_see_a_share_of_the_channels_and_the_rest_passes_by(name):
    space = tiny(name).double().eval()
    optimizer = bound(space)
    edge = first_edge(space)
    space.relax(optimizer.sample(0, "weight"))
    x = torch.randn(2, edge.channels.max, 6, 6, dtype=torch.float64)
    seen = []
    for operation in edge.values():
        operation.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    y = edge(x)
    half = edge.channels.max // 2
    assert all(inputs.equal(x[:, :half]) and output.shape[1] == half for inputs, output in seen) and seen
    weight = space.superposition.mixture.edges[space.edge_rows[0]]
    apart = (y / weight).unflatten(1, (half, 2)).transpose(1, 2).flatten(1, 2)  # before the shuffle
    stride = x.shape[-1] // y.shape[-1]
    passed = x[:, half:] if stride == 1 else F.max_pool2d(x[:, half:], 2)
    torch.testing.assert_close(apart[:, half:], passed)
    assert not torch.allclose(apart[:, :half], passed)


def small_search(space, folder=None, **options):
    data = random_data(space, ("weights", "architecture", "validation"))
    with CheckpointFolder(folder, "small") if folder else nullcontext() as checkpoints:
        options = {"epochs": 1, "batch_size": 8, "seed": 1, "checkpoints": checkpoints, **options}
        return data, search(space, PartialDARTS(channels=(2,)), data, **options)


@pytest.mark.parametrize("path_epochs, divisor", [(0, 2), (1, 1)])
def test_an_architecture_is_judged_with_the_channels_that_its_weights_were_trained_with(path_epochs, divisor):
    space = tiny("darts")
    data, result = small_search(space, epochs=2, path_epochs=path_epochs)
    statistics = statistics_inputs(space, data.plain("weights"), 8, 1, torch.device("cpu"))
    losses = {}
    for channels in (1, 2):
        space.superposition.channel_divisor = channels
        recalibrate(space.select(result.architecture), statistics)
        losses[channels] = measure(space, data.validation).loss
    space.superposition.channel_divisor = 1
    assert losses[1] != pytest.approx(losses[2], rel=1e-3)
    assert result.history[-1]["validation_loss"] == pytest.approx(losses[divisor], rel=1e-5)
    assert result.split_losses["validation"] == pytest.approx(losses[divisor], rel=1e-5)
    after = measure_inherited(space, result.architecture, data.validation, statistics)
    assert after.loss == pytest.approx(losses[divisor], rel=1e-5)
    assert space.superposition.channel_divisor == 1


@pytest.mark.parametrize("name", ["vit", "convolutional"])
def test_a_space_without_partial_channels_trains_all_of_them(name):
    space = tiny(name)
    _, result = small_search(space)
    assert space.superposition.trained_divisor == 1 and not space.untrained
    retrain(space, result.architecture, random_data(space, ("training", "validation")), epochs=1, mode="inherit")


def test_a_search_that_resumes_after_its_last_step_judges_with_the_same_channels(tmp_path):
    torch.manual_seed(0)
    first = tiny("darts")
    _, found = small_search(first, tmp_path / "checkpoints")
    again = tiny("darts")
    _, resumed = small_search(again, tmp_path / "checkpoints")
    assert resumed.split_losses == found.split_losses
    assert first.superposition.trained_divisor == again.superposition.trained_divisor == 2


def test_what_takes_inherited_weights_refuses_channels_that_were_not_trained():
    space = tiny("darts")
    _, result = small_search(space)
    data, told = random_data(space, ("training", "validation")), "with 1/2 of the channels of each operation"
    options = {"epochs": 1, "batch_size": 4}
    with pytest.raises(TangleNASError, match=f"retrain.mode is 'inherit', but the search .* {told}.*path_epochs"):
        retrain(space, result.architecture, data, mode="inherit", **options)
    with pytest.raises(TangleNASError, match=f"retrain.teacher is 'largest', but the search .* {told}"):
        retrain(space, result.architecture, data, teacher="largest", **options)
    with pytest.warns(UserWarning, match=f"retrain.mode is 'finetune', but the search .* {told}"):
        retrain(space, result.architecture, data, mode="finetune", **options)
    retrain(space, result.architecture, data, **options)


@pytest.mark.parametrize("name", CELLS)
def test_only_the_weights_of_that_share_learn(name):
    space = tiny(name).train()
    optimizer = bound(space)
    batch = random_data(space, ("weights",)).weights.batch(torch.arange(8))
    step = Step(0, space, cross_entropy, batch, batch, torch.optim.SGD(parameter_groups(space), lr=0.1))
    for term in optimizer.weight_losses(step):
        torch.autograd.backward(term)
    learned = 0
    for module in first_edge(space).modules():
        axes = getattr(module, "axes", {}).get("weight")
        if not axes or module.weight is None or axes[0].size.used == axes[0].size.max:
            continue
        gradient, used = module.weight.grad, axes[0].size.used
        assert gradient[:used].any() and not gradient[used:].any()
        learned += 1
    assert learned


def test_with_all_channels_nothing_changes():
    space = tiny("nb201").double().eval()
    x = space.example_input(2).double()
    optimizer = PartialDARTS(channels=(1,), edge_normalization=False)
    optimizer.bind(space, 0)
    mixture = optimizer.sample(0, "weight")
    y = space.relax(mixture)(x)
    other = create_optimizer("darts")
    other.bind(space, 0)
    assert y.equal(space.relax(other.sample(0, "weight"))(x))


@pytest.mark.parametrize("name", CELLS)
def test_edges_into_a_node_are_weighed_by_a_softmax(name):
    space = tiny(name)
    optimizer = bound(space)
    optimizer.edges.data = torch.randn_like(optimizer.edges)
    mixture = optimizer.sample(0, "architecture")
    assert set(mixture.edges) == set(space.rows)
    for rows in space.nodes():
        total = torch.stack([mixture.edges[row] for row in rows]).sum()
        assert total.item() == pytest.approx(1)
    batch = random_data(space.train(), ("weights",)).weights.batch(torch.arange(8))
    step = Step(0, space, cross_entropy, batch, batch, torch.optim.SGD(parameter_groups(space), lr=0.1))
    optimizer.architecture_backward(step)
    assert optimizer.edges.grad.any()


def test_which_edges_an_architecture_keeps_depends_on_their_weights():
    space = tiny("darts")
    optimizer = bound(space)
    last = space.nodes()[3]
    for wanted in ((0, 3), (1, 4), (2, 3)):
        optimizer.edges.data = torch.zeros_like(optimizer.edges)
        places = [row for rows in space.nodes() for row in rows]
        for source in wanted:
            optimizer.edges.data[places.index(last[source])] = 5.0
        assignment = space.assignment_of(optimizer.current())
        assert [i for i, row in enumerate(last) if assignment[row]] == list(wanted)
        # ... and so it does after the mixture went through a file.
        assert space.most_probable(space.mixture(optimizer.expected().detach().tensors())) == optimizer.current()


@pytest.mark.parametrize("name", ["vit", "language", "toy_cell", "darts"])
def test_rows_are_pruned_to_their_most_probable_options(name):
    space = tiny(name)
    optimizer = bound(space, PartialDrNAS(channels=(2, 1), keep=(1.0, 0.5)))
    for alpha in optimizer.alphas.values():
        alpha.data = torch.randn_like(alpha)
    optimizer.set_progress(0.25)
    assert not optimizer.sample(0, "weight").kept
    assert space.superposition.channel_divisor == (2 if name in CELLS else 1)
    before = {count: stack.detach() for count, stack in optimizer.expected().stacks.items()}
    optimizer.set_progress(0.5)
    assert space.superposition.channel_divisor == 1
    for count, stack in optimizer.sample(0, "weight").stacks.items():
        best = before[count].topk(max(2, -(-count // 2)), dim=1).indices  # the end of a search decides, not its middle
        kept = torch.zeros_like(stack).scatter(1, best, 1.0).bool()
        assert (stack[kept] > 0).all() and not stack[~kept].any()
        torch.testing.assert_close(stack.sum(1), torch.ones(len(stack)))


def test_a_pruned_operation_is_not_computed():
    space = tiny("nb201").eval()
    optimizer = bound(space, PartialDARTS(channels=(1, 1), keep=(1.0, 0.2)))
    optimizer.set_progress(0.5)
    edge = first_edge(space)
    called = []
    for name, operation in edge.items():
        operation.register_forward_hook(lambda *_, name=name: called.append(name))
    space.relax(optimizer.sample(0, "weight"))(space.example_input(2))
    row = space.edge_rows[0]
    kept = [row.options[position] for position in optimizer.expected().kept[row]]
    assert len(kept) == 2
    assert set(called) == {"nor_conv" if option.startswith("nor_conv") else option for option in kept}


@pytest.mark.slow
def test_a_pruned_dirichlet_is_the_dirichlet_of_what_is_left():
    space = tiny("vit", num_heads=(1, 2, 3))
    optimizer = bound(space, PartialDrNAS(channels=(1, 1), keep=(1.0, 0.6)))
    optimizer.alphas[3].data = torch.tensor([1.0, -1.0, 0.0]).expand_as(optimizer.alphas[3]).clone()
    optimizer.set_progress(0.5)
    draws = torch.cat([optimizer.sample(step, "weight").stacks[3].detach() for step in range(3000)])
    concentration = torch.tensor([2.0, 1.0])  # elu(alpha) + 1 of the first and the last option
    total = concentration.sum()
    left = draws[:, [0, 2]]
    torch.testing.assert_close(left.mean(0), concentration / total, atol=0.01, rtol=0)
    variance = concentration * (total - concentration) / (total**2 * (total + 1))
    torch.testing.assert_close(left.var(0), variance, atol=0.005, rtol=0)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_ends_with_all_channels():
    space = tiny("toy_cell")
    data = random_data(space, ("weights", "architecture", "validation"))
    result = search(space, PartialDrNAS(channels=(4, 2), keep=(1.0, 0.5)), data, epochs=2, batch_size=4)
    assert space.superposition.channel_divisor == 1
    assert "edges" in result.mixture.tensors()
    network = space.extract(result.architecture)
    assert network(space.example_input(2)).isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": (4, 2)}, r"channels \(4, 2\) and keep \(1.0,\) have 2 and 1 stages: give one of each"),
        ({"channels": (), "keep": ()}, "have 0 and 0 stages"),
        ({"channels": 4}, "channels 4 and keep .*: give a tuple of each"),
        ({"channels": (0,)}, "expected whole numbers of at least 1"),
        ({"channels": (2.5,)}, "expected whole numbers of at least 1"),
        ({"channels": (4, 2), "keep": (1.0, 2.0)}, "expected shares that start at 1 and fall"),
        ({"channels": (4, 2), "keep": (0.5, 0.5)}, "expected shares that start at 1 and fall"),
        ({"channels": (4, 2, 1), "keep": (1.0, 0.5, 0.7)}, "expected shares that start at 1 and fall"),
    ],
)
def test_stages_that_cannot_be(options, message):
    with pytest.raises(TangleNASError, match=message):
        create_optimizer("pc_darts", **options)


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(
        TangleNASError, match="4 channels of 'toy_cell' do not divide into 3 parts: choose other channels"
    ):
        bound(tiny("toy_cell"), PartialDARTS(channels=(3,)))
