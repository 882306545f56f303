"""The DARTS space has the paper's networks, counts and notation, and no architecture but its genotypes."""

import itertools
import re

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from tanglenas_darts.space import EDGES, OPERATIONS
from tanglenas_darts.training import FourAverages, ScheduledDropPath, WithAuxiliaryHead
from tanglenas_engine import create_space
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.errors import TangleNASError

DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], "
    "normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
    "('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], "
    "reduce_concat=[2, 3, 4, 5])"
)


def small(**options):
    return create_space("darts", **{**dict(channels=2, layers=3, image_size=8, num_classes=3), **options}).double()


def random_mixture(space, scale=1.0):
    return space.mixture({n: (scale * torch.randn(c.shape).double()).softmax(-1) for n, c in space.choices.items()})


def nodes(architecture):
    """The edges that are there: for each cell and node a list of (source, operation)."""
    return [
        [(s, o) for o, (n, s) in zip(operations, EDGES, strict=True) if n == node and o != "none"]
        for operations in architecture.choices.values()
        for node in range(4)
    ]


# Networks.


@pytest.mark.exhaustive
def test_a_published_network_has_its_published_size():
    with torch.device("meta"):
        space = create_space("darts", layers=20, channels=36, affine=True, pool_norm=False)
    assert space.cost(space.from_string(DARTS_V2)).params == 3_349_342


@pytest.mark.exhaustive
def test_a_network_for_retraining_takes_the_architecture_of_the_search():
    space, larger = small(), small(layers=6, channels=4, affine=True, pool_norm=False)
    architecture = space.from_string(DARTS_V2)
    network = larger.standalone(architecture)
    assert sum(p.numel() for p in network.parameters()) == larger.cost(architecture).params
    assert not any(isinstance(a, nn.MaxPool2d) and isinstance(b, nn.BatchNorm2d) for a, b in
                   itertools.pairwise(network.modules()))  # fmt: skip
    assert network.double()(space.example_input(2).double()).shape == (2, 3)


def test_a_cell_sums_two_edges_in_each_node_and_concatenates_the_nodes():
    space = small(layers=2).eval()  # two reduction cells
    text = DARTS_V2.replace("skip_connect", "dil_conv_5x5")
    cell = space.extract(space.from_string(text)).cells[1]
    before, last = torch.randn(2, 6, 8, 8).double(), torch.randn(2, 16, 4, 4).double()
    with torch.no_grad():
        a, b = cell.preprocess[0](before), cell.preprocess[1](last)
        assert a.shape == b.shape == (2, 8, 4, 4)
        edge = {key: cell.edges[i] for i, key in enumerate(EDGES)}
        n0 = edge[0, 0](a) + edge[0, 1](b)
        n1 = edge[1, 2](n0) + edge[1, 1](b)
        n2 = edge[2, 0](a) + edge[2, 2](n0)
        n3 = edge[3, 2](n0) + edge[3, 1](b)
        torch.testing.assert_close(cell(before, last), torch.cat([n0, n1, n2, n3], 1))
        torch.testing.assert_close(
            edge[0, 0](a), nn.functional.max_pool2d(a, 3, 2, 1) / (1 + 1e-5) ** 0.5, rtol=1e-9, atol=0
        )


# Training the network found.


def chosen(text=DARTS_V2, **options):
    space = small(**options)
    return space.standalone(space.from_string(text)).double(), space.example_input(64).double()


def test_drop_path_rises_with_the_training_and_is_a_matter_of_training():
    network, images = chosen(drop_path=0.4)
    paths = [module for module in network.modules() if isinstance(module, ScheduledDropPath)]
    assert len(paths) == 3
    plain, _ = chosen()
    plain.load_state_dict(network.state_dict())
    for model in (network, plain):  # before it is told of any progress, nothing is dropped
        model.train()
    torch.testing.assert_close(network(images), plain(images))
    for path in paths:
        path.set_progress(0.5)
    assert {path.p for path in paths} == {0.2}
    assert not torch.allclose(network(images), network(images))
    torch.testing.assert_close(network.eval()(images), network(images))


def test_drop_path_takes_an_edge_from_single_images_but_never_the_identity():
    text = DARTS_V2.replace("sep_conv_3x3", "skip_connect").replace("dil_conv_3x3", "skip_connect")
    network, _ = chosen(text, drop_path=0.75)
    normal, reduction = network.train().cells[0], network.cells[1]
    x = torch.rand(400, 2, 4, 4).double() + 1
    for cell in (normal, reduction):
        cell.drop_path.set_progress(1.0)
    assert normal._through(normal.edges[0], x) is x
    edge = reduction.edges[0]  # a pooling
    kept = reduction._through(edge, x.repeat(1, 2, 1, 1)).flatten(1)
    whole = edge(x.repeat(1, 2, 1, 1)).flatten(1)
    there = kept.abs().sum(1) > 0
    torch.testing.assert_close(kept[there], 4 * whole[there])
    assert 60 < there.sum() < 140 and not kept[~there].any()


@pytest.mark.exhaustive
def test_the_auxiliary_head_is_that_of_the_paper():
    with torch.device("meta"):
        space = create_space("darts", layers=20, channels=36, affine=True, pool_norm=False)
        whole = WithAuxiliaryHead(space.standalone(space.from_string(DARTS_V2)))
        logits, auxiliary = whole.train()(space.example_input(2))
    assert whole.cell == 13 and logits.shape == auxiliary.shape == (2, 10)
    # 1x1 convolution and norm, 2x2 convolution and norm, classifier
    parts = 576 * 128 + 2 * 128, 4 * 128 * 768 + 2 * 768, 768 * 10 + 10
    assert sum(p.numel() for p in whole.auxiliary.parameters()) == sum(parts)


def test_the_auxiliary_head_reads_the_cell_at_two_thirds_and_only_in_training():
    network, images = chosen(layers=6)
    whole = WithAuxiliaryHead(network).double()
    seen = []
    network.cells[4].register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.manual_seed(1)
    logits, auxiliary = whole.train()(images)
    torch.testing.assert_close(logits, network(images))
    torch.testing.assert_close(auxiliary, whole.auxiliary(seen[0]))
    auxiliary.sum().backward()
    reached = [any(p.grad is not None for p in cell.parameters()) for cell in network.cells]
    assert reached == [True] * 5 + [False]
    torch.testing.assert_close(whole.eval()(images), network(images))


def test_the_auxiliary_head_averages_four_windows():
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(FourAverages()(x), nn.functional.avg_pool2d(x, 5, 3))  # as in the paper
    for side in (2, 3, 5, 7, 16, 56):
        assert FourAverages()(torch.randn(2, 3, side, side)).shape == (2, 3, 2, 2)
    network, _ = chosen(image_size=4)
    with pytest.raises(TangleNASError, match="use images of at least 8 x 8"):
        WithAuxiliaryHead(network).double()(torch.randn(2, 3, 4, 4).double())


def test_images_that_cannot_be_halved_twice_are_refused():
    with pytest.raises(TangleNASError, match="image_size is 30"):
        create_space("darts", image_size=30)


# Architectures.


@pytest.mark.exhaustive
def test_samples_are_uniform_genotypes():
    space = small()
    drawn = [nodes(space.sample(torch.Generator().manual_seed(seed))) for seed in range(1500)]
    assert all(len(edges) == 2 for architecture in drawn for edges in architecture)
    for place in (0, 3, 6):
        sources = [tuple(source for source, _ in architecture[place]) for architecture in drawn]
        pairs = list(itertools.combinations(range(2 + place % 4), 2))
        assert len(pairs) == 1 or chisquare([sources.count(pair) for pair in pairs]).pvalue > 0.01
        operations = [operation for architecture in drawn for _, operation in architecture[place]]
        assert chisquare([operations.count(operation) for operation in OPERATIONS[1:]]).pvalue > 0.01


@pytest.mark.parametrize("shape", [(3,), (29,), (), (2, 14)])
def test_weights_of_another_number_of_edges_are_refused(shape):
    space = small()
    said = re.escape(f"the mixture's 'edges' has shape {shape}, expected (28,)")
    with pytest.raises(TangleNASError, match=said):
        space.mixture({**random_mixture(space), "edges": torch.ones(shape)})


def test_the_most_probable_architecture_has_the_two_strongest_edges_without_none():
    space = small()
    normal, reduce = torch.full((14, 8), 0.02), torch.full((14, 8), 0.02)
    normal[:, 0] = 0.9  # 'none' has no say
    for edge, operation, value in [(2, 4, 0.5), (4, 3, 0.3), (3, 7, 0.2)]:  # node 1 from sources 0, 2, 1
        normal[edge, operation] = value
    mixture = space.mixture(
        {"normal": normal / normal.sum(1, keepdim=True), "reduce": reduce / reduce.sum(1).view(-1, 1)}
    )
    found = space.most_probable(mixture)
    assert nodes(found)[1] == [(0, "sep_conv_3x3"), (2, "skip_connect")]
    assert nodes(found)[0] == [(0, "max_pool_3x3"), (1, "max_pool_3x3")]
    architecture = space.sample()
    assert space.most_probable(space.one_hot(architecture)) == architecture


@pytest.mark.exhaustive
def test_largest_and_smallest_are_genotypes_at_the_ends():
    space = small()
    largest, smallest = space.cost(space.largest()), space.cost(space.smallest())
    for seed in range(20):
        cost = space.cost(space.sample(torch.Generator().manual_seed(seed)))
        assert smallest.params <= cost.params <= largest.params
    assert {o for edges in nodes(space.largest()) for _, o in edges} == {"sep_conv_5x5"}
    for change in space.moves(space.assignment_of(space.smallest())):
        moved = space.architecture_of({**space.assignment_of(space.smallest()), **change})
        assert space.cost(moved).params >= smallest.params


def test_moves_are_the_genotypes_that_differ_in_one_edge():
    space = small()
    architecture = space.sample()
    start = space.assignment_of(architecture)
    reached = [space.architecture_of({**start, **change}) for change in space.moves(start)]
    assert all(space.assignment_of(other) and other != architecture for other in reached)
    # Another operation on each of 16 edges; from another source, in each of two cells, with any operation.
    assert len(set(reached)) == len(reached) == 16 * 6 + 2 * sum(2 * (n - 2) * 7 for n in range(2, 6))
    differ = {sum(len({*a} - {*b}) for a, b in zip(nodes(architecture), nodes(o), strict=True)) for o in reached}
    assert differ == {1}


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
@pytest.mark.part(3)
def test_a_budget_is_met_by_the_best_genotype_that_no_move_improves(share):
    torch.manual_seed(int(100 * share))
    space = small()
    low, high = (space.cost(a).params for a in (space.smallest(), space.largest()))
    budget = {"params": int(low + share * (high - low)), "macs": None}
    mixture = random_mixture(space)
    found = Budget(space, budget).project(mixture).architecture
    assert space.cost(found).params <= budget["params"]
    picks, scores = space.assignment_of(found), space.scores(mixture)
    for change in space.moves(picks):
        if space.cost(space.architecture_of({**picks, **change})).params <= budget["params"]:
            assert sum(scores[row][i] - scores[row][picks[row]] for row, i in change.items()) <= 1e-9
    assert Budget(space, {"params": high, "macs": None}).project(mixture).architecture == space.most_probable(mixture)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        architecture = Budget(space, budget).shrink(space.sample(generator), generator)
        assert space.cost(architecture).params <= budget["params"]


def test_a_node_with_one_edge_or_three_is_refused():
    space = small()
    choices = {name: list(operations) for name, operations in space.largest().choices.items()}
    for edge, operation, count in [(0, "none", 1), (4, "skip_connect", 3)]:
        broken = {**choices, "normal": [*choices["normal"][:edge], operation, *choices["normal"][edge + 1 :]]}
        with pytest.raises(
            TangleNASError, match=rf"of the normal cell has {count} edges that are not 'none', expected 2"
        ):
            space.architecture(**broken)


# Notation.


@pytest.mark.exhaustive
def test_the_usual_notation_goes_both_ways():
    space = small()
    architecture = space.from_string(DARTS_V2)
    assert nodes(architecture)[:4] == [
        [(0, "sep_conv_3x3"), (1, "sep_conv_3x3")],
        [(0, "sep_conv_3x3"), (1, "sep_conv_3x3")],
        [(0, "skip_connect"), (1, "sep_conv_3x3")],
        [(0, "skip_connect"), (2, "dil_conv_3x3")],
    ]
    for architecture in (space.from_string(DARTS_V2), space.sample(), space.largest()):
        text = space.to_string(architecture)
        assert text.startswith("Genotype(normal=[('") and text.endswith(", reduce_concat=range(2, 6))")
        assert space.from_string(text) == architecture


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Genotype", "Genome", "is not an architecture of 'darts'"),
        ("normal_concat=[2, 3, 4, 5]", "normal_concat=[3, 4, 5]", "is not an architecture of 'darts'"),
        (
            "('sep_conv_3x3', 1), ('skip_connect', 0)",
            "('sep_conv_3x3', 4), ('skip_connect', 0)",
            "from sources before it",
        ),
        ("('dil_conv_3x3', 2)]", "('dil_conv_3x3', 2), ('dil_conv_3x3', 2)]", "with two edges"),
        ("('dil_conv_3x3', 2)", "('dil_conv_3x3', 0)", "node 3 of the normal cell has 1 edges"),
        ("dil_conv_3x3", "dil_conv_7x7", "is 'dil_conv_7x7', expected one of none, max_pool_3x3"),
        ("dil_conv_3x3", "none", "node 3 of the normal cell has 1 edges"),
    ],
)
def test_other_texts_are_refused(old, new, message):
    assert old in DARTS_V2
    with pytest.raises(TangleNASError) as caught:
        small().from_string(DARTS_V2.replace(old, new))
    assert message in str(caught.value)
