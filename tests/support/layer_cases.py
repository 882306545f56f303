"""A layer beside Algorithm 1: choices of any options, a random mixture of them, and the comparison with the oracle."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from oracle import DIMENSIONS, Oracle

from tanglenas_engine import SearchSpace
from tanglenas_engine.elastic import masked as products
from tanglenas_engine.superposition.size import make_divisible

relaxations = pytest.mark.parametrize("relaxation", ["exact", "gated", "paper"])

dimensions = st.sampled_from(list(DIMENSIONS.values()))


def some(*options):
    """One to three of the options, in any order."""
    return st.lists(st.sampled_from(options), min_size=1, max_size=3, unique=True)


OPTIONS = st.fixed_dictionaries(
    {
        "E": some(2, 3, 4, 5),
        "F": some(2, 3, 6),
        "R": some(0.5, 1, 1.5, 2.25),
        "S": some(1, 2, 3),
        "H": some(1, 2, 3),
        "K": some(1, 3, 5) | some(2, 4),
        "D": some(1, 2, 4),
    }
)


class Case:
    """A space with the choices of `options`, a random mixture of them, and the oracle for it."""

    def __init__(self, options, relaxation="exact"):
        torch.manual_seed(0)  # an example gives the same numbers whatever ran before it
        self.space = SearchSpace(relaxation=relaxation)
        for name, listed in options.items():
            self.space.choice(name, listed)
        self.options = options
        self.alphas = {n: torch.randn(len(o)).double().requires_grad_() for n, o in options.items()}
        self.symbols = SimpleNamespace(make_divisible=make_divisible, **self.space.choices)

    def size(self, dimension):
        return dimension.of(self.symbols)

    def probabilities(self):
        return {name: alpha.softmax(0) for name, alpha in self.alphas.items()}

    def prepare(self, layer):
        """The layer in float64, with no parameter left at 0 or 1."""
        self.space.layer = layer.double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter))
        return layer

    def compare(self, layer, expected, x):
        """`layer` on the soft path gives what `expected(oracle)` gives, and the same gradients, whatever learns."""
        weights, alphas = list(layer.parameters()), list(self.alphas.values())
        inputs = [x.requires_grad_()] if x.is_floating_point() else []
        theirs = expected(Oracle(self.options, self.probabilities()))
        direction = torch.randn_like(theirs)
        leaves = [*weights, *alphas, *inputs]
        right = dict(zip(leaves, gradients(theirs, direction, leaves), strict=True))
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        # A simultaneous step, a weight step, and an architecture step: of a first layer, in bands of rows and without.
        later = [*alphas, *inputs]
        for learn, least_rows in [(leaves, 64), ([*weights, *inputs], 64), (alphas, 0), (later, 0), (later, 10**9)]:
            with mock.patch.object(products, "MIN_ROWS_PER_BAND", least_rows), only(learn, leaves):
                layer.load_state_dict(before, strict=False)
                self.space.relax(self.probabilities())
                ours = layer(x)
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
                for leaf, gradient in zip(learn, gradients(ours, direction, learn), strict=True):
                    torch.testing.assert_close(gradient, right[leaf], rtol=1e-8, atol=1e-9)


def gradients(y, direction, leaves):
    """Zeros where a leaf has no part in y."""
    if not y.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad((y * direction).sum(), leaves, allow_unused=True, materialize_grads=True)


@contextmanager
def only(learning, leaves):
    """Within, no other leaf asks for a gradient."""
    for leaf in leaves:
        leaf.requires_grad_(any(leaf is one for one in learning))
    yield
    for leaf in leaves:
        leaf.requires_grad_()


def masked(oracle, tensor, used, together):
    """`tensor` superposed over each group of dimensions in turn."""
    for group in together:
        tensor = oracle.superposed(tensor, *(u if i in group else None for i, u in enumerate(used)))
    return tensor
