"""Costs are what counting the extracted network gives, at every corner and in expectation."""

import copy
import itertools

import pytest
import timm.layers
import torch
from architectures import counted, every_assignment, some_architectures
from spaces import LAYERS, REGISTERED, SPACES, inputs, make, random_mixture
from torch.nn.attention import SDPBackend, sdpa_kernel

from tanglenas_engine import Additive, Objective, create_space
from tanglenas_engine.spaces.architectures import weights_of
from tanglenas_engine.spaces.cost import METRICS


@pytest.fixture(autouse=True)
def attention_in_plain_products():
    """torch's counter knows no fused attention on CPUs."""
    fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    timm.layers.set_fused_attn(bool(fused))


@pytest.mark.parametrize("name", [*SPACES, *LAYERS, *REGISTERED])
@pytest.mark.part(2)
@pytest.mark.slow
def test_the_cost_is_what_the_extracted_network_counts(name):
    space = make(name)
    for architecture in some_architectures(space, 8):
        cost = space.cost(architecture)
        assert isinstance(cost.params, int)
        assert isinstance(cost.flops, int)
        assert (cost.params, cost.flops) == counted(space.extract(architecture), inputs(space, 1))
        expected = space.expected_cost(space.one_hot(architecture))
        assert (expected.params.item(), expected.flops.item()) == (cost.params, cost.flops)


@pytest.mark.parametrize("name", SPACES)
def test_the_expected_cost_is_the_expectation_over_all_architectures(name):
    small = {"depth": (2, 1)} if name.startswith("vit") else {}
    space = make(name, **small)
    weights = {n: w.detach() for n, w in random_mixture(space)[1].items()}
    params = flops = probabilities = 0.0
    for chosen in every_assignment(space):
        probability = 1.0
        for choice, options in chosen.items():
            listed = space.choices[choice].options
            rows = weights[choice].reshape(-1, len(listed))
            for row, option in zip(rows, options if isinstance(options, tuple) else [options], strict=True):
                probability *= row[listed.index(option)].item()
        cost = space.cost(space.architecture(**chosen))
        params += probability * cost.params
        flops += probability * cost.flops
        probabilities += probability
    assert probabilities == pytest.approx(1)
    expected = space.expected_cost(weights)
    assert expected.params.item() == pytest.approx(params, rel=1e-12)
    assert expected.flops.item() == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize("name", SPACES)
def test_the_gradient_of_the_expected_cost(name):
    space = make(name)
    largest = space.cost(space.largest())

    def relative(*alphas):
        mixture = dict(zip(space.choices, (a.softmax(-1) for a in alphas), strict=True))
        cost = space.expected_cost(mixture)
        return cost.params / largest.params, cost.flops / largest.flops

    alphas = list(random_mixture(space)[0].values())
    assert torch.autograd.gradcheck(relative, alphas)


def chances(space, mixture):
    """The alternatives of each decision with their probabilities, which are in proportion to exponentials of scores."""
    scores = space.scores(mixture)
    for alternatives in space.decisions():
        weights = weights_of(alternatives, scores)
        yield [(picks, weight / sum(weights)) for picks, weight in zip(alternatives, weights, strict=True)]


def with_edges(space, lead=0.0):
    """A random mixture with weights of edges, which decide in darts which edges are kept.

    With a lead, the option "none" has it over all others in alpha, and the first edge has no weight.
    """
    alphas = {name: alpha.detach() for name, alpha in random_mixture(space)[0].items()}
    for name, choice in space.choices.items():
        alphas[name][..., choice.options.index("none")] += lead
    mixture = space.mixture({name: alpha.softmax(-1) for name, alpha in alphas.items()})
    mixture.edges = {row: torch.rand((), dtype=torch.float64) for row in space.edge_rows}
    if lead:
        mixture.edges[space.edge_rows[0]] *= 0
    return mixture


@pytest.mark.parametrize("name, lead", [("nb201", 0.0), ("darts", 0.0), ("darts", 30.0)])
def test_the_expected_cost_of_a_cell_is_the_mean_of_the_edges_that_architectures_have(name, lead):
    space = make(name)
    mixture = with_edges(space, lead)
    expected = space.expected_cost(mixture)
    for metric in METRICS:
        terms = space.terms(metric)
        nothing = {row: row.options.index("none") for row in space.rows}
        constant = terms.cost(nothing)
        by_hand = constant + sum(
            probability * (terms.cost({**nothing, **picks}) - constant)
            for alternatives in chances(space, mixture)
            for picks, probability in alternatives
        )
        assert getattr(expected, metric).item() == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_a_table_over_rows_of_several_decisions_has_the_mean_over_architectures(order):
    space = make("darts")
    (one, _, _, other, *_), mixture = space.nodes(), with_edges(space)
    rows = tuple((one[0], one[1], other[3])[i] for i in order)
    terms = Additive({rows: torch.rand(8**3, generator=torch.Generator().manual_seed(0)).tolist()})
    first, _, _, last, *_ = chances(space, mixture)
    by_hand = sum(p * q * terms.cost({**picks, **others}) for (picks, p), (others, q) in itertools.product(first, last))
    objective = Objective()
    objective.terms = lambda space: terms
    found = objective.bind(space).expected(mixture)
    assert found.item() == space.expectation_of(terms, mixture).item() == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("lead", [30.0, 90.0])
def test_the_gradient_of_an_expected_cost_is_finite_where_alpha_is_decided(lead):
    space = make("darts")
    alphas = {name: torch.zeros(choice.shape) for name, choice in space.choices.items()}
    for name, choice in space.choices.items():
        alphas[name][..., choice.options.index("none")] = lead
        alphas[name].requires_grad_()
    space.expected_cost({name: alpha.softmax(-1) for name, alpha in alphas.items()}).params.backward()
    assert all(alpha.grad.isfinite().all() for alpha in alphas.values())


def test_the_gradient_of_an_expected_cost_reaches_the_weights_of_edges():
    space = make("darts")
    mixture = with_edges(space)
    weights = [*mixture.stacks.values(), *mixture.edges.values()]
    for tensor in weights:
        tensor.requires_grad_()
    scale = space.cost(space.largest()).macs

    def share(*given):
        return space.expected_cost(mixture.replaced(given)).macs / scale

    assert torch.autograd.gradcheck(share, weights)
    assert all(bool(gradient.any()) for gradient in torch.autograd.grad(share(*weights), weights))


def test_expected_costs_of_float32_mixtures_are_exact_for_their_weights():
    """Products of single-precision weights are taken in double precision."""
    space = make("vit").float()
    weights = {name: weights.detach() for name, weights in random_mixture(space)[1].items()}
    double = {name: weights.double() for name, weights in weights.items()}
    for metric in METRICS:
        one, other = (getattr(space.expected_cost(mixture), metric).item() for mixture in (weights, double))
        assert one == other


def test_expected_costs_of_float32_mixtures_are_counted_in_float64():
    space = make("vit").float()
    cost = space.expected_cost(random_mixture(space)[1])
    assert cost.params.dtype == cost.flops.dtype == torch.float64


@pytest.mark.slow
def test_the_cost_of_a_published_size():
    with torch.device("meta"):
        space = create_space("autoformer_t", relative_position=True)
    assert space.cost(space.largest()).params == 10_517_272


@pytest.mark.parametrize("name", SPACES)
def test_asking_for_a_cost_changes_nothing(name):
    space = make(name).train()
    space.relax(random_mixture(space)[1])
    next(iter(space.modules())).training = True
    frozen = [m for m in space.modules()][-1].eval()  # a part that its author keeps in evaluation mode
    state, modes = copy.deepcopy(space.state_dict()), [m.training for m in space.modules()]
    random = torch.get_rng_state()
    space.cost(space.smallest())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in space.modules()] == modes
    assert not frozen.training
    for key, value in space.state_dict().items():
        assert torch.equal(value, state[key])
    assert space.superposition.mixture is not None
    assert not any(m._forward_hooks for m in space.modules())


def test_larger_options_cost_more():
    space = make("language")
    for name, choice in space.choices.items():
        by_option = []
        for option in sorted(choice.options):
            chosen = {**space.largest().choices, name: (option,) * 2 if choice.layered else option}
            by_option.append(space.cost(space.architecture(**chosen)))
        for less, more in itertools.pairwise(by_option):
            assert less.params < more.params
            assert less.flops < more.flops
