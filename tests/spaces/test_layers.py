"""Layers in order: a smaller depth drops the ones that matter least, and all forms of an architecture agree on it."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from architectures import counted, put
from spaces import Layer, Layered, inputs, make, random_mixture
from tiny import tiny
from torch import nn

from tanglenas_engine import SearchSpace, create_space, elastic, elasticize
from tanglenas_engine.elastic.depth import Depth
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.weights import load_state, save_weights
from tanglenas_engine.spaces.layers import order_layers
from tanglenas_engine.spaces.pretrained import load_pretrained

NAMES = [
    "vit",
    "vit_relative",
    "stages",
    "language",
    "gpt_nano",
    "llama_nano",
    "resnet_nano",
    "convnext_nano",
    "layered",
]


def depths(space):
    return [module for module in space.modules() if isinstance(module, Depth) and module.depth.min < module.depth.max]


def shuffled(name):
    """A space in float64 whose depths keep their last layers first. A layer that changes the shape goes first."""
    space = make(name).eval()
    assert depths(space)
    for depth in depths(space):
        first = [0] if name in ("resnet_nano", "layered") else []
        depth.put_in_order([*first, *(i for i in reversed(range(len(depth))) if i not in first)])
    return space


def architectures(space, count=6):
    generator = torch.Generator().manual_seed(1)
    return [space.smallest(), space.largest(), *(space.sample(generator) for _ in range(count))]


@pytest.mark.parametrize("path", ["hard", "exact", "gated"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.part(3)
def test_a_corner_is_the_extracted_network(name, path):
    space = shuffled(name)
    for architecture in architectures(space):
        network, x = space.extract(architecture), inputs(space, 2)
        torch.testing.assert_close(put(space, path, architecture)(x), network(x), rtol=1e-9, atol=1e-10)
        assert space.architecture_of(space.assignment_of(architecture)) == architecture


@pytest.mark.parametrize("name", ["vit", "llama_nano", "resnet_nano", "layered"])
def test_costs_are_those_of_the_extracted_network(name):
    space = shuffled(name)
    for architecture in architectures(space, 3):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            found = counted(space.extract(architecture), inputs(space, 1))
        cost = space.cost(architecture)
        assert (cost.params, cost.macs) == found
        assert space.expected_cost(space.one_hot(architecture)).params.item() == cost.params


@pytest.mark.parametrize("name", ["vit", "gpt_nano", "resnet_nano", "layered"])
def test_every_alpha_and_every_weight_gets_a_gradient(name):
    space = shuffled(name)
    alphas, mixture = random_mixture(space)
    space.relax(mixture)(inputs(space, 4)).square().sum().backward()
    for alpha in (alpha for alpha in alphas.values() if alpha.shape[-1] > 1):
        assert alpha.grad.isfinite().all() and (alpha.grad.abs() > 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in space.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_is_the_same_network_with_and_without_an_order(name):
    space, ordered = make(name), shuffled(name)
    for architecture in architectures(space, 3):
        shapes = [
            {key: tensor.shape for key, tensor in it.standalone(architecture).state_dict().items()}
            for it in (space, ordered)
        ]
        assert shapes[0] == shapes[1] == {key: x.shape for key, x in ordered.inherited(architecture).items()}


def elasticized(model):
    return elasticize(model, torch.randn(4, 6))


@pytest.mark.parametrize("frozen", [False, True])
def test_new_networks_of_a_model_begin_as_the_layers_that_they_keep(frozen):
    model = Layered()
    for layer in model.layers[1:]:
        layer.norm.requires_grad_(not frozen)
    space = elasticized(model)
    space.layers.put_in_order([0, 4, 2, 1, 3])
    architecture = space.architecture(**{**space.smallest().choices, "layers.depth": 4, "layers.up": [8, 8, 8]})
    network = space.standalone(architecture)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm1d)}
    assert [*norms] == ["layers.1.norm", "layers.2.norm", "layers.3.norm"]
    assert [norm.weight[0].item() for norm in norms.values()] == [1, 2, 4]
    assert [norm.running_mean[0].item() for norm in norms.values()] == ([1, 2, 4] if frozen else [0, 0, 0])


class Again(Layered):
    """Calls a part of a layer once more."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.layers[1].norm(x))


class Behind(Layered):
    """Has a layer behind the others with the bias of one of them."""

    def __init__(self):
        super().__init__()
        self.behind = nn.Linear(16, 16)
        self.behind.bias = self.layers[2].down.bias

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.behind(x))


class Scaled(Layer):
    """A layer with a number of its own."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number

    def forward(self, x):
        return super().forward(x) * self.number


class Masked(Layer):
    """A layer with a buffer that is not saved."""

    def __init__(self, number):
        super().__init__(number)
        self.register_buffer("mask", torch.arange(6) == number, persistent=False)

    def forward(self, x):
        return super().forward(x) + self.mask.sum() * 0 + self.mask[0] + self.mask[1]


class Gate(nn.Module):
    """Adds a function of its input where this is not 0, so that it is called as a whole."""

    def __init__(self, function=torch.relu, factors=(1.0,), shift=0.0, power=1):
        super().__init__()
        self.function, self.factors, self.shift, self._power = function, [*factors], torch.tensor(shift), power

    def forward(self, x):
        if x.abs().sum() > 0:
            x = x + self.function(x) ** self._power * self.factors[0] + self.shift
        return x


class Gated(Layer):
    """A layer with a gate."""

    def __init__(self, number, **options):
        super().__init__(number)
        self.gate = Gate(**options)

    def forward(self, x):
        return self.gate(super().forward(x))


def gated(**options):
    """Return a model whose third layer has other options than the others. A fresh `partial` is none."""
    default = {"function": partial(F.leaky_relu, negative_slope=0.5)}
    return Layered([Gated(number, **(default | (options if number == 3 else {}))) for number in range(1, 5)])


def tying(names):
    """Return a model in which each parameter is that of another name."""
    model = Layered()
    for name, other in names.items():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, model.get_parameter(other))
    return model


def frozen():
    model = Layered()
    model.layers[2].up.requires_grad_(False)
    return model


DIFFERING = {
    "functions": lambda: gated(function=torch.tanh),
    "arguments": lambda: gated(function=partial(F.leaky_relu, negative_slope=0.25)),
    "lists": lambda: gated(factors=[3.0]),
    "tensors": lambda: gated(shift=3.0),
    "private": lambda: gated(power=2),
    "ties": lambda: tying({"layers.3.norm.weight": "layers.2.norm.weight"}),
    "ties in a layer": lambda: tying({"layers.2.down.bias": "layers.2.norm.bias"}),
    "ties behind": Behind,
    "frozen": frozen,
    "widths": lambda: Layered([Layer(number, hidden=16 * number) for number in range(1, 5)]),
    "numbers": lambda: Layered([*map(Scaled, range(1, 5))]),
    "buffers": lambda: Layered([*map(Masked, range(1, 5))]),
    "calls": Again,
}


@pytest.mark.parametrize("name", DIFFERING)
@pytest.mark.part(1)
def test_layers_of_a_model_that_differ_keep_their_places(name):
    space = elasticized(DIFFERING[name]())
    (depth,) = depths(space)
    with pytest.raises(TangleNASError, match="the 5 layers differ, so that they cannot be kept in the order"):
        depth.put_in_order([0, 2, 3, 1, 4])
    (said,) = order_layers(space, F.cross_entropy, [(torch.randn(4, 6), torch.zeros(4).long())])
    assert said == "layers of layers differ, so they keep their order"


ALIKE = {
    "gates": gated,
    "one tie": lambda: tying({f"layers.{i}.up.weight": "layers.1.up.weight" for i in (2, 3, 4)}),
    "a tie in each": lambda: tying({f"layers.{i}.down.bias": f"layers.{i}.norm.bias" for i in range(1, 5)}),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.part(1)
def test_layers_of_a_model_that_are_alike_may_be_ordered(name):
    space, other, x = (*(elasticized(ALIKE[name]()).eval() for _ in range(2)), torch.randn(4, 6))
    assert space.layers.interchangeable
    space.layers.put_in_order([0, 4, 2, 1, 3])
    for architecture in architectures(space, 3):
        network, new = space.extract(architecture), other.standalone(architecture).eval()
        load_state(new, network.state_dict(), "network")
        torch.testing.assert_close(new(x), network(x), rtol=0, atol=0)


def test_a_layer_of_a_model_that_is_fixed_by_its_name_differs():
    space = elasticize(Layered(), torch.randn(4, 6), fixed=["layers.2.up"])
    assert [depth.interchangeable for depth in depths(space)] == [False]


@pytest.mark.slow
def test_the_order_changes_nothing_of_the_largest_network_and_is_saved_with_it():
    space = make("vit").eval()
    x = inputs(space, 2)
    before, names = space(x), list(space.state_dict())
    depth = depths(space)[0]
    costs = space.cost(space.smallest())
    depth.put_in_order([2, 0, 1])
    assert torch.equal(space(x), before) and depth.order == (2, 0, 1)
    assert [*space.state_dict()] != names and space.state_dict()["blocks.order"].tolist() == [2, 0, 1]
    assert space.cost(space.smallest()) == costs
    for other in (make("vit").eval(), copy.deepcopy(space)):
        other.load_state_dict(space.state_dict())
        for architecture in architectures(space, 3):
            network = space.extract(architecture)
            torch.testing.assert_close(other.extract(architecture)(x), network(x), rtol=0, atol=0)
            assert not any("order" in name for name in network.state_dict())


def test_a_supernet_with_an_order_starts_another_search(tmp_path):
    space = tiny("gpt_nano")
    depths(space)[0].put_in_order([1, 0])
    save_weights(tmp_path / "supernet.safetensors", space.state_dict())
    other = tiny("gpt_nano")
    load_pretrained(other, tmp_path / "supernet.safetensors")
    assert depths(other)[0].order is None
    assert torch.equal(other.wte.weight, space.wte.weight)


class Sum(SearchSpace):
    """Residual layers that add constants: the loss without a layer is known. The first layer changes the shape."""

    def __init__(self, values, depth, shared=False, **options):
        super().__init__(**options)
        D = self.choice("depth", depth)
        self.stack = elastic.Depth(D, [Grow(), *(Add(value) for value in values)])
        self.second = elastic.Depth(D, [Add(0.0), *(Add(value / 2) for value in values)]) if shared else nn.Identity()

    def forward(self, x):
        return self.second(self.stack(x)).mean(1)

    def example_input(self, batch):
        return torch.zeros(batch, 1)


class Grow(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        return x.expand(-1, 2) * self.weight


class Add(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return x + self.weight


@pytest.mark.parametrize("shared", [False, True])
def test_layers_go_by_the_loss_that_is_left(shared):
    """Of 5, 1, -2.25 and 0.5, in a sum that is to be near the whole: 0.5 goes first, then what evens it out best."""
    values = (5.0, 1.0, -2.25, 0.5)
    space = Sum(values, (2, 3, 5), shared)
    whole = sum(values) * (1.5 if shared else 1)
    batches = [(torch.zeros(3, 1), torch.full((3,), whole))]
    (said,) = order_layers(space, F.mse_loss, batches)
    assert space.stack.order == (0, 1, 3, 2, 4)
    assert "dropped in the order 5, 3, 4: the loss is 0 with all of them" in said
    if shared:
        assert "stack and second" in said and space.second.order == space.stack.order
    small = space.extract(space.architecture(depth=2))
    assert [name for name, _ in small.named_parameters()][:2] == ["stack.0.weight", "stack.1.weight"]
    assert small(torch.zeros(1, 1)).item() == (7.5 if shared else 5.0)


class Wide(nn.Module):
    """A residual layer, which may share its linear layer, or only the weight of it."""

    def __init__(self, width, linear=None):
        super().__init__()
        self.linear = linear or elastic.Linear(width, width)

    def forward(self, x, shift=0.0):
        return x + torch.relu(self.linear(x)) + shift


class Sharing(SearchSpace):
    def __init__(self, kind):
        super().__init__()
        self.kind, width, depth = kind, self.choice("width", (2, 4)), self.choice("depth", (1, 2, 3))
        self.first = elastic.Linear(3, width)
        linear = elastic.Linear(width, width) if kind == "module" else None
        layers = [Wide(width, linear) for _ in range(3)]
        if kind == "parameter":
            layers[2].linear.weight = layers[0].linear.weight
        self.stack = elastic.Depth(depth, layers)
        self.once = nn.Sequential(Wide(width), elastic.BatchNorm1d(width))
        self.again = self.once if kind == "names" else nn.Identity()

    def forward(self, x):
        x = self.first(x)
        x = self.stack(x, 2 * x) if self.kind == "context" else self.stack(x)
        return self.again(self.once(x))

    def example_input(self, batch):
        return torch.zeros(batch, 3)


@pytest.mark.parametrize("kind", ["parameter", "names", "context"])
def test_layers_may_share_parameters_have_two_names_and_take_more_than_one_input(kind):
    space = Sharing(kind).double().eval()
    space.stack.put_in_order([0, 2, 1])
    x = torch.randn(4, 3, dtype=torch.float64)
    for architecture in space.all_architectures():
        network = space.extract(architecture)
        torch.testing.assert_close(network(x), space.select(architecture)(x))
        assert counted(network, x[:1]) == (space.cost(architecture).params, space.cost(architecture).macs)
        assert (kind == "names") == (network.again is network.once)
        if kind == "parameter":
            assert type(network.stack) is not nn.Sequential, "its layers may take a second input"
            layers = [*network.stack]
            tied = len(layers) > 1 and layers[-1].linear.weight is layers[0].linear.weight
            assert tied == (len(layers) > 1), "a depth of 2 keeps the first and the last layer"


def test_a_module_in_several_layers_is_not_counted():
    space = Sharing("module")
    with pytest.raises(
        TangleNASError, match=r"stack\.0\.linear and stack\.1\.linear are one module, but not in the same"
    ):
        space.cost(space.largest())


class Elsewhere(SearchSpace):
    """A linear layer that is called in the first layer of a depth and behind it, or there alone, or in two depths."""

    def __init__(self, kind):
        super().__init__()
        depth, other = self.choice("depth", (1, 2)), self.choice("other", (1, 2))
        self.linear, self.kind = nn.Linear(2, 2), kind
        first = Refers(self.linear) if kind == "referred" else nn.Sequential(self.linear)
        self.stack = elastic.Depth(depth, [first, nn.Linear(2, 2)])
        again = nn.Sequential(self.linear) if kind == "depths" else nn.Identity()
        self.second = elastic.Depth(other, [again, nn.Identity()])

    def forward(self, x):
        x = self.second(self.stack(x))
        return x if self.kind == "depths" else self.linear(x)

    def example_input(self, batch):
        return torch.zeros(batch, 2)


class Refers(nn.Module):
    """Knows a layer that it does not call."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return x


@pytest.mark.parametrize(("kind", "calls"), [("behind", 2), ("depths", 2), ("referred", 1)])
def test_a_module_in_several_places_that_are_always_there_is_counted(kind, calls):
    space = Elsewhere(kind)
    assert [space.cost(space.architecture(depth=depth, other=1)).macs for depth in (1, 2)] == [4 * calls, 4 * calls + 4]


class Own(elastic.Elastic):
    """A block whose network is another module, without the activation that it shares."""

    def __init__(self, width, activation):
        super().__init__()
        self.linear, self.activation = elastic.Linear(width, width), activation

    def forward(self, x):
        return self.activation(self.linear(x))

    def plain(self, assignment):
        return nn.Sequential(self.linear.plain(assignment), nn.ReLU())


class WithOwn(SearchSpace):
    def __init__(self):
        super().__init__()
        width, activation = self.choice("width", (2, 4)), nn.ReLU()
        self.first, self.activation = elastic.Linear(3, width), activation
        self.block = Own(width, activation)

    def forward(self, x):
        return self.block(self.activation(self.first(x)))

    def example_input(self, batch):
        return torch.zeros(batch, 3)


def test_a_network_may_lack_a_module_that_its_layers_share():
    network = WithOwn().standalone(WithOwn().smallest())
    assert network(torch.zeros(1, 3)).shape == (1, 2)


def test_weights_without_an_order_bring_back_the_first_one():
    space, other = Sharing("parameter"), Sharing("parameter")
    other.load_state_dict(space.state_dict())
    space.stack.put_in_order([2, 0, 1])
    space.load_state_dict(other.state_dict())
    assert space.stack.order is None and "stack.order" not in space.state_dict()


def test_where_nothing_can_be_ordered_it_is_told():
    (said,) = order_layers(tiny("nb201_nano"), F.cross_entropy, [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())])
    assert "no depth of 'nb201_nano' is chosen" in said
    with pytest.raises(TangleNASError, match="the order of layers needs a batch"):
        order_layers(tiny("gpt_nano"), F.cross_entropy, [])
    with pytest.raises(TangleNASError, match=r"\[0, 0\] is no order of the 2 layers"):
        depths(tiny("gpt_nano"))[0].put_in_order([0, 0])


def test_layers_that_differ_keep_their_places_where_networks_are_built_by_these():
    space = create_space("mobilenetv3_large", image_size=96, num_classes=4).eval()
    depths = [module for module in space.modules() if isinstance(module, Depth)]
    fixed = [depth for depth in depths if not depth.interchangeable]
    assert [len(depth) for depth in fixed] == [4]  # expansions of 6, 2.5, 2.3 and 2.3
    with pytest.raises(TangleNASError, match="the 4 layers differ, so that they cannot be kept in the order"):
        fixed[0].put_in_order([0, 2, 3, 1])
    data = inputs(space, 2)
    told = order_layers(space, lambda outputs, targets: outputs.square().mean(), [(data, torch.zeros(2))])
    assert sum("differ, so they keep their order" in sentence for sentence in told) == 1
    assert sum("are dropped in the order" in sentence for sentence in told) == len(depths) - 1
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        architecture = space.sample(generator)
        network = space.extract(architecture)
        assert space.cost(architecture).params == sum(p.numel() for p in network.parameters())
        torch.testing.assert_close(space.select(architecture)(data), network(data), atol=1e-4, rtol=1e-4)
        space.release()
