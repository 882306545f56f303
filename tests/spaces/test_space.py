"""What holds for every search space: corners are the extracted networks, everything learns, sizes count."""

import copy
import itertools
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from architectures import every_assignment, put, some_architectures
from spaces import LAYERS, REGISTERED, SPACES, Convolutional, Language, inputs, make, random_mixture
from torch import nn

from tanglenas_engine import Architecture, SearchSpace, create_space, elastic
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.mixture import Superposition
from tanglenas_engine.superposition.size import Size

EVERY = [*SPACES, *LAYERS, *REGISTERED]
OWN_STANDALONE = [name for name in SPACES if not name.startswith("vit")]


paths = pytest.mark.parametrize("path", ["hard", "exact", "gated"])


@paths
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.part(3)
def test_a_corner_is_the_extracted_network(name, path):
    space = make(name)
    saved = copy.deepcopy(space.state_dict())
    for architecture in some_architectures(space, 6):
        for training in (True, False):
            space.load_state_dict(saved)
            space.train(training)
            network, x = space.extract(architecture), inputs(space, 3)
            assert network.training == training
            y = put(space, path, architecture)(x)
            torch.testing.assert_close(y, network(x), rtol=1e-9, atol=1e-10)
            # In train mode, what batch norm has seen of the batch is a part of the network too.
            seen = space.inherited(architecture)
            for key, value in network.state_dict().items():
                torch.testing.assert_close(seen[key], value)


@paths
@pytest.mark.parametrize("name", [*SPACES, *LAYERS])
@pytest.mark.part(3)
@pytest.mark.slow
def test_a_training_step_at_a_corner_is_one_of_the_extracted_network(name, path):
    for architecture in some_architectures(make(name), 4):
        space = make(name)
        network, x = space.extract(architecture), inputs(space, 4)
        put(space, path, architecture)
        for model in (space, network):
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(x).square().sum().backward()
            optimizer.step()
        stepped = space.inherited(architecture)
        assert stepped.keys() == network.state_dict().keys()
        for key, value in network.state_dict().items():
            torch.testing.assert_close(stepped[key], value, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(put(space.eval(), path, architecture)(x), network.eval()(x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("relaxation", ["exact", "gated", "paper"])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.part(3)
def test_every_alpha_and_every_weight_gets_a_gradient(name, relaxation):
    space = make(name, relaxation=relaxation)
    alphas, mixture = random_mixture(space)
    space.relax(mixture)
    # In train mode a batch norm undoes whatever shifts all of its input: there some biases have no say.
    sum(space.train(mode)(inputs(space, 4)).square().sum() for mode in (True, False)).backward()
    for choice, alpha in alphas.items():
        assert alpha.grad.isfinite().all()
        if alpha.shape[-1] > 1:
            assert (alpha.grad.abs() > 1e-10).all(), choice
    for key, parameter in space.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 1e-10, key


@pytest.mark.parametrize("name", EVERY)
def test_the_largest_architecture_is_the_released_space(name):
    space = make(name).eval()
    x = inputs(space, 2)
    if any(isinstance(module, elastic.MixedOperation) for module in space.modules()):
        # Of alternatives none is the largest: a released space has them all, and adds up what they give.
        assert set(space.extract(space.largest()).state_dict()) <= set(space.state_dict())
        return
    torch.testing.assert_close(space(x), space.extract(space.largest())(x))
    assert {k: v.shape for k, v in space.state_dict().items()} == {
        k: v.shape for k, v in space.extract(space.largest()).state_dict().items()
    }


# Sizes.


@pytest.mark.parametrize("name", [n for n in (*SPACES, "autoformer_nano") if n in SPACES or n in REGISTERED])
def test_size_counts_the_distinct_architectures(name):
    options = {"depth": (2, 1), "num_heads": (1, 2), "mlp_ratio": (1, 2)} if "nano" in name else {}
    space = make(name, **options)
    assert space.size == len({space.architecture(**a).digest for a in every_assignment(space)})


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [
        ("autoformer_t", 1_056_964_608, 10_517_272),
        ("autoformer_s", 77_103_263_459_313, 34_790_440),
        ("autoformer_b", 10_108_977_168_384, None),
    ],
)
def test_the_autoformer_spaces_are_those_of_the_paper(name, size, parameters):
    with torch.device("meta"):
        space = create_space(name, relative_position=True)
    assert space.size == size
    if parameters:
        assert sum(p.numel() for p in space.parameters()) == parameters


def test_samples_reach_every_architecture():
    space = make("stages")
    generator = torch.Generator().manual_seed(0)
    assert len({space.sample(generator).digest for _ in range(200)}) == space.size == 12


def test_samples_follow_their_generator():
    space = make("vit")
    first, again = ([space.sample(torch.Generator().manual_seed(s)) for s in (1, 2)] for _ in range(2))
    assert first == again
    assert first[0] != first[1]


def test_largest_and_smallest_go_by_value_whatever_the_order_of_options():
    space = make("language")
    assert space.largest().choices["width"] == 8
    assert space.smallest().choices == {
        "width": 4, "layers": 1, "heads": (1,), "ratio": (0.5,), "multiple": 1,
    }  # fmt: skip


class Operations(SearchSpace):
    """A named choice for each layer of a depth."""

    def __init__(self, depth=(1, 2), **options):
        super().__init__(**options)
        layers = self.choice("depth", depth)
        kinds = self.choice("kind", ("small", "large"), per=layers)
        family = {"conv": ({"small": 1, "large": 3}, lambda kernel: elastic.Conv2d(4, 4, kernel, bias=False))}
        operations = [elastic.MixedOperation.of(kinds[i], family) for i in range(layers.max)]
        self.layers = elastic.Depth(layers, operations)

    def forward(self, x):
        return self.layers(x).mean((2, 3))

    def example_input(self, batch):
        return torch.randn(batch, 4, 8, 8)


@pytest.mark.parametrize("depth", [(1, 2), (2, 1)], ids=str)
def test_the_largest_has_the_largest_of_named_options_in_every_layer(depth):
    space = Operations(depth)
    largest = space.largest()
    assert largest.choices == {"depth": 2, "kind": ("large", "large")}
    costs = [space.cost(space.sample(torch.Generator().manual_seed(seed))).params for seed in range(40)]
    assert space.cost(largest).params == max(costs)
    assert space.cost(space.smallest()).params == min(costs)


# Standalone networks and copies.


def instances_within(root):
    """All objects that `root` holds in attributes and containers; classes, functions and tensors end a path."""
    seen, pending = {}, [root]
    while pending:
        thing = pending.pop()
        if (
            id(thing) in seen
            or isinstance(thing, str | torch.Tensor | type)
            or callable(thing) != isinstance(thing, nn.Module)
        ):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Mapping):
            pending.extend(thing.values())
        if isinstance(thing, Iterable) and not isinstance(thing, nn.Module | Size):
            pending.extend(thing)
        pending.extend(vars(thing).values() if hasattr(thing, "__dict__") else ())
    return list(seen.values())


@pytest.mark.parametrize("name", EVERY)
def test_an_extracted_network_holds_nothing_of_its_space(name):
    space = make(name)
    space.relax(random_mixture(space)[1])
    network = space.extract(space.smallest())
    held = instances_within(network)
    assert not [thing for thing in held if isinstance(thing, SearchSpace | Superposition | Size)]
    mine, theirs = ({id(m) for m in model.modules()} for model in (network, space))
    assert not mine & theirs
    network.register_forward_hook(lambda *_: pytest.fail("a hook of the network ran in the space"))
    for module in network.modules():
        module.register_forward_hook(lambda *_: pytest.fail("a hook of the network ran in the space"))
    space(inputs(space, 2))


@pytest.mark.parametrize("name", OWN_STANDALONE)
def test_a_standalone_network_trains_and_is_saved_by_itself(name, tmp_path):
    space = make(name)
    architecture = space.sample(torch.Generator().manual_seed(3))
    network = space.extract(architecture)
    assert not isinstance(network, SearchSpace)
    assert not any(type(m) in (elastic.Linear, elastic.Conv2d, elastic.Depth) for m in network.modules())
    assert network.state_dict().keys() == space.inherited(architecture).keys()

    before, x = copy.deepcopy(space.state_dict()), inputs(space, 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(network(x).square().sum())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for key, value in space.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)

    torch.save(network.state_dict(), tmp_path / "network.pt")
    again = space.standalone(architecture).double()
    again.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    torch.testing.assert_close(again.eval()(x), network.eval()(x))
    torch.testing.assert_close(copy.deepcopy(network)(x), network(x))


@pytest.mark.parametrize("state", ["release", "select", "relax"])
@pytest.mark.parametrize("name", SPACES)
def test_a_copy_of_a_space_is_independent(name, state):
    space = make(name)
    if state == "select":
        space.select(space.smallest())
    elif state == "relax":
        space.relax(random_mixture(space)[1])
    space.eval()
    twin, x = copy.deepcopy(space), inputs(space, 2)
    y = space(x).detach()
    torch.testing.assert_close(twin(x), y)
    assert twin.size == space.size
    assert not {id(row) for row in twin.rows} & {id(row) for row in space.rows}

    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.select(twin.largest())
    torch.testing.assert_close(space(x), y)
    small = space.smallest()
    assert twin.cost(small) == space.cost(small)
    put(twin, "exact", small)(x)


def test_an_export_holds_the_architecture_and_the_weights(tmp_path):
    from safetensors.torch import load_file

    from tanglenas_engine import Architecture

    space = make("convolutional")
    architecture = space.smallest()
    network = space.extract(architecture)
    space.export(network, architecture, tmp_path / "new" / "folder")
    read = Architecture.from_json((tmp_path / "new" / "folder" / "architecture.json").read_text())
    assert read == architecture
    weights = load_file(tmp_path / "new" / "folder" / "model.safetensors")
    assert weights.keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        assert torch.equal(weights[key], value)


# The state of the next forwards.


def test_relax_select_and_release_replace_each_other():
    space = make("vit").eval()
    x, small = inputs(space, 2), space.smallest()
    full, cut = space(x), space.extract(small)(x)
    mixed = space.relax(random_mixture(space)[1])(x)
    assert not torch.allclose(mixed, full)
    torch.testing.assert_close(space.select(small)(x), cut)
    torch.testing.assert_close(space.relax(space.one_hot(small))(x), cut)
    torch.testing.assert_close(space.release()(x), full)
    space.select(small)
    space.relaxation = "paper"
    torch.testing.assert_close(space(x), full)


def test_relaxations_agree_on_nothing_but_the_corners():
    torch.manual_seed(3)
    space = make("vit").eval()
    x, (_, mixture) = inputs(space, 2), random_mixture(space)
    outputs = []
    for relaxation in ("exact", "gated", "paper"):
        space.relaxation = relaxation
        outputs.append(space.relax(mixture)(x))
    for a, b in itertools.combinations(outputs, 2):
        assert not torch.allclose(a, b)


# Errors.


def test_an_unknown_relaxation_names_the_closest():
    with pytest.raises(TangleNASError, match=r"unknown relaxation 'gate'. Did you mean 'gated'\?"):
        SearchSpace(relaxation="gate")
    space = make("vit")
    with pytest.raises(TangleNASError, match="Choose one of: exact, gated, paper"):
        space.relaxation = "soft"
    assert space.relaxation == "exact"


def test_a_sharing_that_a_space_cannot_do_lists_those_it_can():
    with pytest.raises(TangleNASError, match=r"Language cannot do sharing 'separate': .*: superposed"):
        Language(sharing="separate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "has no options: give at least one"),
        ((3, 3), "lists an option twice"),
        ((3, 3.0), "lists an option twice"),
        ({4, 8}, "has the options {8, 4}: give a list of them, which has an order"),
        (frozenset("a"), "give a list of them"),
        (np.array(4), r"has the options array\(4\): give a list of them"),
        ((Fraction(1, 2), 1), r"has the option Fraction\(1, 2\): options are finite positive ints or floats"),
        ((Decimal(4), 8), r"has the option Decimal\('4'\): options are finite positive ints or floats"),
        ((3, -1), "has the option -1: options are finite positive ints or floats"),
        ((0,), "has the option 0: options are finite positive ints or floats"),
        ((4, float("inf")), "has the option inf: options are finite positive ints or floats"),
        ((float("nan"),), "options are finite positive ints or floats"),
        ((True,), "has the option True"),
        (("3", 3), "has the option '3': options are finite positive ints or floats, or all of them names"),
        (("a", ""), "has the option ''"),
        ("345", "has the options '345': give a list"),
    ],
)
def test_options_are_distinct_positive_numbers(options, message):
    with pytest.raises(TangleNASError, match=f"choice 'width' {message}|.*{message}"):
        SearchSpace().choice("width", options)


def test_a_number_alone_is_a_choice_of_one_option():
    assert SearchSpace().choice("width", 3).options == (3,)


def test_a_choice_is_declared_once():
    space = SearchSpace()
    space.choice("width", (1, 2))
    with pytest.raises(TangleNASError, match="choice 'width' is declared twice in SearchSpace"):
        space.choice("width", (1, 2))


def test_a_choice_made_once_takes_no_index():
    with pytest.raises(TangleNASError, match="'width' is made once, not per layer: use it without an index"):
        SearchSpace().choice("width", (1, 2))[0]


def test_an_author_who_forgets_the_example_input_is_told():
    with pytest.raises(NotImplementedError, match="SearchSpace must say what its input looks like"):
        SearchSpace().example_input(1)


@pytest.mark.parametrize("options", [np.array([4, 8]), [np.int64(4), np.float32(8)], (it for it in (4, 8))])
def test_options_may_be_numbers_of_numpy(options):
    space = SearchSpace()
    space.choice("width", options)
    assert space.choices["width"].options == (4, 8)
    assert Architecture.from_json(space.largest().to_json()) == space.largest()


@pytest.mark.parametrize(
    "weights", [[0.2, 0.3, 0.5], np.array([0.2, 0.3, 0.5]), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)]
)
def test_weights_of_a_mixture_may_have_any_type_of_numbers(weights):
    space = Convolutional()
    rest = {**space.one_hot(space.largest())}
    x = space.example_input(2)
    mixed = space.eval().relax({**rest, "width": weights})(x)
    assert mixed.equal(space.relax({**rest, "width": torch.tensor([0.2, 0.3, 0.5])})(x))


def test_a_mixture_of_another_type_keeps_its_gradient():
    space = Convolutional()
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    space.relax({**space.one_hot(space.largest()), "width": weights})(space.example_input(2)).sum().backward()
    assert weights.grad is not None and weights.grad.dtype == torch.float64 and weights.grad.all()
