"""Mixtures, and masks that are the expectation over architectures."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import OPTIONS, Case, dimensions, masked, relaxations
from oracle import DIMENSIONS, Dimension, Oracle, Used
from spaces import make, random_mixture, vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tanglenas_engine import SearchSpace, elastic, superposition
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.size import combinations


class Parameter(elastic.Elastic):
    """One parameter and its current value, times a number."""

    def __init__(self, role, *sizes):
        super().__init__()
        self.value = nn.Parameter(torch.zeros([s if isinstance(s, int) else s.max for s in sizes]))
        self.declare(role, value=sizes)

    def forward(self, x):
        return self.current("value") * x


@relaxations
@pytest.mark.parametrize("role", ["read", "write"])
@given(OPTIONS, st.lists(dimensions, min_size=1, max_size=3))
@pytest.mark.slow
def test_a_mask_is_the_sum_of_padded_slices(relaxation, role, options, used):
    case = Case(options, relaxation)
    layer = case.prepare(Parameter(role, *map(case.size, used)))
    together = [tuple(range(len(used)))]
    if relaxation == "gated":  # each side by its own coverage, where it is read
        together = [(i,) for i in range(len(used)) if role == "read"]
    case.compare(
        layer,
        lambda oracle: masked(oracle, layer.value, [Used(d) for d in used], together) * x,
        x := torch.ones(1).double(),
    )


@given(OPTIONS, dimensions)
def test_coverage_starts_at_one_and_never_rises(options, width):
    case = Case(options)
    layer = case.prepare(Parameter("read", case.size(width)))
    layer.value.data.fill_(1)
    coverage = case.space.relax(case.probabilities()) and layer(1.0)
    assert coverage[0].item() == pytest.approx(1)
    assert (coverage.diff() <= 1e-12).all()


def test_sizes_that_share_a_choice_are_covered_jointly():
    # Half the time 1 x 1, half the time 2 x 2: never 1 x 2, which independent coverages would give.
    space = SearchSpace()
    width = space.choice("width", (1, 2))
    layer = elastic.Linear(width, width, bias=False)
    nn.init.ones_(layer.weight)
    space.relax({"width": torch.tensor([0.5, 0.5])})
    assert layer.current("weight").tolist() == [[1, 0.5], [0.5, 0.5]]
    space.relaxation = "gated"
    space.relax({"width": torch.tensor([0.5, 0.5])})
    assert layer.current("weight").tolist() == [[1, 0.5], [1, 0.5]]


@relaxations
def test_layers_of_one_space_have_rows_of_their_own(relaxation):
    """Four equal layers and one of another shape, whose masks come in batches, against the oracle row by row."""
    space = SearchSpace(relaxation=relaxation)
    width = space.choice("E", (2, 4, 3))
    ratio = space.choice("R", (1, 2.5, 0.5), per=4)
    layers = nn.ModuleList(elastic.Linear(width, width * ratio[i]) for i in range(4))
    layers.append(elastic.Linear(width * ratio[2], width * ratio[0]))
    layers.double()
    alphas = {name: torch.randn(c.shape).double().requires_grad_() for name, c in space.choices.items()}

    def oracle():
        E, R = alphas["E"].softmax(-1), alphas["R"].softmax(-1)
        rows = {f"{i}": R[i] for i in range(4)}
        options = {"E": width.options, **dict.fromkeys(rows, ratio.options)}
        return Oracle(options, {"E": E, **rows})

    def hidden(i):
        return Dimension(f"E{i}", lambda v: v.E * getattr(v, str(i)))

    space.relax({name: alpha.softmax(-1) for name, alpha in alphas.items()})
    sides = [(hidden(i), DIMENSIONS["E"]) for i in range(4)] + [(hidden(0), hidden(2))]
    for layer, (outputs, inputs) in zip(layers, sides, strict=True):
        together = [(1,)] if relaxation == "gated" else [(0, 1)]
        ours = layer.current("weight")
        theirs = masked(oracle(), layer.weight, [Used(outputs), Used(inputs)], together)
        torch.testing.assert_close(ours, theirs)
        direction = torch.randn_like(ours)
        for a, b in zip(
            *(
                torch.autograd.grad(
                    (y * direction).sum(), [*alphas.values()], retain_graph=True, materialize_grads=True,
                    allow_unused=True,
                )
                for y in (ours, theirs)
            ),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_alpha_gradients_agree_with_finite_differences():
    space = vit().double().eval()
    x = space.example_input(2).double()

    def output(*alphas):
        weights = [alpha.softmax(-1) for alpha in alphas]
        return space.relax(dict(zip(space.choices, weights, strict=True)))(x)

    alphas = [torch.randn(c.shape, dtype=torch.float64, requires_grad=True) for c in space.choices.values()]
    assert torch.autograd.gradcheck(output, alphas)


# The mixture itself.


def test_a_mixture_maps_names_to_the_weights_it_was_made_of():
    space = make("language")
    _, weights = random_mixture(space)
    mixture = space.mixture(weights)
    assert list(mixture) == list(space.choices)
    assert len(mixture) == 5
    for name, weight in weights.items():
        torch.testing.assert_close(mixture[name], weight, rtol=0, atol=0)
        assert mixture[name].shape == space.choices[name].shape
    assert {count: tuple(stack.shape) for count, stack in mixture.stacks.items()} == {
        count: (rows, count) for count, rows in space.stacks.items()
    }


def test_stacked_weights_are_the_same_mixture():
    space = make("vit").eval()
    named = space.mixture(random_mixture(space)[1])
    x = space.example_input(2).double()
    torch.testing.assert_close(space.relax(space.mixture(named.stacks))(x), space.relax(named)(x))


def test_a_detached_mixture_leaves_alpha_out_and_changes_no_number():
    space = make("vit").eval()
    alphas, weights = random_mixture(space)
    x = space.example_input(2).double()
    y = space.relax(weights)(x)
    detached = space.relax(space.mixture(weights).detach())(x)
    torch.testing.assert_close(detached, y, rtol=0, atol=0)
    detached.sum().backward()
    assert all(alpha.grad is None for alpha in alphas.values())


def test_a_corner_is_a_mixture_of_zeros_and_ones():
    space = make("language")
    architecture = space.architecture(width=8, layers=1, heads=[1], ratio=[1.5], multiple=1)
    corner = space.one_hot(architecture)
    assert corner["width"].tolist() == [0, 1, 0]
    assert corner["heads"].tolist() == [[0, 1, 0], [1, 0, 0]]  # a layer beyond the depth takes its first
    assert corner["ratio"].tolist() == [[0, 1], [1, 0]]
    assert corner["width"].dtype == torch.float64


class Operations(TorchDispatchMode):
    """Counts what torch runs."""

    def __enter__(self):
        self.counts = {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._schema.name] = self.counts.get(function._schema.name, 0) + 1
        return function(*args, **(kwargs or {}))


@relaxations
@pytest.mark.parametrize("costly", [False, True], ids=["relax", "expected_cost"])
@pytest.mark.slow
def test_the_work_on_choices_does_not_grow_with_their_number(relaxation, costly):
    counts = []
    for layers in (3, 12):
        space = vit(depth=(layers - 1, layers), relaxation=relaxation)
        step = space.expected_cost if costly else space.relax
        _, mixture = random_mixture(space)
        step(mixture)  # the first time makes the tables
        with Operations() as operations:
            step(mixture)
        counts.append(operations.counts)
    assert counts[0] == counts[1]
    assert counts[0]["aten::mul" if costly else "aten::bmm"]


# Errors.


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {**w, "widths": w["width"]}, "unknown choice of 'language' 'widths'. Did you mean 'width'"),
        (lambda w: {**w, "edges": torch.ones(2)}, "unknown choice of 'language' 'edges'"),  # it is no space of cells
        (lambda w: without(w, "heads"), r"the mixture's 'heads' has shape None, expected \(2, 3\)"),
        (lambda w: {**w, "heads": w["heads"][0]}, r"'heads' has shape \(3,\), expected \(2, 3\)"),
        (lambda w: {**w, "width": w["width"][:2]}, r"'width' has shape \(2,\), expected \(3,\)"),
        (lambda w: {**w, "width": w["width"] * 2}, "rows of 3 options must be non-negative and sum to 1"),
        (lambda w: {**w, "layers": torch.tensor([1.5, -0.5]).double()}, "rows of 2 options must be non-neg"),
        (lambda w: {**w, "width": w["width"] * torch.nan}, "rows of 3 options must be non-neg"),
    ],
)
def test_a_mixture_that_is_none_is_refused(change, message):
    space = make("language")
    weights = change(random_mixture(space)[1])
    for use in (space.mixture, space.relax, space.expected_cost):
        with pytest.raises(TangleNASError, match=message):
            use(weights)


def test_every_pair_of_sides_is_covered_once():
    """A chain of three sizes, a-b and b-c sharing a choice each, is one mask over all three."""
    space = SearchSpace()
    a, b = space.choice("a", (1, 2)), space.choice("b", (2, 1))
    layer = Parameter("read", a, a * b, b)
    nn.init.ones_(layer.value)
    p, q = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    space.relax({"a": p, "b": q})
    expected = torch.zeros(2, 4, 2)
    for (i, m), (j, n) in itertools.product(enumerate(a.options), enumerate(b.options)):
        expected[:m, : m * n, :n] += p[i] * q[j]
    torch.testing.assert_close(layer(1.0), expected)


class Nested(SearchSpace):
    """A number of stages, a depth for each, and a kernel size for each of their layers."""

    def __init__(self):
        super().__init__()
        depth = self.choice("depth", (1, 3, 2), per=self.choice("stages", (2, 1)))
        self.choice("kernel_size", (3, 5), per=[*depth])


def mixture_of(space, generator):
    """A random mixture in float64."""
    drawn = {n: torch.randn(rows, n, generator=generator).double() for n, rows in space.stacks.items()}
    return space.mixture({count: (2 * stack).softmax(1) for count, stack in drawn.items()})


@pytest.mark.parametrize("make_space", [Nested, vit])
@pytest.mark.parametrize("reversed_layers", [False, True])
def test_entropy_is_that_of_the_architectures_over_that_of_even_options(make_space, reversed_layers):
    space = make_space()
    if reversed_layers:
        depths = {row.gate[0] for row in space.rows if row.gate}
        space.superposition.ranks = {(d.rows[0], d.values): tuple(range(d.max))[::-1] for d in depths}
    mixture = mixture_of(space, torch.Generator().manual_seed(0))
    chances, most = dict[frozenset, float](), 0.0
    for picks in combinations(space.rows):
        chance = math.prod(mixture.stacks[len(row.options)][row.slot, pick].item() for row, pick in picks.items())
        used = frozenset((row, pick) for row, pick in picks.items() if row.active(picks))
        chances[used] = chances.get(used, 0.0) + chance
        most += chance * sum(math.log(len(row.options)) for row, _ in used)
    assert len(chances) == space.size
    assert mixture.entropy() == pytest.approx(-sum(p * math.log(p) for p in chances.values()) / most)


@pytest.mark.parametrize("make_space", [Nested, vit])
@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_entropy_is_0_where_one_architecture_is_left(make_space, end):
    space = make_space()
    picks = space.assignment_of(getattr(space, end)())
    weights = {count: torch.full((rows, count), 1 / count) for count, rows in space.stacks.items()}
    for row in (row for row in space.rows if row.active(picks)):
        weights[len(row.options)][row.slot] = torch.eye(len(row.options))[picks[row]]
    assert space.mixture(weights).entropy() == 0


def test_entropy_is_1_where_all_options_are_even_and_there_is_none_without_options():
    space = make("stages")
    assert space.mixture({n: torch.full((rows, n), 1 / n) for n, rows in space.stacks.items()}).entropy() == 1
    decided = vit(num_heads=(2,), depth=(2,), mlp_ratio=(2,), embed_dim=(8,))
    assert decided.one_hot(decided.largest()).entropy() == 0


def test_entropy_is_relative_to_the_options_that_are_left():
    space = make("stages")
    left = {count: torch.zeros(rows, count) for count, rows in space.stacks.items()}
    for stack in left.values():
        stack[:, :2] = 0.5
    assert {3} & {*space.stacks}, "a row has dropped an option"
    assert space.mixture(left).entropy() == pytest.approx(1)


def test_the_example_in_the_readme():
    page = (Path(superposition.__file__).parent / "README.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["mask"].allclose(torch.tensor([[1, 0.75], [0.9, 0.75], [0.45, 0.45], [0.45, 0.45]]))
