"""Every elastic layer against Algorithm 1 (oracle.py): outputs, weight gradients and alpha gradients in float64."""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import OPTIONS, Case, dimensions, masked, relaxations
from oracle import Dimension, Oracle, Used, heads, layer_norm, rms_norm, turned
from torch import nn

from tanglenas_engine import SearchSpace, elastic
from tanglenas_engine.elastic import masked as products
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.size import Axis, make_divisible
from tanglenas_engine.training.measure import recalibrate

H, K = Dimension("H", lambda v: v.H), Dimension("K", lambda v: v.K)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def sides(relaxation, joint, gated):
    """Which dimensions are superposed together: all, or one reading side after the other."""
    return gated if relaxation == "gated" else joint


@relaxations
@given(OPTIONS, dimensions, dimensions, st.booleans())
@pytest.mark.slow
def test_linear(relaxation, options, inputs, outputs, bias):
    case = Case(options, relaxation)
    layer = case.prepare(elastic.Linear(case.size(inputs), case.size(outputs), bias))

    def expected(oracle):
        weight = masked(oracle, layer.weight, [Used(outputs), Used(inputs)], sides(relaxation, [(0, 1)], [(1,)]))
        b = masked(oracle, layer.bias, [Used(outputs)], sides(relaxation, [(0,)], [])) if bias else None
        return F.linear(x, weight, b)

    x = randn(2, 3, layer.in_features)
    case.compare(layer, expected, x)


FORMS = {  # the layer, its function, and positions of an input
    "Conv1d": (elastic.Conv1d, F.conv1d, (7,)),
    "Conv2d": (elastic.Conv2d, F.conv2d, (7, 6)),
    "ConvTranspose2d": (elastic.ConvTranspose2d, F.conv_transpose2d, (6, 5)),
}
forms = pytest.mark.parametrize("form", FORMS)


@relaxations
@forms
@given(OPTIONS, dimensions, dimensions, *[st.integers(1, 2)] * 2, st.booleans(), st.booleans())
@pytest.mark.part(3)
@pytest.mark.slow
def test_convolution(form, relaxation, options, inputs, outputs, stride, dilation, bias, pad_more):
    case, (kind, convolve, positions) = Case(options, relaxation), FORMS[form]
    padding = dilation * (max(options["K"]) - 1) // 2
    layer = case.prepare(
        kind(
            case.size(inputs),
            case.size(outputs),
            case.size(K),
            stride,
            padding + 2 if pad_more else None,
            dilation=dilation,
            bias=bias,
        )
    )

    def expected(oracle):
        sizes = [Used(inputs), Used(outputs)] if layer.transposed else [Used(outputs), Used(inputs)]
        window = tuple(range(2, 2 + len(positions)))
        used = [*sizes, *[Used(K, window=True) for _ in positions]]
        read = 0 if layer.transposed else 1
        weight = masked(oracle, layer.weight, used, sides(relaxation, [(0, 1, *window)], [(read,), window]))
        b = masked(oracle, layer.bias, [Used(outputs)], sides(relaxation, [(0,)], [])) if bias else None
        return convolve(x, weight, b, stride, padding + 2 * pad_more, dilation=dilation)

    x = randn(2, layer.in_channels, *positions)
    case.compare(layer, expected, x)


@relaxations
@forms
@given(OPTIONS, dimensions, *[st.integers(1, 2)] * 4)
@pytest.mark.part(3)
@pytest.mark.slow
def test_grouped_and_depthwise_convolution(form, relaxation, options, groups, read, written, stride, dilation):
    case, (kind, convolve, positions) = Case(options, relaxation), FORMS[form]
    # A group is `read` channels wide on one side and `written` on the other; 1 and 1 is depthwise.
    inputs, outputs = (
        Dimension(groups.names, lambda v, width=width: int(groups.of(v)) * width) for width in (read, written)
    )
    count = case.size(groups)
    whole = count if isinstance(count, int) else count.map(int)
    layer = case.prepare(
        kind(whole * read, whole * written, case.size(K), stride, dilation=dilation, groups=count, bias=True)
    )

    def expected(oracle):
        window = tuple(range(2, 2 + len(positions)))
        used = [Used(inputs if layer.transposed else outputs), None, *[Used(K, window=True) for _ in positions]]
        weight = masked(oracle, layer.weight, used, sides(relaxation, [(0, *window)], [window]))
        bias = masked(oracle, layer.bias, [Used(outputs)], sides(relaxation, [(0,)], []))
        padding = dilation * (max(options["K"]) - 1) // 2
        return convolve(x, weight, bias, stride, padding, dilation=dilation, groups=max(oracle.numbers(groups)))

    x = randn(2, layer.in_channels, *positions)
    case.compare(layer, expected, x)


@relaxations
@given(
    OPTIONS,
    dimensions,
    *[st.booleans()] * 3,
    st.sampled_from([0.1, None]),
    st.sampled_from([(elastic.BatchNorm1d, ()), (elastic.BatchNorm1d, (2,)), (elastic.BatchNorm2d, (2, 2))]),
)
@pytest.mark.slow
def test_batch_norm(relaxation, options, channels, affine, training, tracked, momentum, form):
    case, (kind, positions) = Case(options, relaxation), form
    layer = kind(case.size(channels), 1e-3, momentum, affine, tracked)
    case.prepare(layer).train(training)
    plain = kind.plain_class(layer.num_features, 1e-3, momentum, False, tracked).double().train(training)
    if tracked:
        layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
        plain.load_state_dict({k: v.clone() for k, v in layer.named_buffers()})

    def expected(oracle):
        return channelwise(oracle, layer, plain(x), channels, relaxation)

    x = randn(3, layer.num_features, *positions)
    case.compare(layer, expected, x)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(getattr(layer, name), buffer)


def channelwise(oracle, layer, y, channels, relaxation):
    """`y`, `(B, C, *)`, with the gain and bias of a norm over channels, or covered itself."""
    covered = sides(relaxation, [(0,)], [])
    around = [1] * (y.dim() - 2)
    if layer.affine:
        gain, bias = (masked(oracle, p, [Used(channels)], covered) for p in (layer.weight, layer.bias))
        return y * gain.view(-1, *around) + bias.view(-1, *around)
    ones = torch.ones(y.shape[1], dtype=torch.float64)
    return y * masked(oracle, ones, [Used(channels)], covered).view(-1, *around)


@relaxations
@given(OPTIONS, dimensions, st.sampled_from([2, 3]), st.booleans(), st.sampled_from([(), (2,), (2, 3)]))
@pytest.mark.slow
def test_group_norm(relaxation, options, groups, per_group, affine, positions):
    case = Case(options, relaxation)
    channels = Dimension(groups.names, lambda v: int(groups.of(v)) * per_group)
    count = case.size(groups)
    whole = count if isinstance(count, int) else count.map(int)
    layer = case.prepare(elastic.GroupNorm(whole, whole * per_group, 1e-3, affine))

    def expected(oracle):
        # Each group by itself: x of any coverage, which cancels.
        y = F.group_norm(x, layer.num_groups, eps=1e-3)
        return channelwise(oracle, layer, y, channels, relaxation)

    x = randn(2, layer.num_channels, *positions)
    case.compare(layer, expected, x)


@relaxations
@given(OPTIONS, dimensions, st.booleans(), st.sampled_from([(), (2,), (2, 3)]))
@pytest.mark.slow
def test_group_norm_of_a_single_group(relaxation, options, channels, affine, positions):
    case = Case(options, relaxation)
    layer = case.prepare(elastic.GroupNorm(1, case.size(channels), 1e-3, affine))

    def expected(oracle):
        counted = oracle.coverage(channels)
        counted = torch.ones_like(counted) if relaxation == "paper" else counted
        everywhere = counted.repeat_interleave(x[0, 0].numel())
        y = layer_norm(x.flatten(1), everywhere, 1e-3).view_as(x)
        return channelwise(oracle, layer, y, channels, relaxation)

    x = randn(2, layer.num_channels, *positions)
    case.compare(layer, expected, x)


@relaxations
@given(OPTIONS, dimensions, st.sampled_from([(True, True), (True, False), (False, False)]), st.booleans())
@pytest.mark.slow
def test_layer_norm(relaxation, options, width, affine, of_images):
    case = Case(options, relaxation)
    elementwise, with_bias = affine
    kind = elastic.LayerNorm2d if of_images else elastic.LayerNorm
    layer = case.prepare(kind(case.size(width), 1e-3, elementwise, with_bias))

    def expected(oracle):
        counted = oracle.coverage(width)
        last = x.movedim(1, -1) if of_images else x
        y = layer_norm(last, torch.ones_like(counted) if relaxation == "paper" else counted, 1e-3)
        covered = sides(relaxation, [(0,)], [])
        gain = layer.weight if elementwise else torch.ones_like(counted)
        y = y * masked(oracle, gain, [Used(width)], covered)
        if with_bias:
            y = y + masked(oracle, layer.bias, [Used(width)], covered)
        return y.movedim(-1, 1) if of_images else y

    (length,) = layer.normalized_shape
    x = randn(2, length, 1, 3) if of_images else randn(2, 3, length)
    case.compare(layer, expected, x)


@relaxations
@given(OPTIONS, dimensions, st.booleans(), st.sampled_from([1e-3, None]))
@pytest.mark.slow
def test_rms_norm(relaxation, options, width, elementwise, eps):
    case = Case(options, relaxation)
    layer = case.prepare(elastic.RMSNorm(case.size(width), eps, elementwise))

    def expected(oracle):
        counted = oracle.coverage(width)
        y = rms_norm(x, torch.ones_like(counted) if relaxation == "paper" else counted, eps or 2**-52)
        gain = layer.weight if elementwise else torch.ones_like(counted)
        return y * masked(oracle, gain, [Used(width)], sides(relaxation, [(0,)], []))

    x = randn(2, 3, layer.normalized_shape[0])
    case.compare(layer, expected, x)


@relaxations
@given(OPTIONS, dimensions)
@pytest.mark.slow
def test_embedding(relaxation, options, width):
    case = Case(options, relaxation)
    layer = case.prepare(elastic.Embedding(6, case.size(width)))
    indices = torch.randint(6, (2, 4))

    def expected(oracle):
        table = masked(oracle, layer.weight, [None, Used(width)], sides(relaxation, [(1,)], []))
        return F.embedding(indices, table)

    case.compare(layer, expected, indices)


class Declared(elastic.Elastic):
    """A class token and positions, as a space declares them for itself."""

    def __init__(self, width, length):
        super().__init__()
        self.token, self.positions = (nn.Parameter(torch.zeros(1, n, length)) for n in (1, 4))
        self.declare(token=(None, None, width), positions=(None, None, width))

    def forward(self, x):
        tokens = torch.cat([self.current("token").expand(len(x), -1, -1), x], 1)
        return tokens * self.current("positions")


class Called(nn.Module):
    """The same of modules."""

    def __init__(self, width, length):
        super().__init__()
        self.token, self.positions = (elastic.Parameter(1, n, width) for n in (1, 4))

    def forward(self, x):
        return torch.cat([self.token().expand(len(x), -1, -1), x], 1) * self.positions()


@relaxations
@pytest.mark.parametrize("kind", [Declared, Called])
@given(OPTIONS, dimensions)
@pytest.mark.slow
def test_parameters(kind, relaxation, options, width):
    case = Case(options, relaxation)
    length = max(Oracle(options, case.probabilities()).numbers(width))
    layer = case.prepare(kind(case.size(width), length))

    def expected(oracle):
        token, positions = (
            masked(oracle, p, [None, None, Used(width)], sides(relaxation, [(2,)], [])) for p in layer.parameters()
        )
        return torch.cat([token.expand(2, -1, -1), x], 1) * positions

    x = randn(2, 3, length)
    case.compare(layer, expected, x)


@pytest.mark.parametrize(
    ("init", "is_so"),
    [(None, lambda t: 0.01 < t.std() < 0.03), (1e-5, lambda t: t.eq(1e-5).all()), (nn.init.ones_, torch.all)],
)
def test_a_parameter_starts_as_it_is_told(init, is_so):
    space, (width,) = one(width=(64, 32))
    layer = space.layer = elastic.Parameter(8, width, init=init)
    plain = layer.plain(space.assignment_of(space.smallest()))
    assert is_so(layer.weight) and is_so(plain.weight)
    assert plain().shape == (8, 32)


@relaxations
@given(OPTIONS, dimensions, st.sampled_from([H, Dimension("E", lambda v: v.E // 2)]), *[st.booleans()] * 2)
@pytest.mark.slow
def test_attention(relaxation, options, width, count, causal, bias):
    case, D = Case(options, relaxation), 2
    attention = elastic.Attention(case.size(width), case.size(count), D, bias, bias, causal=causal)
    layer = case.prepare(attention)
    units = Dimension(count.names, lambda v: count.of(v) * D)
    qkv, proj = layer.qkv, layer.proj

    def split(x, weight, bias):
        """`(B, N, width)` -> q, k, v, each `(B, H, N, D)`."""
        return F.linear(x, weight, bias).unflatten(-1, (3, -1, D)).permute(2, 0, 3, 1, 4)

    def expected(oracle):
        if relaxation == "paper":  # heads three times: in the rows of q, k and v, in q, k and v, and in proj
            used = [Used(units, parts=3), Used(width)]
            qkv_bias = oracle.superposed(qkv.bias, used[0]) if bias else None
            q, k, v = (
                oracle.superposed(one, None, Used(count), None, None)
                for one in split(x, oracle.superposed(qkv.weight, *used), qkv_bias)
            )
            merged = heads(q, k, v, causal).transpose(1, 2).flatten(2)
            weight = oracle.superposed(proj.weight, Used(width), Used(units))
            return F.linear(merged, weight, oracle.superposed(proj.bias, Used(width)) if bias else None)
        # The expectation over numbers of heads of the attention with that many heads.
        merged = heads(*split(x, oracle.superposed(qkv.weight, None, Used(width)), qkv.bias), causal)
        total = torch.zeros(2, 3, proj.out_features, dtype=torch.float64)
        for chosen, p in oracle.architectures(count.names + (width.names if relaxation == "exact" else "")):
            h = count.of(chosen)
            e = int(width.of(chosen)) if relaxation == "exact" else proj.out_features
            first = merged[:, :h].transpose(1, 2).flatten(2)
            y = F.linear(first, proj.weight[:e, : h * D], proj.bias[:e] if bias else None)
            total = total + p * F.pad(y, (0, proj.out_features - e))
        return total

    x = randn(2, 3, qkv.in_features)
    case.compare(layer, expected, x)


@relaxations
@given(
    OPTIONS,
    st.sampled_from(
        [
            Dimension("D", lambda v: v.D),
            Dimension("D", lambda v: v.D - 1),  # may have no layer at all
            Dimension("DR", lambda v: v.D * v.R),
        ]
    ),
)
@pytest.mark.slow
def test_depth_is_the_expectation_over_the_outputs_of_the_listed_layers(relaxation, options, depth):
    case = Case(options, relaxation)
    depths = Oracle(options, case.probabilities()).numbers(depth)
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(max(depths))]
    layer = case.prepare(elastic.Depth(case.size(depth), blocks))

    def expected(oracle):
        total = torch.zeros_like(x)
        for chosen, p in oracle.architectures(depth.names):
            y = x
            for one in list(layer)[: int(depth.of(chosen))]:
                y = one(y)
            total = total + p * y
        return total

    x = randn(2, 3)
    case.compare(layer, expected, x)


@relaxations
@given(OPTIONS, dimensions, dimensions, st.booleans(), st.sampled_from([F.silu, F.gelu, torch.sigmoid]))
@pytest.mark.part(3)
@pytest.mark.slow
def test_gated_mlp(relaxation, options, width, hidden, bias, activation):
    case = Case(options, relaxation)
    layer = case.prepare(elastic.GatedMLP(case.size(width), case.size(hidden), None, activation, bias))
    gate, up, down = layer.fc1_g, layer.fc1_x, layer.fc2

    def expected(oracle):
        units = [Used(hidden), Used(width)] if relaxation == "paper" else [None, Used(width)]
        g, u = (
            F.linear(
                x,
                oracle.superposed(one.weight, *units),
                oracle.superposed(one.bias, units[0]) if bias else None,
            )
            for one in (gate, up)
        )
        return projected(oracle, activation(g) * u, down, width, hidden, relaxation)

    x = randn(2, 3, gate.in_features)
    case.compare(layer, expected, x)


def projected(oracle, x, down, width, hidden, relaxation):
    """`down` of x, `(*, hidden)`, superposed over its output and its input."""
    weight = masked(oracle, down.weight, [Used(width), Used(hidden)], sides(relaxation, [(0, 1)], [(1,)]))
    bias = down.bias
    return F.linear(
        x, weight, None if bias is None else masked(oracle, bias, [Used(width)], sides(relaxation, [(0,)], []))
    )


@relaxations
@given(OPTIONS, dimensions, st.sampled_from([(2, 1), (1, 1), (2, 0)]), *[st.booleans()] * 4)
@pytest.mark.part(3)
@pytest.mark.slow
def test_grouped_attention(relaxation, options, width, counts, causal, bias, rotary, across):
    case, D = Case(options, relaxation), 2
    group, grown = counts  # `grown` 0: one head of keys for all
    query = Dimension("H", lambda v: v.H * group * D)
    key = Dimension("H", lambda v: v.H * D) if grown else Dimension("", lambda v: D)
    source = Dimension("F", lambda v: v.F) if across else width
    layer = case.prepare(
        elastic.GroupedAttention(
            case.size(width),
            case.symbols.H * group,
            case.symbols.H if grown else 1,
            D,
            case.size(source) if across else None,
            bias,
            causal=causal,
            rotary=elastic.Rotary(100.0) if rotary else None,
        )
    )
    context = randn(2, 3, layer.k_proj.in_features) if across else None

    def expected(oracle):
        def split(x, projection, units, read):
            used = Used(units) if relaxation == "paper" else None
            weight = oracle.superposed(projection.weight, used, Used(read))
            shift = oracle.superposed(projection.bias, used) if bias else None
            return F.linear(x, weight, shift).unflatten(-1, (-1, D)).transpose(1, 2)

        others = context if across else x
        q = split(x, layer.q_proj, query, width)
        k, v = (split(others, one, key, source) for one in (layer.k_proj, layer.v_proj))
        if rotary:
            q, k = turned(q, 100.0), turned(k, 100.0)
        readers = [i * k.shape[1] // q.shape[1] for i in range(q.shape[1])]
        merged = heads(q, k[:, readers], v[:, readers], causal).transpose(1, 2).flatten(2)
        return projected(oracle, merged, layer.o_proj, width, query, relaxation)

    x = randn(2, 3, layer.q_proj.in_features)
    case.compare(Bound(layer, lambda layer, x: layer(x, context)), expected, x)


class Bound(nn.Module):
    """A layer as a function of one input."""

    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x):
        return self.function(self.layer, x)


@relaxations
@given(OPTIONS, *[st.booleans()] * 2, st.sampled_from([None, True, False]))
@pytest.mark.part(3)
def test_multihead_attention(relaxation, options, bias, batch_first, across):
    case, D = Case(options, relaxation), 2
    width = Dimension("H", lambda v: v.H * D)
    heads_of = case.symbols.H
    layer = case.prepare(elastic.MultiheadAttention(heads_of * D, heads_of, 0.0, bias, batch_first))
    packed, proj = Used(width, parts=3), layer.out_proj

    def expected(oracle):
        rows = packed if relaxation == "paper" else None
        weight = oracle.superposed(layer.in_proj_weight, rows, Used(width))
        shift = oracle.superposed(layer.in_proj_bias, rows) if bias else None
        first = x if batch_first else x.transpose(0, 1)
        q, k, v = F.linear(first, weight, shift).unflatten(-1, (3, -1, D)).permute(2, 0, 3, 1, 4)
        if across:  # keys and values of the first two tokens
            k, v = k[:, :, :2], v[:, :, :2]
        y = projected(oracle, heads(q, k, v, False).transpose(1, 2).flatten(2), proj, width, width, relaxation)
        return y if batch_first else y.transpose(0, 1)

    def attend(layer, x):
        keys = (x[:, :2] if batch_first else x[:2]) if across else x
        return layer(x, keys, keys, need_weights=across is None)[0]

    x = randn(2, 3, layer.embed_dim)
    case.compare(Bound(layer, attend), expected, x)


# Second derivatives, which darts2 takes.


@pytest.mark.parametrize("learn", ["weights and alpha", "alpha"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda c: elastic.Linear(c.E, c.E * c.R), (2, 6)),
        (lambda c: elastic.Linear(c.F, c.E), (3, 3)),
        (lambda c: elastic.Conv2d(c.F, c.E, c.K), (2, 3, 4, 3)),
        (lambda c: elastic.Conv2d(c.E, c.E, c.K, groups=c.E, dilation=2), (1, 4, 3, 4)),
        (lambda c: elastic.ConvTranspose2d(c.F, c.E, c.K, 2), (1, 3, 2, 3)),
        (lambda c: elastic.LayerNorm(c.E), (3, 4)),
        (lambda c: elastic.LayerNorm(c.E, elementwise_affine=False), (3, 4)),
        (lambda c: elastic.RMSNorm(c.E), (3, 4)),
        (lambda c: elastic.GroupNorm(c.E // 2, c.E), (2, 4, 3)),
    ],
)
@pytest.mark.part(6)
@pytest.mark.slow
def test_gradients_of_gradients(build, shape, learn):
    case = Case({"E": (2, 4), "F": (3, 1), "R": (1, 1.5), "K": (3, 1)})
    layer = build(case.symbols)
    shape = (shape[0], *(layer.in_features,)) if isinstance(layer, elastic.Linear) else shape
    layer = case.prepare(layer).requires_grad_(learn != "alpha")
    weights = list(layer.parameters()) if learn != "alpha" else []

    def output(x, *leaves):
        case.space.relax({n: a.softmax(0) for n, a in zip(case.alphas, leaves, strict=False)})
        return layer(x)

    x = randn(*shape).requires_grad_()
    with mock.patch.object(products, "MIN_ROWS_PER_BAND", 0):
        leaves = (x, *case.alphas.values(), *weights)
        assert torch.autograd.gradcheck(output, leaves)
        assert torch.autograd.gradgradcheck(output, leaves)


def test_a_first_layer_makes_no_gradient_of_its_input_for_the_masks_alone(monkeypatch):
    case = Case({"E": (2, 4)})
    layer = case.prepare(elastic.Conv2d(3, case.symbols.E, 2, stride=2, padding=0)).requires_grad_(False)
    monkeypatch.setattr(products, "MIN_ROWS_PER_BAND", 0)
    asked = []
    original = products.ConvolutionProduct._gradients
    monkeypatch.setattr(
        products.ConvolutionProduct, "_gradients", lambda *given: asked.append(given[-1]) or original(*given)
    )
    for learns, wanted in ((False, [1]), (True, [0, 0])):  # that of the weight; those of the input by both bands
        case.space.relax(case.probabilities())
        asked.clear()
        layer(randn(2, 3, 4, 4).requires_grad_(learns)).sum().backward()
        assert asked == wanted


# The hard path: real slices.


@forms
@given(OPTIONS, dimensions, dimensions, *[st.integers(1, 2)] * 2, st.integers(0, 10**6))
@pytest.mark.slow
def test_a_selected_convolution_is_a_plain_one_of_the_slice(form, options, inputs, outputs, stride, dilation, seed):
    case, (kind, convolve, positions) = Case(options), FORMS[form]
    case.space.name = "case"
    layer = case.prepare(kind(case.size(inputs), case.size(outputs), case.size(K), stride, dilation=dilation))
    architecture = case.space.sample(torch.Generator().manual_seed(seed))
    chosen = SimpleNamespace(make_divisible=make_divisible_number, **architecture.choices)
    i, o, k = int(inputs.of(chosen)), int(outputs.of(chosen)), chosen.K
    cut = slice((layer.weight.shape[2] - k) // 2, (layer.weight.shape[2] - k) // 2 + k)
    channels = (slice(i), slice(o)) if layer.transposed else (slice(o), slice(i))
    x = randn(2, layer.in_channels, *positions)

    padding = (dilation * (max(options["K"]) - 1) // 2) - dilation * (max(options["K"]) - k) // 2
    slice_of_it = layer.weight[(*channels, *[cut] * len(positions))], layer.bias[:o]
    expected = convolve(x[:, :i], *slice_of_it, stride, padding, dilation=dilation)
    case.space.select(architecture)
    torch.testing.assert_close(layer(x[:, :i]), expected)
    case.space.relax(case.space.one_hot(architecture))
    soft = layer(x)
    torch.testing.assert_close(soft[:, :o], expected)
    assert not soft[:, o:].any()
    plain = layer.plain(case.space.assignment_of(architecture)).double()
    plain.load_state_dict(dict(zip(("weight", "bias"), slice_of_it, strict=True)))
    torch.testing.assert_close(plain(x[:, :i]), expected)


def make_divisible_number(number, divisor):
    return int(make_divisible(number, divisor).number({}))


def test_recalibrated_statistics_are_the_average_over_batches():
    norm = nn.BatchNorm2d(2)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), norm).eval()
    batches = [torch.randn(4, 1, 3, 3) for _ in range(3)]
    recalibrate(network, batches)
    means = torch.stack([network[0](b).mean((0, 2, 3)) for b in batches]).mean(0)
    variances = torch.stack([network[0](b).var((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.1 and not network.training


# Errors.


def one(**options):
    space = SearchSpace()
    return space, [space.choice(name, listed) for name, listed in options.items()]


def test_kernels_of_odd_and_even_size_have_no_common_centre():
    _, (kernel,) = one(kernel=(3, 4))
    with pytest.raises(TangleNASError, match="mixes odd and even kernel sizes: choose all odd or all even"):
        elastic.Conv2d(1, 1, kernel, padding=3)


def test_padding_must_leave_something_for_the_smallest_kernel():
    _, (kernel,) = one(kernel=(3, 7))
    with pytest.raises(TangleNASError, match=r"padding 1 is too small for kernels \[3, 7\].*Use at least 2"):
        elastic.Conv2d(1, 1, kernel, padding=1)


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "message"),
    [
        (lambda c: c, lambda c: c, lambda c: 2, "keeps the channels of one group fixed"),
        (lambda c: 8, lambda c: c, lambda c: c, "keeps the channels of one group fixed"),
        (lambda c: c, lambda c: 8, lambda c: c, "let the number of groups grow with the channels"),
        (lambda c: 6, lambda c: 4, lambda c: c, "6 channels do not divide into 4 groups"),
    ],
)
def test_groups_must_grow_with_the_channels(inputs, outputs, groups, message):
    _, (channels,) = one(channels=(4, 8))
    with pytest.raises(TangleNASError, match=message):
        elastic.Conv2d(inputs(channels), outputs(channels), 1, groups=groups(channels))


def test_query_heads_share_keys_in_groups_of_one_size():
    _, (heads,) = one(heads=(4, 8))
    with pytest.raises(TangleNASError, match="the query heads of one head of keys are fixed in number, but"):
        elastic.GroupedAttention(8, heads, 2, 4)
    with pytest.raises(TangleNASError, match="4 channels do not divide into 3 groups"):
        elastic.GroupedAttention(8, heads, 3, 4)


def test_heads_of_torch_have_one_dimension():
    _, (width,) = one(width=(4, 8))
    with pytest.raises(TangleNASError, match=r"the dimension of a head is fixed, .* grow with the width"):
        elastic.MultiheadAttention(width, 2)


def test_a_depth_needs_as_many_layers_as_its_largest_option():
    _, (depth,) = one(depth=(1, 3))
    with pytest.raises(TangleNASError, match="the depth can be 3, but 2 layers are given"):
        elastic.Depth(depth, [nn.Identity(), nn.Identity()])


def test_a_layer_of_a_depth_is_given_once():
    _, (depth,) = one(depth=(1, 2))
    layer = nn.Linear(2, 2)
    with pytest.raises(TangleNASError, match=r"a layer of the depth is given twice\. .* may share their parameters"):
        elastic.Depth(depth, [layer, layer])


@pytest.mark.parametrize(
    "options", [{"padding_mode": "circular"}, {"padding": "same"}, {"padding": "valid", "padding_mode": "reflect"}]
)
def test_padding_is_a_number_of_zeros(options):
    with pytest.raises(TangleNASError, match="pads by a number of zeros"):
        elastic.Conv2d(2, 2, 3, **options)


@pytest.mark.parametrize("relaxation", ["exact", "gated"])
@pytest.mark.parametrize("role", ["unit", "write", "read"])
@pytest.mark.parametrize("kind", [elastic.LayerNorm, elastic.RMSNorm, elastic.BatchNorm1d])
def test_a_norm_over_an_axis_has_the_statistics_of_the_architecture(kind, role, relaxation):
    class Normed(SearchSpace):
        def __init__(self):
            super().__init__(relaxation=relaxation)
            width = self.choice("width", (4, 8))
            self.first, self.norm = elastic.Linear(3, width), kind(Axis(width, role=role))

        def forward(self, x):
            return self.norm(self.first(x))[..., :4]

    space, x = Normed().double().train(), torch.randn(5, 3, dtype=torch.float64)
    small = space.architecture(width=4)
    before = copy.deepcopy(space.state_dict())
    hard = space.select(small)(x)
    moved = {name: buffer.clone() for name, buffer in space.named_buffers()}
    space.load_state_dict(before)
    torch.testing.assert_close(space.relax(space.one_hot(small))(x), hard)
    for name, buffer in space.named_buffers():
        used = slice(4) if buffer.dim() else ...
        torch.testing.assert_close(buffer[used], moved[name][used])


@pytest.mark.parametrize(
    "build",
    [
        lambda h: elastic.Linear(4, h),
        lambda h: elastic.Linear(h * 2, 4),
        lambda h: elastic.Conv2d(h, 4, 1),
        lambda h: elastic.LayerNorm(h),
        lambda h: elastic.RMSNorm(h),
        lambda h: elastic.GroupNorm(1, h),
        lambda h: elastic.BatchNorm2d(h),
        lambda h: elastic.Embedding(3, h),
        lambda h: elastic.Attention(4, h, 2),
        lambda h: elastic.Depth(h, [nn.Identity() for _ in range(3)]),
    ],
)
def test_a_choice_made_per_layer_must_be_indexed(build):
    heads = SearchSpace().choice("heads", (1, 3), per=2)
    with pytest.raises(TangleNASError, match=r"'heads' is made per layer: index it, as in heads\[0\]"):
        build(heads)


def test_a_width_of_nothing_is_refused():
    _, (width, ratio) = one(width=(1, 2), ratio=(0.5, 1))
    with pytest.raises(TangleNASError, match=r"must be at least 1, but .* can be 0"):
        elastic.Linear(3, width * ratio)


def test_a_layer_mixes_choices_of_one_space_only():
    (_, (here,)), (_, (there,)) = one(a=(1, 2)), one(b=(1, 2))
    with pytest.raises(TangleNASError, match="Linear mixes choices of two search spaces"):
        elastic.Linear(here, there)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        (elastic.BatchNorm2d, (3, 2), r"\(B, C, H, W\)"),
        (elastic.BatchNorm1d, (3, 2, 1, 1), r"\(B, C\) or \(B, C, L\)"),
    ],
)
def test_a_batch_norm_wants_the_dimensions_of_its_name(kind, shape, expected):
    _, (width,) = one(width=(1, 2))
    with pytest.raises(ValueError, match=rf"expected a {expected} input, got \({', '.join(map(str, shape))}\)"):
        kind(width)(torch.randn(*shape))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda c: 2, "keeps the channels of one group fixed, but .*let the number of groups grow with the channels"),
        (lambda c: 3, "4 channels do not divide into 3 groups"),
    ],
)
def test_groups_of_a_norm_are_whole(groups, message):
    _, (channels,) = one(channels=(4, 8))
    with pytest.raises(TangleNASError, match=message):
        elastic.GroupNorm(groups(channels), channels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_default_eps_of_rms_norm_is_that_of_torch_in_every_precision(dtype):
    x = torch.tensor([[1e-3, -2e-3, 5e-4, 1e-3]], dtype=dtype)
    norm = elastic.RMSNorm(4, elementwise_affine=False)
    got = norm.normalised(x, torch.ones(4, dtype=dtype))  # as under a mixture that covers all
    torch.testing.assert_close(got, torch.nn.functional.rms_norm(x, (4,)), rtol=0.01, atol=0)
