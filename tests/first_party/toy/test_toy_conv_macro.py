"""The toy space of convolutions has the paper's sizes, and every network in it is a plain torch module."""

import pytest
import torch
import torch.nn.functional as F
from oracle import Dimension, Oracle, Used
from torch import nn

from tanglenas_engine import SearchSpace, create_space
from tanglenas_engine.errors import TangleNASError
from tanglenas_toy.conv_macro import ConvMacro

TINY = dict(channels1=(2, 1), channels2=(2, 3), channels3=(3, 1, 2), channels4=(1, 2), kernel_size=(5, 3, 7))


def tiny(**options):
    return ConvMacro(**{**TINY, "image_size": 16, "num_classes": 3, "in_channels": 1, **options}).double()


def test_the_space_is_that_of_the_paper():
    with torch.device("meta"):
        space = create_space("toy_conv_macro")
    assert space.size == 3**8 == 6561
    assert sum(p.numel() for p in space.parameters()) == 7_725_450
    assert space.cost(space.largest()).params == 7_725_450
    assert {name: choice.shape for name, choice in space.choices.items()} == {
        "channels1": (3,), "channels2": (3,), "channels3": (3,), "channels4": (3,), "kernel_size": (4, 3),
    }  # fmt: skip
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in space.modules())


@pytest.mark.parametrize("image_size", [28, 32, 64])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.slow
def test_images_of_several_sizes(image_size, in_channels):
    space = create_space("toy_conv_macro", image_size=image_size, in_channels=in_channels, num_classes=7)
    x = space.example_input(2)
    assert x.shape == (2, in_channels, image_size, image_size)
    for architecture in (space.smallest(), space.sample()):
        assert space.select(architecture)(x).shape == (2, 7)


@pytest.mark.parametrize("image_size", [0, 8, 12, 30, 33, -16])
def test_images_that_do_not_fit_are_refused(image_size):
    with pytest.raises(TangleNASError, match=f"image_size is {image_size}: .* a multiple of 4 from 16 on"):
        create_space("toy_conv_macro", image_size=image_size)


@pytest.mark.parametrize("relaxation", ["exact", "paper"])
def test_a_mixture_is_the_sum_of_padded_slices(relaxation):
    space = tiny(relaxation=relaxation)
    alphas = {name: torch.randn(c.shape, dtype=torch.float64, requires_grad=True) for name, c in space.choices.items()}
    mixture = {name: alpha.softmax(-1) for name, alpha in alphas.items()}
    channels = {f"C{i}": f"channels{i}" for i in range(1, 5)}
    options = {c: TINY[name] for c, name in channels.items()} | {f"K{i}": TINY["kernel_size"] for i in range(1, 5)}
    weights = {c: mixture[name] for c, name in channels.items()} | {
        f"K{i}": mixture["kernel_size"][i - 1] for i in range(1, 5)
    }

    class Named(Oracle):
        """Choices with names of two letters."""

        def architectures(self, names):
            names = [names[i : i + 2] for i in range(0, len(names), 2)]
            letters = dict(zip("abcdefgh", dict.fromkeys(names), strict=False))
            one = Oracle({k: options[v] for k, v in letters.items()}, {k: weights[v] for k, v in letters.items()})
            for chosen, probability in one.architectures("".join(letters)):
                for letter, name in letters.items():
                    setattr(chosen, name, getattr(chosen, letter))
                yield chosen, probability

    oracle = Named(options, weights)
    used = {name: Used(Dimension(name, lambda v, n=name: getattr(v, n)), window=name[0] == "K") for name in options}

    def conv(x, i, padding=3):
        layer = getattr(space, f"conv{i}")
        inputs, outputs, kernel = used.get(f"C{i - 1}"), used.get(f"C{i}"), used.get(f"K{i}")
        weight = oracle.superposed(layer.weight, outputs, inputs, kernel, kernel)
        return F.relu(F.conv2d(x, weight, oracle.superposed(layer.bias, outputs), padding=padding))

    x = space.example_input(2).double()
    y = F.max_pool2d(conv(conv(x, 1), 2), 2)
    y = conv(conv(F.max_pool2d(conv(y, 3), 2), 4), 5, padding=2)
    theirs = space.head(y)
    ours = space.relax(mixture)(x)
    torch.testing.assert_close(ours, theirs)
    leaves = [*space.parameters(), *alphas.values()]
    gradients = [torch.autograd.grad(y.square().sum(), leaves, retain_graph=True) for y in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("path", ["hard", "exact", "gated", "paper"])
@pytest.mark.part(3)
def test_a_training_step_at_a_corner_is_one_of_the_extracted_network(path):
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        space = tiny()
        architecture = space.sample(generator)
        network, x = space.extract(architecture), space.example_input(3).double()
        if path == "hard":
            space.select(architecture)
        else:
            space.relaxation = path
            space.relax(space.one_hot(architecture))
        for model in (space, network):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model.train()(x).square().sum().backward()
            optimizer.step()
        for key, value in space.inherited(architecture).items():
            torch.testing.assert_close(value, network.state_dict()[key])
        torch.testing.assert_close(space.eval()(x), network.eval()(x))


def test_a_network_is_made_of_torch_s_own_layers():
    space = create_space("toy_conv_macro", dropout=0.5)
    architecture = space.architecture(
        channels1=8, channels2=64, channels3=32, channels4=128, kernel_size=[3, 7, 5, 3]
    )  # fmt: skip
    network = space.extract(architecture)
    convolutions = [getattr(network, f"conv{i}") for i in range(1, 6)]
    assert [type(layer) for layer in convolutions] == [nn.Conv2d] * 5
    assert [layer.out_channels for layer in convolutions] == [8, 64, 32, 128, 256]
    assert [layer.kernel_size[0] for layer in convolutions] == [3, 7, 5, 3, 7]
    assert [layer.padding[0] for layer in convolutions] == [1, 3, 2, 1, 2]
    assert network.dropout.p == 0.5
    assert not isinstance(network, SearchSpace)


def test_dropout_is_part_of_space_and_network():
    space = tiny(dropout=0.5)
    architecture = space.largest()
    network, x = space.extract(architecture), space.example_input(8).double()
    outputs = []
    for model in (space.select(architecture), network):
        torch.manual_seed(7)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(network(x), network(x))
    torch.testing.assert_close(network.eval()(x), space.eval()(x))


# The key of the authors' table.


def test_an_architecture_is_written_as_the_authors_key_and_read_again():
    with torch.device("meta"):
        space = create_space("toy_conv_macro")
    architecture = space.architecture(channels1=8, channels2=32, channels3=128, channels4=64, kernel_size=[3, 5, 7, 5])
    assert space.to_string(architecture) == "[[8, 32, 128, 64], [3, 5, 7, 5]]"
    assert space.from_string("[[8, 32, 128, 64], [3, 5, 7, 5]]") == architecture
    generator = torch.Generator().manual_seed(0)
    drawn = [space.sample(generator) for _ in range(50)]
    assert [space.from_string(space.to_string(a)) for a in drawn] == drawn


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not an architecture of 'toy_conv_macro': expected"),
        ("[[8, 32], [3, 5, 7, 5]]", "is not an architecture of 'toy_conv_macro': expected"),
        ("[8, 32]", "is not an architecture of"),
        ("7", "is not an architecture of"),
        ("[" * 100_000, "is not an architecture of"),
        ("[[8, 32, 128, 64], [3, 5, 7]]", r"choice 'kernel_size' .* is \[3, 5, 7\], expected a list of 4 options"),
        ("[[8, 32, 128, 64], 3]", "choice 'kernel_size' .* is 3, expected a list of 4 options"),
        ("[[9, 32, 128, 64], [3, 5, 7, 5]]", "choice channels1 .* is 9, expected one of 8, 16, 32"),
        ("[[[8], 32, 128, 64], [3, 5, 7, 5]]", r"choice 'channels1' .* is \[8\], expected one option"),
    ],
)
def test_what_is_no_key_is_refused(text, message):
    with torch.device("meta"):
        space = create_space("toy_conv_macro")
    with pytest.raises(TangleNASError, match=message):
        space.from_string(text)


def test_an_architecture_of_another_space_has_no_key():
    space = tiny()
    with pytest.raises(TangleNASError, match="is of the space 'ConvMacro', not of 'toy_conv_macro'"):
        create_space("toy_conv_macro", image_size=16).to_string(space.smallest())


@pytest.mark.parametrize("name", ["toy_conv_macro", "toy_conv_macro_nano"])
def test_outputs_of_fresh_networks_depend_on_the_input(name):
    """Nothing is normalised, so nine layers of torch's default initialisation leave next to nothing of an image."""
    space = create_space(name)
    images = space.example_input(16)
    for network in (space, space.standalone(space.largest()), space.standalone(space.smallest())):
        assert network.eval()(images).std(0).mean() > 0.05
    space = create_space(name, weight_init="torch")
    for network in (space, space.standalone(space.largest())):
        assert network.eval()(images).std(0).mean() < 0.005
    with pytest.raises(TangleNASError, match="unknown weight_init 'kaiming'"):
        create_space(name, weight_init="kaiming")


def test_the_layers_of_a_derived_space_start_as_they_do():
    class Derived(ConvMacro):
        def __init__(self, **options):
            super().__init__(**options)
            self.stem = nn.Linear(16, 16, bias=False)

        def forward(self, x):
            return super().forward(self.stem(x))

    space = Derived(**TINY, image_size=16, in_channels=1)
    network = space.standalone(space.smallest())
    assert network(space.example_input(2)).shape == (2, 10)
    for model in (space, network):
        assert model.stem.weight.abs().max() <= 0.25  # torch's bound, which He's initialisation of 256 weights exceeds
