"""What cell spaces share: operations, the wiring of a cell, and what holds for each of them in every sharing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from spaces import random_mixture
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tanglenas_engine import create_space
from tanglenas_engine.spaces.cells import FactorizedReduce, Separable, Zero, cell_nodes, pool, skip

SHARINGS = ("superposed", "entangled", "separate")
SMALL = {
    "darts": ("darts", dict(channels=2, layers=3, image_size=8, num_classes=3)),
    "nb201": ("nb201", dict(channels=4, cells=1, image_size=8, num_classes=3)),
    "nb201 with biases": ("nb201", dict(channels=4, cells=1, image_size=8, num_classes=3, affine=False)),
    "toy_cell": ("toy_cell", dict(channels=4, image_size=9)),
}
each = pytest.mark.parametrize("label", SMALL)
in_each_sharing = pytest.mark.parametrize("sharing", SHARINGS)


def make(label, **options):
    name, small = SMALL[label]
    return create_space(name, **{**small, **options}).double()


# Spaces.


@pytest.mark.parametrize(
    ("name", "options", "architectures", "parameters"),
    [
        ("toy_cell", {}, 4_096, {"superposed": 239_146, "entangled": 239_146, "separate": 304_810}),
        ("darts", {}, 1_037_664_180**2, {"superposed": 1_143_034, "entangled": 1_143_034, "separate": 1_930_618}),
        ("nb201", {}, 15_625, {"superposed": 1_531_546, "entangled": 1_531_546, "separate": 1_699_546}),
        # The paper's supernets: 1.528 and 1.693 million.
        ("nb201", {"affine": False}, 15_625, {"superposed": 1_528_186, "separate": 1_692_826}),
    ],
)
def test_the_supernet_has_the_papers_size(name, options, architectures, parameters):
    for sharing, count in parameters.items():
        with torch.device("meta"):
            space = create_space(name, sharing=sharing, **options)
        assert sum(p.numel() for p in space.parameters()) == count
        assert space.size == architectures


@each
@in_each_sharing
@pytest.mark.part(3)
def test_corners_are_exact(label, sharing):
    space = make(label, sharing=sharing)
    images = space.example_input(3).double()
    with torch.no_grad():
        space.relax(random_mixture(space)[1])(images)  # running statistics of a mixture
    before, generator = copy.deepcopy(space.state_dict()), torch.Generator().manual_seed(0)
    for relaxation in ("exact", "gated"):
        space.relaxation = relaxation
        for training in (True, False):
            space.train(training).load_state_dict(before)
            architecture = space.sample(generator)
            network = space.extract(architecture)
            expected = network(images)
            torch.testing.assert_close(space.relax(space.one_hot(architecture))(images), expected)
            seen = space.inherited(architecture)
            for key, value in network.state_dict().items():
                torch.testing.assert_close(seen[key], value)
            torch.testing.assert_close(space.select(architecture)(images), expected)


@each
@in_each_sharing
@pytest.mark.part(3)
def test_the_cost_is_what_the_network_counts(label, sharing):
    space = make(label, sharing=sharing)
    generator = torch.Generator().manual_seed(2)
    for architecture in (space.smallest(), space.largest(), space.sample(generator)):
        network, cost = space.extract(architecture).eval(), space.cost(architecture)
        with FlopCounterMode(display=False) as counter:
            network(space.example_input(1).double())
        parameters = sum(p.numel() for p in network.parameters())
        assert (cost.params, cost.flops) == (parameters, counter.get_total_flops() // 2)


# Parts.


@pytest.mark.parametrize(
    ("inputs", "factors", "found"),
    [
        ([1], [2, 3, 5], [1, 2, 3 * 1 + 5 * 2]),
        ([1, 10], [2, 3, 5, 7, 11], [1, 10, 2 + 30, 5 + 70 + 11 * 32]),
        ([7], [], [7]),
    ],
)
def test_a_node_is_the_sum_of_an_edge_from_every_node_before_it(inputs, factors, found):
    edges = [lambda x, factor=factor: factor * x for factor in factors]
    assert cell_nodes(list(map(torch.tensor, inputs)), edges) == list(map(torch.tensor, found))


def test_half_of_a_factorized_reduction_sees_the_even_pixels_and_half_the_odd_ones():
    reduce = skip(4, stride=2).eval()
    assert isinstance(reduce, FactorizedReduce) and isinstance(skip(4), nn.Identity)
    x = torch.zeros(1, 4, 4, 4)
    x[..., 0, 0] = 1
    y = reduce(x)
    assert y.shape == (1, 4, 2, 2) and y[0, :2, 0, 0].any() and not y[0, 2:].any()
    y = reduce(x.roll((1, 1), (2, 3)))
    assert y[0, 2:, 0, 0].any() and not y[0, :2].any()


def test_pools_leave_out_the_padding_and_keep_in_scale():
    x = torch.ones(1, 2, 4, 4)
    assert pool("avg", 2, norm=False)(x).equal(x) and pool("max", 2, norm=False)(-x).equal(-x)
    x = 5 + 3 * torch.randn(8, 2, 4, 4)
    for kind, plain in (("avg", F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)), ("max", F.max_pool2d(x, 3, 2, 1))):
        assert pool(kind, 2, 2, norm=False)(x).equal(plain)
        torch.testing.assert_close(pool(kind, 2, 2)(x), F.batch_norm(plain, None, None, training=True))


def test_the_first_of_two_separable_convolutions_has_the_stride():
    layers = [layer for layer in Separable(4, 3, stride=2) if isinstance(layer, nn.Conv2d)]
    assert [(layer.stride[0], layer.groups) for layer in layers] == [(2, 4), (1, 1), (1, 4), (1, 1)]


@pytest.mark.parametrize(("stride", "size", "expected"), [(1, 5, 5), (2, 4, 2), (2, 5, 3)])
def test_an_edge_that_is_not_there_gives_zeros_of_the_shape_of_a_convolution(stride, size, expected):
    y = Zero(stride)(torch.ones(2, 3, size, size))
    assert y.shape == (2, 3, expected, expected) and not y.any()
    assert Separable(3, 5, stride)(torch.ones(2, 3, size, size)).shape == y.shape
