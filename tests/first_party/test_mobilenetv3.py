"""MobileNetV3 is Once-for-All's space, with timm's MobileNetV3 as every network in it."""

import copy
import itertools
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from architectures import put
from oracle import Dimension, Oracle, Used, make_divisible
from timm.models.mobilenetv3 import MobileNetV3 as TimmMobileNetV3
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tanglenas_engine import Architecture, create_optimizer, create_space
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.testing import check_optimizer
from tanglenas_mobilenetv3.network import tanglenas_mobilenetv3
from tanglenas_mobilenetv3.space import MobileNetV3

transforms = pytest.mark.parametrize("kernel_transform", [False, True], ids=["windows", "matrices"])


def thumbnail(**options):
    """Two small stages in float64, with options in no order and weights that are all far from 0 and 1."""
    defaults = dict(
        depth=(2, 1), kernel_size=(5, 3, 7), expand_ratio=(4, 3, 6), stages=("s1_c8_nre", "s2_c16_nhs_se0.25"),
        stem_width=8, head_widths=(16, 24), num_classes=3, image_size=14, in_channels=2,
    )  # fmt: skip
    space = MobileNetV3(**{**defaults, **options}).double()
    with torch.no_grad():
        for parameter in space.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in space.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return space


def inputs(space, batch=4):
    return space.example_input(batch).double()


def samples(space, count):
    generator = torch.Generator().manual_seed(1)
    return [space.smallest(), space.largest(), *(space.sample(generator) for _ in range(count))]


# The space of the paper.


@pytest.mark.parametrize(
    ("kernel_transform", "parameters"),
    [
        (False, 7_664_760),
        # The authors' 7.679M: the largest network, and 20 pairs of matrices of 25 x 25 and 9 x 9.
        (True, 7_664_760 + 20 * (25**2 + 9**2)),
    ],
)
@pytest.mark.slow
def test_the_space_is_that_of_once_for_all(kernel_transform, parameters):
    with torch.device("meta"):
        space = create_space("mobilenetv3", kernel_transform=kernel_transform)
    assert space.size == 7371**5
    assert sum(p.numel() for p in space.parameters()) == parameters
    assert {name: choice.shape for name, choice in space.choices.items()} == {
        "depth": (5, 3), "kernel_size": (20, 3), "expand_ratio": (20, 3),
    }  # fmt: skip
    assert space.cost(space.largest()).params == 7_664_760


@pytest.mark.parametrize("width_mult", [1.0, 1.2, 0.5])
@pytest.mark.slow
def test_widths_are_rounded_as_in_once_for_all(width_mult):
    with torch.device("meta"):
        space = create_space("mobilenetv3", width_mult=width_mult)
        network = space.standalone(space.largest())
        smallest = space.standalone(space.smallest())
    widths = [make_divisible(width * width_mult, 8) for width in (16, 16, 24, 40, 80, 112, 160, 960, 1280)]
    assert network.conv_stem.out_channels == widths[0]
    for standalone, ratio, depth in ((network, 6, 4), (smallest, 3, 2)):
        for s, stage in enumerate(standalone.blocks[1:-1], 1):
            assert len(stage) == depth
            for b, block in enumerate(stage):
                hidden = make_divisible(widths[s + (b > 0)] * ratio, 8)
                assert block.conv_dw.groups == hidden
                assert block.conv_pwl.out_channels == widths[s + 1]
                if s in (2, 4, 5):
                    assert block.se.conv_reduce.out_channels == make_divisible(hidden // 4, 8)
                else:
                    assert isinstance(block.se, nn.Identity)
    assert network.blocks[-1][0].conv.out_channels == widths[-2]
    assert network.classifier.in_features == widths[-1]
    assert network.conv_head.bias is None


@pytest.mark.slow
def test_strides_and_activations_are_those_of_once_for_all():
    with torch.device("meta"):
        space = create_space("mobilenetv3")
        network = space.standalone(space.smallest())
        maps = {}
        for name in ("conv_stem", *(f"blocks.{i}" for i in range(7))):
            hook = lambda module, inputs, output, name=name: maps.update({name: output.shape[-1]})  # noqa: E731
            network.get_submodule(name).register_forward_hook(hook)
        network(torch.empty(1, 3, 224, 224))
    assert list(maps.values()) == [112, 112, 56, 28, 14, 14, 7, 7]
    acts = [type(stage[0].bn1.act).__name__ for stage in network.blocks]
    assert acts == ["ReLU", "ReLU", "ReLU", "Hardswish", "Hardswish", "Hardswish", "Hardswish"]
    assert type(network.bn1.act).__name__ == "Hardswish"
    gates = {type(m.gate).__name__ for m in network.modules() if hasattr(m, "conv_reduce")}
    assert gates == {"Hardsigmoid"}


@pytest.mark.slow
def test_lists_of_once_for_all_for_all_blocks_are_read():
    with torch.device("meta"):
        space = create_space("mobilenetv3")
    kernels, ratios, depths = [3, 5, 7, 3] * 5, [6, 4, 3, 6] * 5, [2, 3, 4, 2, 3]
    architecture = space.architecture(kernel_size=kernels, expand_ratio=ratios, depth=depths)
    assert architecture.choices["kernel_size"] == (3, 5, 3, 5, 7, 3, 5, 7, 3, 3, 5, 3, 5, 7)
    assert architecture.choices["depth"] == (2, 3, 4, 2, 3)
    arch_def = space.arguments(architecture)["arch_def"]
    assert arch_def[0] == ["ds_r1_k3_s1_e1_c16_nre"]
    assert arch_def[2] == [f"ir_r1_k{k}_e{e}_s2_c40_nre_se0.25" for k, e in ((3, 6), (5, 4), (7, 3))]
    again = Architecture.from_json(architecture.to_json())
    assert again == architecture == space.architecture(**architecture.choices)


# Networks.


def test_a_timm_network_s_weights_are_the_largest_network():
    space = thumbnail().eval()
    theirs = space.standalone(space.largest()).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert type(theirs) is TimmMobileNetV3
    assert [n for n, _ in space.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    space.load_state_dict(theirs.state_dict(), strict=True)
    x = inputs(space)
    torch.testing.assert_close(space(x), theirs(x))
    torch.testing.assert_close(space.select(space.largest())(x), theirs(x))


@transforms
@pytest.mark.parametrize("path", ["hard", "exact", "gated"])
@pytest.mark.part(3)
@pytest.mark.slow
def test_a_corner_is_the_extracted_network(path, kernel_transform):
    space = thumbnail(kernel_transform=kernel_transform)
    saved = copy.deepcopy(space.state_dict())
    for architecture in samples(space, 10):
        for training in (True, False):
            space.load_state_dict(saved)
            space.train(training)
            network, x = space.extract(architecture), inputs(space)
            assert type(network) is TimmMobileNetV3
            torch.testing.assert_close(put(space, path, architecture)(x), network(x), rtol=1e-9, atol=1e-10)
            seen = space.inherited(architecture)
            for key, value in network.state_dict().items():
                torch.testing.assert_close(seen[key], value)


@pytest.mark.parametrize("path", ["hard", "exact", "gated"])
@pytest.mark.part(3)
@pytest.mark.slow
def test_a_training_step_at_a_corner_is_one_of_the_extracted_network(path):
    for architecture in samples(thumbnail(), 4):
        space = thumbnail()
        network, x = space.extract(architecture), inputs(space)
        put(space, path, architecture)
        for model in (space, network):
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(x).square().sum().backward()
            optimizer.step()
        stepped = space.inherited(architecture)
        for key, value in network.state_dict().items():
            torch.testing.assert_close(stepped[key], value, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(put(space.eval(), path, architecture)(x), network.eval()(x), rtol=1e-7, atol=1e-8)


@transforms
@pytest.mark.parametrize("state", ["release", "select", "relax"])
def test_a_copy_of_a_space_is_independent(state, kernel_transform):
    space = thumbnail(kernel_transform=kernel_transform).eval()
    if state == "select":
        space.select(space.smallest())
    elif state == "relax":
        alphas = {
            name: torch.randn(c.shape, dtype=torch.float64, requires_grad=True) for name, c in space.choices.items()
        }
        space.relax({name: alpha.softmax(-1) for name, alpha in alphas.items()})
    twin, x = copy.deepcopy(space), inputs(space)
    y = space(x).detach()
    torch.testing.assert_close(twin(x), y)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(space(x), y)
    small = twin.smallest()
    torch.testing.assert_close(put(twin, "exact", small)(x), twin.extract(small)(x))


@transforms
@pytest.mark.slow
def test_the_cost_is_what_the_extracted_network_counts(kernel_transform):
    space = thumbnail(kernel_transform=kernel_transform)
    for architecture in samples(space, 6):
        network = space.extract(architecture)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(inputs(space, 1))
        cost = space.cost(architecture)
        assert (cost.params, cost.flops) == (
            sum(p.numel() for p in network.parameters()),
            counter.get_total_flops() // 2,
        )
        expected = space.expected_cost(space.one_hot(architecture))
        assert (expected.params.item(), expected.flops.item()) == (cost.params, cost.flops)


@transforms
def test_an_exported_folder_is_a_timm_model(tmp_path, kernel_transform):
    space = thumbnail(kernel_transform=kernel_transform, width_mult=1.5).float().eval()
    architecture = space.sample(torch.Generator().manual_seed(5))
    network = space.extract(architecture)
    space.export(network, architecture, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == tanglenas_mobilenetv3.__name__
    assert [len(stage) for stage in config["model_args"]["arch_def"]] == [1, *architecture.choices["depth"], 1]

    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = space.example_input(2)
    assert torch.equal(loaded(x), network(x))
    torch.testing.assert_close(space.select(architecture)(x), loaded(x), rtol=1e-4, atol=1e-5)
    assert loaded.pretrained_cfg["input_size"] == (2, 14, 14)
    headless = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert headless(x).shape == (2, 7)
    assert torch.equal(headless.conv_stem.weight, network.conv_stem.weight)


def test_dropout_is_part_of_space_and_network():
    space = thumbnail(drop=0.5)
    architecture = space.smallest()
    network, x = space.extract(architecture), inputs(space)
    outputs = []
    for model in (space.select(architecture), network):
        torch.manual_seed(7)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(network.eval()(x), space.eval()(x))
    assert not torch.allclose(network.train()(x), network(x))


# Algorithm 1, one architecture at a time.

HIDDEN = Dimension("R", lambda v: v.make_divisible(8 * v.R, 8))
REDUCED = Dimension("R", lambda v: v.make_divisible(v.make_divisible(8 * v.R, 8) // 4, 8))


def block_by_hand(block, oracle, x, gated, kernel):
    """The block's formulas over weights that the oracle superposes; `kernel` superposes the depthwise weight."""
    hidden, reduced = Used(HIDDEN), Used(REDUCED)
    written = None if gated else hidden

    def norm(bn, y, used):
        weight, bias = oracle.superposed(bn.weight, used), oracle.superposed(bn.bias, used)
        mean, var = (b[:, None, None] for b in (bn.running_mean, bn.running_var))
        return (y - mean) / torch.sqrt(var + bn.eps) * weight[:, None, None] + bias[:, None, None]

    def hard_swish(y):
        return y * (y + 3).clamp(0, 6) / 6

    one = (None, None)
    y = torch.einsum("bihw,oi->bohw", x, oracle.superposed(block.conv_pw.weight, written, None, *one)[..., 0, 0])
    y = hard_swish(norm(block.bn1, y, written))
    y = F.conv2d(y, kernel(written), None, stride=2, padding=3, groups=y.shape[1])
    y = hard_swish(norm(block.bn2, y, written))
    reduce, expand = block.se.conv_reduce, block.se.conv_expand
    s = y.mean((2, 3)) @ oracle.superposed(reduce.weight, None if gated else reduced, hidden, *one)[..., 0, 0].T
    s = (s + oracle.superposed(reduce.bias, None if gated else reduced)).clamp(min=0)
    s = s @ oracle.superposed(expand.weight, written, reduced, *one)[..., 0, 0].T
    s = s + oracle.superposed(expand.bias, written)
    y = y * ((s + 3).clamp(0, 6) / 6)[:, :, None, None]
    y = torch.einsum("bihw,oi->bohw", y, oracle.superposed(block.conv_pwl.weight, None, hidden, *one)[..., 0, 0])
    return norm(block.bn3, y, None)


def transformed(conv, size):
    """The depthwise kernel of a size, channel by channel, by Once-for-All's chain of matrices."""
    matrices = dict(conv.transforms.items())
    rows = []
    for channel in conv.weight[:, 0]:  # (7, 7)
        if size <= 5:
            channel = (matrices["7to5"] @ channel[1:6, 1:6].reshape(25)).reshape(5, 5)
        if size == 3:
            channel = (matrices["5to3"] @ channel[1:4, 1:4].reshape(9)).reshape(3, 3)
        margin = (7 - size) // 2
        rows.append(F.pad(channel, (margin, margin, margin, margin)))
    return torch.stack(rows)[:, None]


@transforms
@pytest.mark.parametrize("relaxation", ["exact", "gated", "paper"])
def test_a_block_is_the_sum_over_architectures_of_padded_slices(relaxation, kernel_transform):
    space = thumbnail(relaxation=relaxation, kernel_transform=kernel_transform).eval()
    block = space.blocks[2][0]  # the second stage: stride 2, 8 to 16 channels, squeeze-excite
    options = {"K": (5, 3, 7), "R": (4, 3, 6)}
    alphas = {name: torch.randn(c.shape, dtype=torch.float64, requires_grad=True) for name, c in space.choices.items()}
    mixture = {name: alpha.softmax(-1) for name, alpha in alphas.items()}
    stage = len(space.choices["kernel_size"]) // 2  # the row of the second stage's first block
    oracle = Oracle(options, {"K": mixture["kernel_size"][stage], "R": mixture["expand_ratio"][stage]})
    x = torch.randn(3, 8, 7, 7, dtype=torch.float64)

    def kernel(written):
        if not kernel_transform:
            window = Used(Dimension("K", lambda v: v.K), window=True)
            return oracle.superposed(block.conv_dw.weight, written, None, window, window)
        total = 0
        for chosen, probability in oracle.architectures("K"):
            filled = oracle.superposed(transformed(block.conv_dw, chosen.K), written, None, None, None)
            total = total + probability * filled
        return total

    ours = space.relax(mixture) and block(x)
    theirs = block_by_hand(block, oracle, x, relaxation == "gated", kernel)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    direction = torch.randn_like(ours)
    leaves = [*block.parameters(), *alphas.values()]
    gradients = [
        torch.autograd.grad((y * direction).sum(), leaves, retain_graph=True, materialize_grads=True, allow_unused=True)
        for y in (ours, theirs)
    ]
    for one, other in zip(*gradients, strict=True):
        # The gradient of torch's hard sigmoid is 1/6 in single precision.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert all(gradient.abs().max() > 1e-8 for gradient in gradients[0][: len(list(block.parameters()))])


def test_fresh_matrices_are_nested_windows():
    torch.manual_seed(3)
    space, plain = (MobileNetV3(
        depth=(1, 2), stages=("s1_c8",), image_size=14, num_classes=3, kernel_transform=matrices
    ).eval() for matrices in (True, False))  # fmt: skip
    plain.load_state_dict({k: v for k, v in space.state_dict().items() if "transforms" not in k})
    mixture = {name: torch.randn(c.shape).softmax(-1) for name, c in space.choices.items()}
    x = space.example_input(2)
    torch.testing.assert_close(space.relax(mixture)(x), plain.relax(mixture)(x))
    for architecture in (space.smallest(), space.sample()):
        torch.testing.assert_close(space.select(architecture)(x), plain.select(architecture)(x))


def test_matrices_are_the_supernet_s_alone():
    space = thumbnail(kernel_transform=True)
    matrices = [name for name, _ in space.named_parameters() if "transforms" in name]
    assert len(matrices) == 2 * 4
    assert not [name for name in space.inherited(space.largest()) if "transforms" in name]
    with torch.no_grad():
        before = space.extract(space.smallest())
        for name in matrices:
            space.get_parameter(name).mul_(2)
        after = space.extract(space.smallest())
    depthwise = "blocks.1.0.conv_dw.weight"
    torch.testing.assert_close(after.get_parameter(depthwise), 4 * before.get_parameter(depthwise))


def test_the_expectation_over_depths_is_made_for_each_stage():
    space = thumbnail(kernel_size=(3,), expand_ratio=(4,)).eval()
    p = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64)
    ones = {name: torch.ones(4, 1, dtype=torch.float64) for name in ("kernel_size", "expand_ratio")}
    x = inputs(space)
    y = space.blocks[0](space.bn1(space.conv_stem(x)))
    for s, stage in enumerate((space.blocks[1], space.blocks[2])):
        once = stage[0](y)
        y = p[s, 0] * stage[1](once) + p[s, 1] * once
    y = space.classifier(space.act2(space.conv_head(space.global_pool(space.blocks[3](y)))).flatten(1))
    torch.testing.assert_close(space.relax({"depth": p, **ones})(x), y)


# Searching.


@pytest.mark.parametrize("optimizer", ["drnas", "spos"])
@pytest.mark.exhaustive
def test_it_is_searched_with_matrices(optimizer):
    check_optimizer(lambda: create_optimizer(optimizer), lambda: thumbnail(kernel_transform=True).float())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_small_space_learns_under_a_mixture():
    space = create_space("mobilenetv3_nano")
    x, y = torch.randn(16, 1, 28, 28), torch.arange(16) % 10
    mixture = {name: torch.full(c.shape, 1 / c.shape[-1]) for name, c in space.choices.items()}
    optimizer = torch.optim.AdamW(space.parameters(), lr=4e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(space.relax(mixture)(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("image_size", [25, 28, 32])
def test_on_the_smallest_images_every_kernel_still_matters(image_size):
    space = create_space("mobilenetv3_nano", image_size=image_size, depth=(1,)).double().eval()
    x = space.example_input(1).double()
    last = len(space.choices["kernel_size"]) - 1
    outputs = []
    for kernel in space.choices["kernel_size"].options:
        kernels = [3] * last + [kernel]
        outputs.append(space.select(space.architecture(depth=[1] * 3, kernel_size=kernels, expand_ratio=[3] * 3))(x))
    for one, other in itertools.combinations(outputs, 2):
        assert (one - other).abs().max() > 1e-9


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 12}, "images of 12 pixels shrink to 3 in the last stage, .* use at least 13 pixels"),
        ({"image_size": 0}, "images of 0 pixels"),
        ({"width_mult": 0}, "width_mult is 0, expected a positive number"),
        ({"width_mult": -1.0}, "width_mult is -1.0, expected a positive number"),
        ({"width_mult": float("nan")}, "width_mult is nan, expected a positive number"),
        ({"width_mult": float("inf")}, "width_mult is inf, expected a positive number"),
        ({"stages": ("s2_c8",) * 5, "image_size": 512}, "reduce an image by 64, timm's network by at most 32"),
        ({"stages": ("s3_c8",)}, "stage 's3_c8' cannot be read: expected stride and width"),
        ({"stages": ("s1_c8_k3",)}, "stage 's1_c8_k3' cannot be read"),
        ({"kernel_size": (2, 4)}, r"kernel_size has the options \(2, 4\): only odd kernels have a centre"),
        ({"sharing": "separate"}, "MobileNetV3 cannot do sharing 'separate'"),
    ],
)
def test_options_that_make_no_network_are_refused(options, message):
    with pytest.raises(TangleNASError, match=message):
        thumbnail(**options)


def test_the_least_image_size_is_the_least():
    with pytest.raises(TangleNASError, match="use at least 97 pixels"):
        create_space("mobilenetv3", image_size=96)
    with torch.device("meta"):
        create_space("mobilenetv3", image_size=97)
    thumbnail(image_size=4, kernel_size=(3,)).train()  # with one kernel there is nothing to tell apart


def test_the_network_is_registered_with_timm():
    assert timm.is_model("tanglenas_mobilenetv3")
