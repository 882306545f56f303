"""Models that nobody wrote for a search become spaces whose corners, costs and gradients are exact."""

import copy
import operator
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine import TangleNASError, elasticize
from tanglenas_engine.spaces.products import count_products
from tanglenas_engine.testing.spaces import check_architectures, check_corners, check_costs, check_learning

VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
TIMM = {
    "resnet10t": dict(channels=(8, 8, 16, 24), stem_width=8),
    "vit_tiny_patch16_224": VIT,
    "mobilenetv3_small_050": {},
    "convnext_atto": dict(depths=(1, 1, 2, 1), dims=(8, 16, 16, 24)),
    "resnet26": dict(channels=(4, 8, 8, 16)),
    "resnext26ts": {},
    "seresnet50": dict(layers=(1, 1, 2, 1), channels=(4, 8, 8, 16)),
    "regnety_002": {},
    "mobilenetv2_050": {},
    "mnasnet_small": {},
    "lcnet_050": {},
    "tinynet_e": {},
    "ghostnet_050": {},
    "densenet121": dict(growth_rate=8, block_config=(2, 2)),
    "repvgg_a0": {},
    "nf_resnet26": {},
    "convnextv2_atto": dict(depths=(1, 1, 2, 1), dims=(8, 16, 16, 24)),
    "inception_next_atto": {},
    "poolformer_s12": {},
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "cait_xxs24_224": VIT,
    "mixer_s16_224": dict(img_size=32),
    "resmlp_12_224": dict(img_size=32),
    "swin_tiny_patch4_window7_224": dict(
        img_size=32, embed_dim=24, depths=(1, 2), num_heads=(2, 2), window_size=4, drop_path_rate=0.0
    ),
    "pvt_v2_b0": {},
}
"""Architectures of timm at a size for tests, with images of 32 pixels."""


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **TIMM[name])


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.part(28)
@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_space_inside_a_model_of_timm_keeps_every_promise(name):
    model, x = network(name), torch.randn(2, 3, 32, 32)
    space = elasticize(model, x)
    assert space.report.share > 0.6 and str(space.report)
    model.eval()
    assert space.eval()(x).equal(model(x))
    assert space.state_dict().keys() == model.state_dict().keys()
    for check in (check_architectures, check_corners, check_costs, check_learning):
        check(lambda: copy.deepcopy(space).train())


class Small(nn.Module):
    """Two layers with 32 hidden units; subclasses do something in between."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.relu(self.first(x))))

    def between(self, x: Tensor) -> Tensor:
        return x


def test_hidden_units_become_a_choice_and_the_model_is_left_alone():
    model = Small()
    before = copy.deepcopy(model)
    space = elasticize(model, torch.randn(2, 8), hidden=(0.5, 1))
    assert {name: choice.options for name, choice in space.choices.items()} == {"first": (16, 32)}
    assert type(model.first) is nn.Linear and all(map(torch.equal, model.parameters(), before.parameters()))
    found = space.extract(space.smallest())
    assert [tuple(p.shape) for p in found.parameters()] == [(16, 8), (16,), (3, 16), (3,)]
    assert isinstance(found, torch.fx.GraphModule)


class Versioned(Small):
    """A model that loads weights of its own version, as MNASNet of torchvision does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError("the version should be 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_a_model_may_load_weights_of_its_own_version_alone():
    space = elasticize(Versioned(), torch.randn(2, 8))
    check_corners(lambda: copy.deepcopy(space))


# Operations that tie a dimension to its length keep it, whatever else they do.

KEEPING = {
    "part": lambda x: torch.cat([x[:, :4], x[:, 4:]], 1),
    "write": lambda x: _written(x),
    "unknown": lambda x: torch.fft.rfft(x, dim=1).abs()[:, :16].repeat(1, 2),
    "softmax": lambda x: x.softmax(1),
    "sort": lambda x: x.sort(1)[0],
    "product": lambda x: x @ torch.ones(32, 32),
    "constant": lambda x: x + torch.arange(32.0),
    "unequal": lambda x: torch.cat(x.split([20, 12], 1), 1),
    "noise": lambda x: x + torch.randn(len(x), 32),
    "norm": lambda x: x / x.norm(dim=1, keepdim=True).clamp_min(1e-6),
}


def _written(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :4] += 1
    return x


@pytest.mark.parametrize("name", KEEPING)
def test_what_has_no_rule_keeps_its_size_and_says_why(name):
    class Model(Small):
        def between(self, x: Tensor) -> Tensor:
            return KEEPING[name](x)

    with pytest.raises(TangleNASError, match=r"Model has no layer whose size can vary: .+"):
        elasticize(Model(), torch.randn(2, 8))


VARYING = {
    "in place": lambda x: x.mul_(2).add_(1),
    "regrouped": lambda x: x.view(-1, 4, 8).transpose(1, 2).flatten(1).view(-1, 8, 4).transpose(1, 2).reshape(-1, 32),
    "halves": lambda x: torch.cat([half * 2 for half in x.chunk(2, 1)], 1),
    "gated": lambda x: torch.cat([F.silu(a) * b for a, b in [x.chunk(2, 1)]] * 2, 1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "batch": lambda x: x.reshape(len(x) * 2, 16).reshape(len(x), 32),
    "type": lambda x: x.float().to(x.dtype),
}


@pytest.mark.parametrize("name", VARYING)
def test_what_has_a_rule_varies_exactly(name):
    class Model(Small):
        def between(self, x: Tensor) -> Tensor:
            return VARYING[name](x)

    torch.manual_seed(0)
    space = elasticize(Model(), torch.randn(2, 8), divisor=4)
    check_corners(lambda: copy.deepcopy(space))
    check_costs(lambda: copy.deepcopy(space))


UNARY = "neg pos abs invert".split()
BINARY = "add sub mul truediv floordiv mod pow and_ or_ xor lshift rshift".split()
WHOLE = {"invert", "and_", "or_", "xor", "lshift", "rshift"}
"""Operators that take whole numbers alone."""


@pytest.mark.parametrize(
    "name, order",
    [*((name, "unary") for name in UNARY), *((n, order) for n in BINARY for order in ("first", "second", "in place"))],
)
def test_operators_of_python_are_repeated(name, order):
    function = getattr(operator, f"i{name.rstrip('_')}" if order == "in place" else name)

    class Model(Small):
        def between(self, x: Tensor) -> Tensor:
            x = 4 * x + 1
            given = x.long() if name in WHOLE else x
            operands = {"unary": (given,), "second": (2, given)}.get(order, (given, 2))
            return function(*operands).to(x.dtype)

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 8)
    space = elasticize(model, x).eval()
    assert list(space.choices) == ["first"] and space(x).equal(model(x))


class Block(nn.Module):
    """An MLP with a residual: `inner` is its activation, and `outer` adds what it computes to the stream."""

    def __init__(self, inner, outer=operator.add):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(16, 64), nn.Linear(64, 16), nn.LayerNorm(16)
        self.inner, self.outer = inner, outer

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x, self.last(self.inner(self.first(self.norm(x)))))


def halves(x: Tensor) -> Tensor:
    a, b = x.unflatten(1, (2, 32)).unbind(1)
    return torch.cat([a + b.sin(), b + a.cos()], 1)


INNER = {
    "GPT-2's GELU": lambda x: x * torch.tanh(x + 0.044715 * torch.pow(x, 3)),
    "a sum with an activation": lambda x: x + F.relu(x),
    "a sum with a gate": lambda x: x + x * torch.sigmoid(x),
    "a sum with itself": lambda x: x + x,
    "in place": lambda x: x.mul(2).add_(x),
    "heads": lambda x: (x.view(-1, 8, 8) + x.view(-1, 8, 8).sin()).flatten(1),
    "halves": halves,
}
OUTER = {
    "a sum": operator.add,
    "a sum in place": lambda x, y: x.clone().add_(y),
    "a sum with a product": lambda x, y: x * 0.5 + y * x,
    "a gate between both": lambda x, y: x * (1 - torch.sigmoid(y)) + y.tanh() * torch.sigmoid(y),
}


@pytest.mark.parametrize("name", [*INNER, *OUTER])
def test_a_residual_stream_is_what_several_layers_write(name):
    torch.manual_seed(0)
    block = Block(INNER.get(name, F.relu), OUTER.get(name, operator.add))
    space = elasticize(nn.Sequential(nn.Linear(8, 16), block, nn.Linear(16, 3)), torch.randn(2, 8))
    kinds = {part.name: part.kind for part in space.report.choices}
    assert kinds == {"0": "residual", "1.first": "hidden"}, space.report


class Scaled(Block):
    """A block with numbers that follow from the type: `eps` is 1.2e-7 in float32, and 2.2e-16 in float64."""

    def __init__(self):
        super().__init__(F.relu)

    def forward(self, x: Tensor) -> Tensor:
        limits = torch.finfo(x.dtype)
        scaled = super().forward(x).clamp(limits.min, limits.max) * limits.eps * 1e7
        return x + scaled.masked_fill(scaled > 1, limits.tiny)


@pytest.mark.parametrize("words", [False, True])
def test_limits_of_floating_types_follow_the_type(words):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Scaled() for _ in range(2)))
    first = nn.Embedding(8, 16) if words else nn.Linear(8, 16)
    model = nn.Sequential(first, blocks, nn.Linear(16, 3)).eval()
    x = torch.randint(8, (2, 5)) if words else torch.randn(2, 8)
    space = elasticize(model, x).eval()
    assert {part.kind for part in space.report.choices} == {"depth", "residual", "hidden"}
    for dtype in (torch.float64, torch.bfloat16):
        given = x if words else x.to(dtype)
        assert space.to(dtype)(given).equal(model.to(dtype)(given))


def test_a_layer_that_is_called_again_is_one_layer():
    class Model(Small):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(32, 32)

        def between(self, x: Tensor) -> Tensor:
            return self.again(torch.tanh(self.again(x)))

    space = elasticize(Model(), torch.randn(2, 8))
    assert len(space.choices) == 1
    check_corners(lambda: copy.deepcopy(space))


@pytest.mark.slow
def test_tied_weights_stay_tied():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm, self.head = nn.Embedding(11, 16), nn.LayerNorm(16), nn.Linear(16, 11, bias=False)
            self.head.weight = self.words.weight

        def forward(self, indices: Tensor) -> Tensor:
            return self.head(self.norm(self.words(indices)))

    space = elasticize(Model(), torch.randint(11, (2, 6)))
    assert not space.output_layer, "weights of another vocabulary are those of another embedding, too"
    found = space.extract(space.smallest())
    assert found.head.weight is found.words.weight and found.head.weight.shape[1] < 16
    check_corners(lambda: copy.deepcopy(space))
    check_costs(lambda: copy.deepcopy(space))


class Looks(Small):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Searches(Small):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if 1.5 in x else x


class Rounding(Small):
    def between(self, x: Tensor) -> Tensor:
        return x * {torch.float32: 2.0, torch.float64: 3.0}.get(x.dtype, 1.0)


def hooked() -> nn.Module:
    model = Small()
    model.first.register_forward_hook(lambda *_: None)
    return model


class Modes(Small):
    def between(self, x: Tensor) -> Tensor:
        return x.sin() if self.training else x.cos()


class OneByOne(Small):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.last(self.first(row)) for row in x])


class Counting(Small):
    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.bias.add_(1)
        return x


class Lending(Small):
    def between(self, x: Tensor) -> Tensor:
        halves = {name: parameter / 2 for name, parameter in self.other.named_parameters()}
        return torch.func.functional_call(self.other, halves, (x,))

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(32, 32)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and people still have such files
        return torch.jit.script(Small())


class Casting(Small):
    def __init__(self):
        super().__init__()
        self.first.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x.bfloat16())).float())


REFUSED = {
    "no module": (lambda: 3, r"takes a torch module, got int"),
    "numbers of a tensor": (
        Looks,
        r"Looks cannot become a space: its forward depends on the numbers of a tensor \(bool",
    ),
    "membership in a tensor": (
        Searches,
        r"Searches cannot become a space: its forward depends on the numbers .*contain",
    ),
    "numbers of a precision": (Rounding, r"takes 2.0, 2.0 in train mode, and 3.0 for a longer batch in float64"),
    "hooks": (hooked, r"first \(Linear\) has hooks, which a recording leaves out"),
    "other calls in train mode": (Modes, r"makes other calls in train mode than in evaluation \(in the model, at "),
    "a loop over the batch": (OneByOne, r"makes other calls for a longer batch"),
    "changed parameters": (Counting, r"its forward changes a parameter or a buffer"),
    "weights of others": (Lending, r"its forward calls other with other weights than its own"),
    "scripted": (lambda: scripted(), r"is compiled: give the module that was compiled"),
    "scripted inside": (lambda: nn.Sequential(scripted()), r"0 \(RecursiveScriptModule\) is compiled"),
    "a lazy layer": (lambda: nn.LazyLinear(3), r"LazyLinear has no numbers in weight yet"),
    "casting": (Casting, r"Casting cannot be computed in one floating type.*Take conversions"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), r"remove its parametrization"),
    "nothing to vary": (
        lambda: nn.Linear(8, 3),
        r"Linear has no layer whose size can vary: it is a dimension of the out",
    ),
    "no numbers": (lambda: Small().to("meta"), r"has no numbers in weight yet"),
    "another input": (
        lambda: nn.Linear(7, 3),
        r"does not take the example of shape \(2, 8\) and type torch.float32: .*7",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_spaces_are_refused_with_a_sentence(name):
    make, sentence = REFUSED[name]
    with pytest.raises(TangleNASError, match=sentence):
        elasticize(make(), torch.randn(2, 8))


@pytest.mark.parametrize("example", [torch.randn(8), torch.zeros(0, 8), [1, 2]])
def test_an_example_is_a_batch(example):
    with pytest.raises(TangleNASError, match="expected a batch of inputs"):
        elasticize(Small(), example)


@pytest.mark.parametrize("shares", [(), (0,), (2,), 1, "0.5", ["half"], (True,), (float("nan"),)], ids=str)
def test_options_are_shares(shares):
    with pytest.raises(TangleNASError, match="expected shares of the model's size"):
        elasticize(Small(), torch.randn(2, 8), hidden=shares)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"divisor": 0}, "divisor is 0, expected a whole number of at least 1"),
        ({"divisor": -8}, "divisor is -8, expected a whole number of at least 1"),
        ({"output": None}, "output is None: expected a function of what the model returns"),
        ({"output": operator.attrgetter("logits")}, "`output` does not take what Small returns: AttributeError"),
        ({"initial": 3}, r"`initial` \(int\) does not have the parameters of Small"),
        ({"initial": nn.Linear(2, 2)}, r"`initial` \(Linear\) does not have the parameters of Small"),
        ({"fixed": "first"}, r"fixed is 'first': expected a list of names of choices, such as \['first'\]"),
        ({"fixed": [3]}, "fixed is .* expected a list of names"),
        ({"fixed": ["frist"]}, r"unknown choice in fixed 'frist'. Did you mean 'first'\? Choose one of: first."),
    ],
    ids=str,
)
def test_options_that_nothing_can_be_done_with_are_refused(options, sentence):
    with pytest.raises(TangleNASError, match=sentence):
        elasticize(Small(), torch.randn(2, 8), **options)


def test_a_name_that_stays_anyway_may_be_fixed():
    model = nn.Sequential(Small(), nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    names = elasticize(model, torch.randn(2, 8)).choices.keys()
    assert names == {"0.first", "0.last", "1"}
    assert elasticize(model, torch.randn(2, 8), fixed=("0.first", "3")).choices.keys() == names - {"0.first"}


class LowRank(nn.Module):
    """A weight that is a product of two parameters, whose choices are "u" and "u.2"."""

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(64, 5)), nn.Parameter(torch.randn(5, 16))
        self.last = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(F.linear(x, self.u @ self.v)))


def test_each_of_several_choices_of_one_tensor_is_fixed_by_its_own_name():
    for name in ("u", "u.2"):
        space = elasticize(LowRank(), torch.randn(4, 16), fixed=[name])
        assert space.choices.keys() == {"u", "u.2"} - {name}
        assert [part.name for part in space.report.fixed if "named in" in part.reason] == [name]


class Adapter(nn.Module):
    """A layer of LoRA."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(8, inputs)), nn.Parameter(torch.randn(outputs, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)


class Queries(nn.Module):
    """Learned queries for each input: a product that does not depend on the input, but is computed for each."""

    def __init__(self):
        super().__init__()
        self.queries, self.weight = nn.Parameter(torch.randn(1, 4, 16)), nn.Parameter(torch.randn(32, 16))
        self.up, self.last = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries = F.linear(self.queries.expand(len(x), -1, -1), self.weight)  # (B, 4, 32)
        return self.last((queries + self.up(x)[:, None]).mean(1))


@pytest.mark.parametrize(
    "make, inputs",
    [
        (lambda: nn.Sequential(Adapter(32, 64), nn.ReLU(), Adapter(64, 3)), 32),
        (LowRank, 16),
        (Queries, 8),
    ],
    ids=["adapter", "low rank", "queries"],
)
def test_a_product_of_parameters_is_counted_as_often_as_it_is_computed(make, inputs):
    torch.manual_seed(0)
    space = elasticize(make(), torch.randn(4, inputs))
    check_costs(lambda: copy.deepcopy(space))


class Mixing(nn.Module):
    """A layer over tokens that is called before and behind a change of the width."""

    def __init__(self):
        super().__init__()
        self.up, self.tokens, self.last, self.again = (nn.Linear(*n) for n in ((16, 64), (9, 9), (64, 32), (32, 3)))

    def forward(self, x: Tensor) -> Tensor:  # (B, 9, 16)
        x = self.tokens(x.transpose(1, 2)).transpose(1, 2)
        x = self.tokens(self.up(x).transpose(1, 2)).transpose(1, 2)  # (B, 9, 64)
        return self.again(torch.relu(self.last(x.mean(1))))


def test_a_layer_with_other_positions_in_each_call_keeps_them():
    space = elasticize(Mixing(), torch.randn(4, 9, 16))
    assert [*space.choices] == ["last"]
    assert "a linear layer goes along it in one call and not in another" in str(space.report)
    check_costs(lambda: copy.deepcopy(space))


def test_choices_whose_cost_is_miscounted_are_refused(monkeypatch):
    from tanglenas_engine.conversion.forms import Product

    monkeypatch.setattr(Product, "macs", lambda self, output: [(1, self._sizes)])
    with pytest.raises(TangleNASError, match="its multiply-accumulates do not follow from its sizes"):
        elasticize(LowRank(), torch.randn(4, 16))


def test_a_module_that_looks_at_numbers_is_called_as_a_whole():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.free, self.link, self.stuck = Small(), nn.Linear(3, 8), Looks()

        def forward(self, x: Tensor) -> Tensor:
            return self.stuck(self.link(self.free(x)))

    space = elasticize(Model(), torch.randn(2, 8))
    assert "free.first" in space.choices and not any(name.startswith("stuck") for name in space.choices)
    assert "its forward depends on the numbers of a tensor" in str(space.report)
    assert space.cost(space.largest()).macs == 8 * 32 + 32 * 3 + 3 * 8 + count_products(Looks(), torch.randn(1, 8))
    check_corners(lambda: copy.deepcopy(space))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(32), nn.Dropout(0.5)])
def test_a_layer_that_stays_in_evaluation_is_refused(layer):
    class Model(Small):
        def __init__(self):
            super().__init__()
            self.still = layer

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.still.eval()
            return self

        def between(self, x: Tensor) -> Tensor:
            return self.still(x)

    with pytest.raises(TangleNASError, match="Model keeps still in evaluation while it trains"):
        elasticize(Model(), torch.randn(2, 8))


@pytest.mark.parametrize(
    "make, layer",
    [
        (Small, "last"),
        (lambda: nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "1"),
        (lambda: Twice(), ""),
        (lambda: nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 5, 1), nn.BatchNorm2d(5)), ""),
    ],
)
def test_the_layer_of_the_classes_is_known_so_that_weights_for_others_can_be_loaded(make, layer):
    model = make()
    space = elasticize(model, torch.randn(2, 8) if isinstance(model, Small) else torch.randn(2, 3, 4, 4))
    assert space.output_layer == layer


class Twice(Small):
    """Two heads, whose outputs are added."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.other(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_new_networks_have_the_types_of_the_model(dtype):
    class Model(Small):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(32))

        def between(self, x: Tensor) -> Tensor:
            return x * self.scale

    space = elasticize(Model().to(dtype), torch.randn(2, 8, dtype=dtype))
    assert space.standalone(space.smallest())(space.example_input(2)).dtype == dtype


def test_choices_of_layers_have_the_same_name_where_the_depth_is_fixed():
    class Block(Small):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    model, x = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Block(), Block(), Block())), torch.randn(2, 8)
    assert list(elasticize(model, x).choices) == ["1.depth", "1.first"]
    space = elasticize(model, x, fixed=["1.depth"])
    assert {name: len(choice) for name, choice in space.choices.items()} == {"1.first": 3}
    check_corners(lambda: copy.deepcopy(space))
    fixed = elasticize(nn.Sequential(*model, nn.Linear(8, 16), nn.Linear(16, 3)), x, fixed=["1.depth", "1.first"])
    assert "1.depth" not in fixed.choices and "1.first" not in fixed.choices and "2" in fixed.choices
    one = elasticize(model, x, fixed=["1.depth", "1.1.first"])
    assert len(one.choices["1.first"]) == 2 and len(one.extract(one.smallest()).get_submodule("1.1.first").bias) == 32
    check_corners(lambda: copy.deepcopy(one))


@pytest.mark.parametrize(
    "first", [nn.LeakyReLU(0.1, True), lambda x: x + torch.randn_like(x), lambda x: F.dropout(x, training=True)]
)
def test_a_model_may_change_its_input_or_draw_random_numbers_in_evaluation(first):
    class Model(Small):
        def __init__(self):
            super().__init__()
            self.before = first

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.before(x))

    x = torch.randn(2, 8)
    before = x.clone()
    assert "first" in elasticize(Model(), x).choices and x.equal(before)


def test_a_size_for_which_an_architecture_draws_other_numbers_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.latent, self.rest = nn.Linear(8, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

        def forward(self, x: Tensor) -> Tensor:
            latent = self.latent(x)
            return self.rest(latent + torch.randn_like(latent))

    assert list(elasticize(Model(), torch.randn(2, 8)).choices) == ["rest.0"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Parameter(torch.ones(32).bool(), requires_grad=False),
        lambda: nn.Parameter(torch.arange(32), requires_grad=False),
        lambda: nn.Parameter(torch.ones(32, dtype=torch.cfloat)),
    ],
)
def test_parameters_of_other_types_than_floats_are_no_hindrance(make):
    class Model(Small):
        def __init__(self):
            super().__init__()
            self.other = make()

        def between(self, x: Tensor) -> Tensor:
            return torch.where(self.other.abs() > 0 if self.other.dtype != torch.bool else self.other, x, 0 * x)

    model = nn.Sequential(Model(), nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 3))
    space = elasticize(model, torch.randn(2, 8))
    assert "1" in space.choices and space.cost(space.smallest()).params
    assert space.standalone(space.smallest())(space.example_input(2)).shape == (2, 3)


MADE = {
    "zeros": lambda x: x + torch.zeros(len(x), 1),
    "numbers": lambda x: x * torch.tensor([0.5]),
    "a mask": lambda x: x.masked_fill(torch.ones(len(x), 1).tril() == 0, 0.0),
}


@pytest.mark.parametrize("name", MADE)
def test_tensors_that_a_forward_makes_without_a_device_are_no_hindrance_to_costs(name):
    class Model(Small):
        def between(self, x: Tensor) -> Tensor:
            return MADE[name](x)

    space = elasticize(Model(), torch.randn(2, 8))
    assert space.cost(space.largest()).macs == 8 * 32 + 32 * 3


@pytest.mark.parametrize("number", [lambda x: float(x.mean()), lambda x: float(x.detach().numpy().mean())])
def test_a_module_called_as_a_whole_may_need_numbers_in_costs(number):
    class Whole(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if number(x) > -100 else x

    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), Whole(16, 16), nn.Linear(16, 3))
    space = elasticize(model, torch.randn(2, 8))
    assert space.cost(space.largest()).macs == 8 * 32 + 32 * 16 + 16 * 16 + 16 * 3


@pytest.mark.parametrize("kind", ["child", "parameter", "buffer"])
@pytest.mark.parametrize("name", ["gate", "select", "stacks", "relaxation", "report"])
def test_parts_of_a_model_may_have_the_names_of_attributes_of_spaces(name, kind):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 32)
            if kind == "child":
                setattr(self, name, nn.Linear(32, 32))
            elif kind == "parameter":
                setattr(self, name, nn.Parameter(torch.randn(32)))
            else:
                self.register_buffer(name, torch.randn(32))

        def forward(self, x: Tensor) -> Tensor:
            own = getattr(self, name)
            return x + self.last(torch.relu(self.first(own(x) if kind == "child" else x * own)))

    class Model(Layer):
        def __init__(self):
            super().__init__()
            self.held, self.layers, self.head = Layer(), nn.Sequential(Layer(), Layer()), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(self.held(super().forward(x))))

    model, x = Model().eval(), torch.randn(2, 32)
    space = elasticize(model, x)
    assert "layers.depth" in space.choices and space(x).equal(model(x))
    assert space.state_dict().keys() == model.state_dict().keys()
    space.relaxation = "gated"
    space.cost(space.smallest())
    check_corners(lambda: copy.deepcopy(space))


def test_a_part_that_an_extracted_network_would_read_as_its_own_attribute_is_refused():
    class Model(Small):
        def __init__(self):
            super().__init__()
            self.graph = nn.Linear(32, 32)

        def between(self, x: Tensor) -> Tensor:
            return self.graph(x)

    with pytest.raises(TangleNASError, match=r"Model\.graph has the name of an attribute of torch\.fx.*rename it"):
        elasticize(Model(), torch.randn(2, 8))


def test_recurrent_layers_stay_and_say_so():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.rest = nn.GRU(8, 8, batch_first=True), Small()

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.memory(x)[0][:, -1])

    space = elasticize(Model(), torch.randn(2, 4, 8))
    assert list(space.choices) == ["rest.first"]
    assert "recurrent layers have no elastic form" in str(space.report)


def test_inputs_of_another_shape_are_refused():
    space = elasticize(timm.create_model("resnet10t", **TIMM["resnet10t"]), torch.randn(2, 3, 32, 32))
    for model in (space, space.extract(space.smallest())):
        with pytest.raises(AssertionError, match=r"expected inputs of shape \(batch, 3, 32, 32\), as recorded"):
            model(torch.randn(1, 3, 64, 64))


def test_named_choices_stay():
    space = elasticize(
        network("vit_tiny_patch16_224"), torch.randn(2, 3, 32, 32), fixed=["blocks.depth"], residual=(1,)
    )
    assert list(space.choices) == ["blocks.attn.qkv", "blocks.mlp.fc1"]
    assert "it is named in `fixed`" in str(space.report)


def test_a_network_is_drawn_with_the_deviations_of_the_model():
    model = network("vit_tiny_patch16_224")
    nn.init.normal_(model.blocks[0].mlp.fc1.weight, 3.0, 0.5)
    space = elasticize(model, torch.randn(2, 3, 32, 32))
    name = "blocks.0.mlp.fc1.weight"
    weights = [space.standalone(space.largest()).get_parameter(name).detach() for _ in range(2)]
    assert not weights[0].equal(weights[1])
    assert abs(float(weights[0].mean()) - 3) < 0.1 and abs(float(weights[0].std()) - 0.5) < 0.05
    assert space.standalone(space.largest()).norm.weight.eq(1).all()


def test_a_dropout_drops_in_train_mode_alone():
    model = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=3, proj_drop_rate=0.5, attn_drop_rate=0.5,
                              drop_path_rate=0.5)  # fmt: skip
    nn.init.normal_(model.head.weight)
    x = torch.randn(4, 3, 32, 32)
    space = elasticize(model, x)
    for one in (space, space.extract(space.smallest())):
        assert one.eval()(x).equal(one(x)) and not one.train()(x).equal(one(x))


@pytest.mark.slow
def test_networks_are_exported_and_copied():
    space = elasticize(network("vit_tiny_patch16_224"), torch.randn(2, 3, 32, 32)).eval()
    found, x = space.extract(space.smallest()), torch.randn(3, 3, 32, 32)
    batch = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(found, (x,), dynamic_shapes=batch).module()
    torch.testing.assert_close(exported(x[:2]), found(x[:2]))
    torch.testing.assert_close(copy.deepcopy(found)(x), found(x))
    twin = copy.deepcopy(space)
    twin.select(twin.smallest())
    assert space(x).equal(space.release()(x)) and twin(x).shape == (3, 5) and not twin(x).equal(space(x))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["hf bert", "hf gpt2", "hf llama", "hf vit"])
def test_a_space_inside_a_model_of_transformers_keeps_every_promise(name):
    pytest.importorskip("transformers", reason="models of transformers need the library")
    from benchmarks.elasticize import built

    model, x = built(name)
    before = copy.deepcopy(model.config)
    space = elasticize(model, x)
    assert model.config.to_dict() == before.to_dict()
    assert space.report.share > 0.6 and {"heads", "hidden"} <= {part.kind for part in space.report.choices}
    # Its norms compute in float32, whatever its weights are.
    check_corners(lambda: copy.deepcopy(space), 1e-6 if name == "hf llama" else 1e-9)
    check_costs(lambda: copy.deepcopy(space))


# What a layer has beside its shape


class Pooled(nn.Module):
    """A norm over the means and the largest values of channels, one after the other, as fastai's head has it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1)
        return self.head(self.norm(x.flatten(1)))


def test_statistics_of_channels_in_blocks_are_kept_on_the_hard_path():
    torch.manual_seed(0)
    space = elasticize(Pooled(), torch.randn(2, 3, 8, 8))
    assert {axis.blocks for axis in space.get_submodule("norm").axes["running_mean"]} == {2}
    architecture = space.smallest()
    network = space.extract(architecture).train()
    space.select(architecture).train()
    x = torch.randn(16, 3, 8, 8) * 2 + 1
    assert torch.allclose(space(x), network(x), atol=1e-5)
    state = space.inherited(architecture)
    for name, buffer in network.named_buffers():
        assert torch.allclose(state[name], buffer, atol=1e-6), name
    assert float(network.get_submodule("norm").running_mean.abs().sum()) > 0


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def test_a_frozen_layer_stays_frozen_and_keeps_its_values():
    model = dense()
    model[0].requires_grad_(False)
    space = elasticize(model, torch.randn(4, 10))
    architecture = space.smallest()
    for network in (space.extract(architecture), space.standalone(architecture)):
        frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
        assert frozen == ["0.weight", "0.bias"]
        width = len(network.get_submodule("0").bias)
        assert width < 32 and torch.equal(network.get_submodule("0").weight, model[0].weight[:width])
    assert not torch.equal(space.standalone(architecture).get_submodule("4").bias, model[4].bias)


def test_a_new_network_has_no_statistics_of_the_given_one():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    model(torch.randn(8, 3, 8, 8) * 30 + 100)
    space = elasticize(model, torch.randn(2, 3, 8, 8), fixed=["0"])
    network = space.standalone(space.smallest())
    for name in ("1", "4"):
        norm = network.get_submodule(name)
        assert not norm.running_mean.any() and norm.running_var.eq(1).all() and int(norm.num_batches_tracked) == 0
    assert int(space.extract(space.smallest()).get_submodule("1").num_batches_tracked) == 1


class Tokens(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(20, 32, **options), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, indices: Tensor) -> Tensor:
        return self.down(self.up(self.table(indices)).relu().mean(1))


def test_the_row_that_pads_has_no_gradient_and_is_zero_at_the_start():
    torch.manual_seed(0)
    space = elasticize(Tokens(padding_idx=0), torch.randint(1, 20, (4, 6)))
    assert "table" in {name for name in space.choices}
    indices = torch.tensor([[0, 1, 2, 0, 0, 3]] * 2)
    for network in (space, space.extract(space.smallest()), fresh := space.standalone(space.smallest())):
        network(indices).sum().backward()
        gradient = network.get_submodule("table").weight.grad
        assert not gradient[0].any() and gradient[1].any()
    assert not fresh.get_submodule("table").weight[0].any()


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_a_table_that_does_more_than_look_up_stays_as_it_is(options):
    space = elasticize(Tokens(**options), torch.randint(1, 20, (4, 6)))
    assert type(space.get_submodule("table")) is nn.Embedding and [*space.choices] == ["up"]
    assert any("max_norm" in part.reason for part in space.report.parts if part.reason)


@pytest.mark.parametrize(
    "padding, kernel, norm",
    [
        ("same", 3, {}), ("valid", 3, {}), (1, 3, {"affine": False}), ("same", 5, {"track_running_stats": False}),
    ],
)  # fmt: skip
def test_padding_in_words_and_norms_without_a_gain_vary_as_others_do(padding, kernel, norm):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, kernel, padding=padding), nn.BatchNorm2d(32, **norm), nn.ReLU(),
        nn.Conv2d(32, 16, kernel, padding=padding), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    space = elasticize(model, torch.randn(2, 3, 12, 12))
    assert {name: len(choice.options) for name, choice in space.choices.items()} == {"0": 4, "3": 4}
    if norm.get("track_running_stats", True):  # else an output depends on the batch, which the check refuses
        check_corners(lambda: copy.deepcopy(space))


def test_a_norm_without_any_tensor_keeps_its_channels():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32, affine=False, track_running_stats=False), nn.ReLU(),
        nn.Conv2d(32, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    space = elasticize(model, torch.randn(2, 3, 12, 12))
    assert [*space.choices] == ["3"]
    assert any("batch_norm as a function without a gain" in part.reason for part in space.report.parts)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_that_is_not_equal_on_both_sides_stays_as_it_is():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 4, padding="same"), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    space = elasticize(model, torch.randn(2, 3, 12, 12))
    assert [*space.choices] == ["2"]
    assert any("not equal on both sides" in part.reason for part in space.report.parts if part.reason)


# Blocks that turn gradients or autocast on or off


class WithoutGradients(Small):
    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.other(x)

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(32, 32)


class Doubled(torch.autograd.Function):
    """The identity with twice the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * 2


class OwnGradient(Small):
    def between(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)


class Precise(Small):
    """A block that stays in float32, opened always or, as transformers does it, only in autocast."""

    always = True

    def between(self, x: Tensor) -> Tensor:
        if not self.always and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            return x.float() @ (torch.eye(32, device=x.device) / 3)
        with torch.autocast(x.device.type, enabled=False):
            return x.float() @ (torch.eye(32, device=x.device) / 3)


class PreciseInAutocast(Precise):
    always = False


class Learning(WithoutGradients):
    """A block that leaves gradients on where the model is trained, and autocast as it is."""

    def between(self, x: Tensor) -> Tensor:
        kept = torch.is_autocast_enabled("cpu")
        with torch.set_grad_enabled(self.training), torch.autocast("cpu", torch.bfloat16, enabled=kept):
            return self.other(x)


class NotLearning(WithoutGradients):
    """A block that turns gradients off where the model is trained, and on elsewhere."""

    def between(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.training):
            return self.other(x)


class Checkpointed(WithoutGradients):
    def between(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.other, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of a checkpoint in evaluation
@pytest.mark.parametrize("kind", [Learning, Checkpointed])
def test_blocks_that_change_nothing_in_training_are_taken_apart(kind):
    assert [*elasticize(kind(), torch.randn(2, 8)).choices] == ["first", "other"]


class Around(nn.Module):
    """A module between layers that vary."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.up, self.down, self.inner, self.last = nn.Linear(8, 32), nn.Linear(32, 8), inner, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.down(torch.relu(self.up(x)))))


@pytest.mark.parametrize(
    "kind, reason",
    [
        (WithoutGradients, "turns gradients off"),
        (NotLearning, "turns gradients off"),
        (OwnGradient, "has gradients of its own"),
        (Precise, "turns autocast on or off"),
        (PreciseInAutocast, "turns autocast on or off"),
    ],
)
def test_a_module_with_a_block_is_called_as_a_whole(kind, reason):
    torch.manual_seed(0)
    model, x = Around(kind()), torch.randn(4, 8)
    space = elasticize(model, x)
    assert [*space.choices] == ["up"] and reason in str(space.report)
    for one in (space, space.extract(space.largest())):
        for autocast in (False, True):
            model.zero_grad(), one.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                expected, found = model(x), one(x)
            assert found.equal(expected)
            expected.sum().backward(), found.sum().backward()
            for name, parameter in model.named_parameters():
                gradient = one.get_parameter(name).grad
                assert (gradient is None) == (parameter.grad is None), name
                assert gradient is None or torch.allclose(gradient, parameter.grad), name
    check_costs(lambda: copy.deepcopy(space))


def test_a_frozen_part_without_gradients_is_taken_apart():
    model = WithoutGradients()
    model.first.requires_grad_(False), model.other.requires_grad_(False)
    assert [*elasticize(model, torch.randn(2, 8)).choices] == ["first", "other"]


@pytest.mark.parametrize("kind, what", [(WithoutGradients, "gradients off"), (Precise, "autocast on or off")])
def test_a_model_whose_own_forward_has_a_block_is_refused(kind, what):
    with pytest.raises(TangleNASError, match=f"{what}.*; put the part that does so into a module of its own"):
        elasticize(kind(), torch.randn(2, 8))


class Angles(nn.Module):
    """Positions as rotary embeddings compute them: of the features, they read the type alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.rand(1, 6))

    @torch.no_grad()
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (positions.float()[:, None] @ self.frequencies.float()).cos().to(x.dtype)


class Rotating(Tokens):
    def __init__(self):
        super().__init__()
        self.angles = Angles()

    def forward(self, indices: Tensor) -> Tensor:
        x = self.table(indices)
        return self.down(self.up(x * self.angles(x, torch.arange(6, device=x.device))[:, :1]).relu().mean(1))


def test_a_module_called_as_a_whole_keeps_only_what_it_reads():
    space = elasticize(Rotating(), torch.randint(1, 20, (4, 6)))
    assert {*space.choices} == {"table", "up"} and "turns autocast on or off" in str(space.report)
    check_corners(lambda: copy.deepcopy(space))
    check_costs(lambda: copy.deepcopy(space))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_example_inputs_are_of_the_type_of_the_example(dtype):
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    space = elasticize(model, torch.randn(4, 16).to(dtype))
    example = space.example_input(3)
    assert example.dtype == dtype and space(example).shape == (3, 10)
