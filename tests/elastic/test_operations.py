"""Mixed operations: the expectation over operations, with entangled kernels, exact at the corners."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tanglenas_engine import SearchSpace, elastic
from tanglenas_engine.errors import TangleNASError

OPTIONS = ("conv3", "conv5", "skip")


class OneEdge(SearchSpace):
    sharings = ("superposed", "entangled")

    def __init__(self, norm=True, **options):
        super().__init__(**options)
        op = self.choice("op", OPTIONS)
        kernel = op.map({"conv3": 3, "conv5": 5, "skip": 0}.__getitem__)
        conv = [elastic.Conv2d(2, 2, kernel, bias=False)] + [nn.BatchNorm2d(2, affine=False)] * norm
        skip = op.map(lambda name: int(name == "skip"))
        self.edge = elastic.MixedOperation(
            {"conv": (kernel.positive(), nn.Sequential(*conv)), "skip": (skip, nn.Identity())}, self.sharing
        )

    def forward(self, x):
        return self.edge(x)

    def example_input(self, batch):
        return torch.randn(batch, 2, 6, 6)


def weights(*logits):
    alpha = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    return alpha, alpha.softmax(0)


def padded_sum(space, p, scale):
    """Slices of the kernel, zero-padded, weighted and summed."""
    weight = space.edge["conv"][0].weight
    return (p[0] * F.pad(weight[..., 1:4, 1:4], (1, 1, 1, 1)) + p[1] * weight) / scale


@pytest.mark.parametrize("norm", [True, False])
def test_exact_is_the_sum_over_groups_of_probability_times_conditional_superposition(norm):
    space = OneEdge(norm).double()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    alpha, p = weights(0.3, -0.2, 0.5)
    group = p[0] + p[1]
    conv = F.conv2d(x, padded_sum(space, p, group), padding=2)
    expected = group * (F.batch_norm(conv, None, None, training=True) if norm else conv) + p[2] * x
    target = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * target).sum(), [alpha, space.edge["conv"][0].weight])
    alpha, p = weights(0.3, -0.2, 0.5)
    output = space.relax({"op": p})(x)
    torch.testing.assert_close(output, expected)
    found = torch.autograd.grad((output * target).sum(), [alpha, space.edge["conv"][0].weight])
    torch.testing.assert_close(found, wanted)


def test_paper_leaves_the_group_behind_its_batch_norm():
    space = OneEdge(relaxation="paper").double()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    _, p = weights(0.3, -0.2, 0.5)
    conv = F.conv2d(x, padded_sum(space, p, 1), padding=2)
    expected = F.batch_norm(conv, None, None, training=True) + p[2] * x
    torch.testing.assert_close(space.relax({"op": p})(x), expected)


@pytest.mark.parametrize(("relaxation", "visible"), [("exact", True), ("gated", True), ("paper", False)])
def test_a_group_behind_a_batch_norm_gets_a_gradient_unless_as_in_the_paper(relaxation, visible):
    """The direction in which a group as a whole gains, its members' ratio staying as it is."""

    class TwoGroups(SearchSpace):
        def __init__(self):
            super().__init__(relaxation=relaxation)
            op = self.choice("op", ("a3", "a5", "b3", "b5"))
            kernels = [op.map(lambda name, f=f: int(name[1]) if name[0] == f else 0) for f in "ab"]
            self.edge = elastic.MixedOperation(
                {
                    f: (k.positive(), nn.Sequential(elastic.Conv2d(2, 2, k, bias=False), nn.BatchNorm2d(2, eps=1e-12)))
                    for f, k in zip("ab", kernels, strict=True)
                }
            )

        def forward(self, x):
            return self.edge(x)

    space = TwoGroups().double()
    p = torch.tensor([0.1, 0.3, 0.4, 0.2], dtype=torch.float64, requires_grad=True)
    x = torch.randn(8, 2, 6, 6, dtype=torch.float64)
    (space.relax({"op": p})(x) * torch.randn(8, 2, 6, 6, dtype=torch.float64)).sum().backward()
    along_group = (p.grad[:2] * p.detach()[:2]).sum().abs()
    assert (along_group > 1e-3) == visible
    if not visible:
        assert along_group < 1e-8


@pytest.mark.parametrize("relaxation", ["exact", "gated", "paper"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_corner_is_the_operation(option, training, relaxation):
    space = OneEdge(relaxation=relaxation).double()
    with torch.no_grad():
        space.relax({"op": torch.full((3,), 1 / 3, dtype=torch.float64)})(torch.randn(8, 2, 6, 6).double())
    space.train(training)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    architecture = space.architecture(op=option)
    expected = space.extract(architecture)(x)
    torch.testing.assert_close(space.select(architecture)(x), expected)
    if relaxation != "paper" or option != "skip":  # the paper's form adds the batch norm of nothing: 0 in train mode
        torch.testing.assert_close(space.relax(space.one_hot(architecture))(x), expected)


@pytest.mark.parametrize("relaxation", ["exact", "gated", "paper"])
def test_entangled_mixes_the_outputs_of_slices_of_one_weight(relaxation):
    space = OneEdge(sharing="entangled", relaxation=relaxation).double()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    weight = space.edge["conv"][0].weight
    alpha, p = weights(0.3, -0.2, 0.5)
    conv3, conv5 = F.conv2d(x, weight[..., 1:4, 1:4], padding=1), F.conv2d(x, weight, padding=2)
    normal = [F.batch_norm(y, None, None, training=True) for y in (conv3, conv5)]
    expected = p[0] * normal[0] + p[1] * normal[1] + p[2] * x
    target = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * target).sum(), [alpha, weight])
    alpha, p = weights(0.3, -0.2, 0.5)
    output = space.relax({"op": p})(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad((output * target).sum(), [alpha, weight]), wanted)
    # Running statistics moved once, to what is expected of the two given that it is one of them.
    means = [y.detach().mean((0, 2, 3)) for y in (conv3, conv5)]
    moved = (p[0] * means[0] + p[1] * means[1]) / (p[0] + p[1])
    torch.testing.assert_close(space.edge["conv"][1].running_mean, 0.1 * moved.detach())
    assert space.edge["conv"][1].num_batches_tracked == 1


def test_a_hard_sample_of_entangled_kernels_has_the_slope_of_the_chosen_option_only():
    space = OneEdge(sharing="entangled").double()
    x, target = torch.randn(2, 4, 2, 6, 6, dtype=torch.float64)
    p = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    gradients = [
        torch.autograd.grad((enter({"op": p})(x) * target).sum(), p)[0]
        for enter in (space.relax, lambda weights: space.select(space.mixture(weights)))
    ]
    torch.testing.assert_close(gradients[1], gradients[0] * p.detach())


def test_entangled_leaves_the_statistics_of_operations_that_no_option_has():
    space = OneEdge(sharing="entangled").double()
    before = space.edge["conv"][1].running_var.clone()
    space.relax(space.one_hot(space.architecture(op="skip")))(torch.randn(4, 2, 6, 6).double())
    assert torch.equal(space.edge["conv"][1].running_var, before)


def test_an_entangled_operation_follows_one_choice():
    space = SearchSpace()
    op, width = space.choice("op", ("conv3", "conv5")), space.choice("width", (2, 4))
    kernel = op.map({"conv3": 3, "conv5": 5}.__getitem__)
    operations = {"conv": (kernel.positive(), elastic.Conv2d(2, width, kernel))}
    elastic.MixedOperation(operations)
    with pytest.raises(TangleNASError, match=r"layers follow other choices too: width. Use sharing 'superposed'"):
        elastic.MixedOperation(operations, sharing="entangled")


def test_an_error_within_an_entangled_operation_leaves_the_mixture():
    space = OneEdge(sharing="entangled").double()
    _, p = weights(0.3, -0.2, 0.5)
    space.relax({"op": p})
    with pytest.raises(RuntimeError):
        space(torch.randn(4, 3, 6, 6).double())
    assert space.superposition.assignment is None and space.superposition.mixture is not None


@pytest.mark.parametrize(
    ("sharing", "names"),
    [("superposed", ["conv", "skip"]), ("entangled", ["conv", "skip"]), ("separate", ["conv3", "conv5", "skip"])],
)
def test_a_mixed_operation_is_made_of_families_or_of_single_operations(sharing, names):
    op = SearchSpace().choice("op", OPTIONS)
    families = {
        "conv": ({"conv3": 3, "conv5": 5}, lambda kernel: elastic.Conv2d(2, 2, kernel, bias=False)),
        "skip": ({"skip": 1}, lambda _: nn.Identity()),
    }
    edge = elastic.MixedOperation.of(op, families, sharing)
    assert list(edge) == names
    sizes = [module.kernel_size[0] for module in edge.values() if isinstance(module, nn.Conv2d)]
    assert sizes == ([3, 5] if sharing == "separate" else [5])


@pytest.mark.parametrize("name", ["gate", "channels", "axes", "pop", "half", "max.pool"])
def test_an_operation_whose_name_a_module_cannot_have_is_refused(name):
    op = SearchSpace().choice("op", ("relu", "other"))
    operations = {"relu": (op.map(lambda it: int(it == "relu")), nn.ReLU())}
    operations[name] = op.map(lambda it: int(it == "other")), nn.Identity()
    with pytest.raises(TangleNASError, match=f"an operation cannot be named '{name}': .*Give it another name"):
        elastic.MixedOperation(operations)


def test_only_the_chosen_operation_is_extracted_and_counted():
    space = OneEdge()
    skip, conv5 = space.architecture(op="skip"), space.architecture(op="conv5")
    assert space.cost(skip).params == space.cost(skip).flops == 0
    assert space.cost(conv5).params == 2 * 2 * 25 == sum(p.numel() for p in space.extract(conv5).parameters())
    assert space.largest() == conv5 and space.smallest() == skip
    assert [name for name, _ in space.extract(skip).named_parameters()] == []


def test_operations_that_overlap_or_leave_an_option_out_are_refused():
    space = SearchSpace()
    op = space.choice("op", ("a", "b"))
    first = op.map(lambda name: int(name == "a"))
    with pytest.raises(TangleNASError, match=r"for op=b the operations are none, expected exactly one"):
        elastic.MixedOperation({"a": (first, nn.Identity())})
    with pytest.raises(TangleNASError, match=r"for op=a the operations are \['a', 'both'\]"):
        both = op.map(lambda name: 1)
        elastic.MixedOperation({"a": (first, nn.Identity()), "both": (both, nn.Identity())})


def test_a_choice_between_names_is_no_dimension():
    op = SearchSpace().choice("op", ("a", "b"))
    with pytest.raises(TangleNASError, match="choice between names"):
        elastic.Linear(op, 3)
    with pytest.raises(TangleNASError, match="all of them names"):
        SearchSpace().choice("op", ("a", 3))
