"""Linear CKA from batches, against the definitions."""

import itertools
import math

import pytest
import torch
from torch import nn

from tanglenas_engine import TangleNASError, create_space
from tanglenas_engine.training.cka import CKA, layers, similarity


def hsic(one: torch.Tensor, other: torch.Tensor) -> float:
    """The unbiased estimate as a mean over all quadruples of different samples (Song et al. 2012, theorem 2)."""
    k, m = one.double() @ one.double().T, other.double() @ other.double().T
    terms = [
        float(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])) for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return sum(terms) / len(terms)


def test_it_is_the_ratio_of_mean_estimates_over_batches():
    batches = [[torch.randn(6, width) for width in (5, 3)] for _ in range(2)]
    others = [[torch.randn(6, 4) + 0.5 * one[0][:, :1]] for one in batches]
    found = CKA()
    for one, other in zip(batches, others, strict=True):
        found.add(one, other)
    for layer in range(2):
        pairs = [(one[layer], other[0]) for one, other in zip(batches, others, strict=True)]
        between, left, right = (sum(hsic(*f(*pair)) for pair in pairs) for f in (
            lambda x, y: (x, y), lambda x, y: (x, x), lambda x, y: (y, y)))  # fmt: skip
        assert found.result()[layer, 0].item() == pytest.approx(between / math.sqrt(left * right), rel=1e-9)


def test_rotations_and_scales_of_features_are_alike():
    x = torch.randn(40, 8)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    found = CKA()
    found.add([x], [3 * x @ rotation + 5, x.reshape(40, 2, 2, 2)])
    torch.testing.assert_close(found.result(), torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.slow
def test_independent_features_have_none_on_average_whatever_the_size_of_a_batch():
    for size in (4, 16):
        found = CKA()
        for _ in range(4000 // size):
            found.add([torch.randn(size, 20)], [torch.randn(size, 20)])
        assert abs(found.result().item()) < 0.05  # the biased estimate is near 0.9 for 16 samples


def test_features_that_never_differ_have_no_similarity():
    found = CKA()
    found.add([torch.ones(8, 3), torch.randn(8, 3)], [torch.randn(8, 3)])
    assert found.result()[0].isnan().all() and found.result()[1].isfinite().all()


def test_a_large_mean_of_features_changes_nothing():
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    found, shifted = CKA(), CKA()
    found.add([x], [x, y])
    shifted.add([1e-3 * x + 1e6], [1e-3 * x + 1e6, y])
    torch.testing.assert_close(shifted.result(), found.result(), atol=1e-5, rtol=0)


def test_a_batch_of_three_is_refused():
    with pytest.raises(TangleNASError, match="a batch of 3 samples has no unbiased HSIC: take 4 or more"):
        CKA().add([torch.randn(3, 2)], [torch.randn(3, 2)])


@pytest.mark.parametrize("name", ["autoformer_nano", "gpt_nano", "mobilenetv3_nano", "toy_cell_nano"])
def test_layers_of_a_network_are_compared_by_name(name):
    space = create_space(name)
    architecture = space.largest()
    one, other = space.extract(architecture), space.standalone(architecture)
    batches = [space.example_input(8) for _ in range(2)]
    rows, columns, same = similarity(one, one, batches)
    assert rows == columns == [name for name in layers(one) if name in rows] and len(rows) >= 3
    own = same.diagonal()[same.diagonal().isfinite()]  # what an untrained head computes may hardly differ
    torch.testing.assert_close(own, torch.ones(len(own), dtype=torch.float64))
    assert len(own) >= len(rows) - 1
    _, _, between = similarity(one, other, batches)
    assert between.shape == same.shape and between.diagonal().nanmean() < 1 - 1e-3
    assert not any(module._forward_hooks for module in one.modules())


class Positions(nn.Module):
    """A network of texts of 6 tokens, with an embedding of their positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(5, 4), nn.Embedding(6, 4), nn.Linear(4, 5)

    def forward(self, inputs):
        return self.head(self.tokens(inputs) + self.positions(torch.arange(6)))  # (B, 6, 5)


@pytest.mark.parametrize("count", [5, 6, 7])
def test_an_embedding_of_positions_is_no_layer_of_samples_even_if_a_batch_has_as_many(count):
    network = Positions()
    rows, columns, found = similarity(network, network, [torch.randint(5, (count, 6)) for _ in range(2)])
    assert rows == columns == ["tokens", "head"] and found.shape == (2, 2)


def test_networks_without_a_batch_to_compare_them_on_are_refused():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(TangleNASError, match="no batch was given: give one of 4 samples or more"):
        similarity(network, network, [])


def test_layers_without_parameters_are_left_out():
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    assert list(layers(network)) == ["0", "2.0", "2.1"]
