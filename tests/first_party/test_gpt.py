"""GPT: heads as slices or as a partition, a head tied to the embedding, and what its standalone network can do."""

import copy
import itertools
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from architectures import counted, put
from oracle import Dimension, Oracle, Used, heads, layer_norm
from spaces import random_mixture
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tanglenas_gpt.network
from tanglenas_engine import SearchSpace, create_space, elastic
from tanglenas_engine.errors import TangleNASError
from tanglenas_gpt.network import GPT as Network
from tanglenas_gpt.network import Config, generate, to_hugging_face
from tanglenas_gpt.partition import PartitionedAttention
from tanglenas_gpt.space import GPT

modes = pytest.mark.parametrize("heads_are", ["slices", "partition"])
WIDTHS, HEADS = (16, 8, 24), (1, 4, 2)


def gpt(seed=0, **options):
    """A small GPT in float64, with parameters that are all far from 0. Some of its pairs share a head dimension."""
    torch.manual_seed(seed)
    defaults = dict(
        layers=(2, 1, 3), embed_dim=WIDTHS, num_heads=HEADS, mlp_ratio=(1.5, 2), vocab_size=7, block_size=6, bias=True
    )
    space = GPT(**{**defaults, **options}).double()
    with torch.no_grad():
        for parameter in space.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return space


def architectures(space, count=10):
    generator = torch.Generator().manual_seed(1)
    return [space.smallest(), space.largest(), *(space.sample(generator) for _ in range(count))]


# Corners.


@pytest.mark.parametrize("path", ["hard", "exact", "gated"])
@pytest.mark.parametrize("bias", [False, True])
@modes
def test_a_corner_is_the_extracted_network(heads_are, bias, path):
    space = gpt(heads=heads_are, bias=bias)
    for architecture in architectures(space):
        for training, tokens in ((True, 6), (False, 3)):
            ids = torch.randint(7, (2, tokens))
            network = space.train(training).extract(architecture)
            torch.testing.assert_close(put(space, path, architecture)(ids), network(ids), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("path", ["hard", "exact", "gated"])
@modes
@pytest.mark.part(3)
def test_a_training_step_at_a_corner_is_one_of_the_extracted_network(heads_are, path):
    ids = torch.randint(7, (3, 6))
    for architecture in architectures(gpt(heads=heads_are), 3):
        space = gpt(heads=heads_are)
        network = space.extract(architecture)
        put(space, path, architecture)
        for model in (space, network):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
        stepped = space.inherited(architecture)
        for key, value in network.state_dict().items():
            torch.testing.assert_close(stepped[key], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("relaxation", ["exact", "gated", "paper"])
def test_every_alpha_and_every_weight_gets_a_gradient_where_heads_partition(relaxation):
    space = gpt(heads="partition", relaxation=relaxation)
    alphas, mixture = random_mixture(space)
    space.relax(mixture)(space.example_input(4)).square().sum().backward()
    for tensor in (*alphas.values(), *space.parameters()):
        assert tensor.grad.isfinite().all()
    for alpha in alphas.values():
        assert (alpha.grad.abs() > 1e-10).all()


@modes
def test_dropout_is_in_the_same_places(heads_are):
    space = gpt(heads=heads_are, dropout=0.4)
    network, ids = space.extract(space.largest()), torch.randint(7, (2, 6))
    outputs = []
    for model in (space, space.select(space.largest()), network):
        torch.manual_seed(5)
        outputs.append(model(ids))
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[2])
    assert not torch.allclose(network.eval()(ids), outputs[2])


@modes
def test_a_later_token_changes_no_earlier_logit(heads_are):
    space = gpt(heads=heads_are).eval()
    ids = torch.randint(7, (2, 6))
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % 7
    space.relax(random_mixture(space)[1])
    for model in (space, space.extract(space.smallest())):
        before, after = model(ids), model(changed)
        torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=0)
        assert ((before - after)[:, 4:].abs().amax((0, 2)) > 1e-6).all()


@modes
def test_any_number_of_tokens_up_to_the_block_size_and_no_more(heads_are):
    space = gpt(heads=heads_are).eval()
    ids = torch.randint(7, (2, 7))
    for model in (space, space.relax(random_mixture(space)[1]), space.extract(space.largest())):
        torch.testing.assert_close(model(ids[:1, :1]), model(ids[:, :6])[:1, :1])
        with pytest.raises(ValueError, match="7 tokens in a row, but the model sees block_size=6"):
            model(ids)


# Sizes and costs.


@pytest.mark.parametrize(("name", "size"), [("gpt", 16_120_377), ("gpt_char", 1_791_153)])
def test_the_spaces_of_the_paper_have_its_number_of_architectures(name, size):
    with torch.device("meta"):
        assert create_space(name).size == size


@modes
def test_the_largest_network_has_the_parameters_that_the_paper_says(heads_are):
    with torch.device("meta"):
        space = create_space("gpt", heads=heads_are)
    parameters = (50304 + 224) * 768 + 7 * (12 * 768 * 768 + 2 * 768) + 768
    assert round(parameters / 1e6, 2) == 88.36
    assert space.cost(space.largest()).params == sum(p.numel() for p in space.parameters()) == parameters


@modes
@pytest.mark.slow
def test_the_cost_is_what_the_extracted_network_counts(heads_are):
    space = gpt(heads=heads_are)
    for architecture in architectures(space):
        cost, ids = space.cost(architecture), space.example_input(1)
        with sdpa_kernel(SDPBackend.MATH):
            assert (cost.params, cost.flops) == counted(space.extract(architecture), ids)
        expected = space.expected_cost(space.one_hot(architecture))
        assert (expected.params.item(), expected.flops.item()) == (cost.params, cost.flops)


# Heads that partition the width, against the sum over pairs (e, h), written out.


class Attention(SearchSpace):
    """One layer of attention, and nothing else."""

    def __init__(self, widths=WIDTHS, num_heads=HEADS, **options):
        super().__init__(**options)
        width = self.choice("E", widths) if isinstance(widths, tuple) else widths
        number = self.choice("H", num_heads) if isinstance(num_heads, tuple) else num_heads
        self.attn = PartitionedAttention(width, number)

    def forward(self, x):
        return self.attn(x)


def grouped(x, number):
    """`(B, T, W)` -> `(B, H, T, W / H)`."""
    return torch.stack(x.chunk(number, -1), 1)


def attended(q, k, v, number):
    """Attention of `number` heads, side by side: `(B, T, W)`."""
    return torch.cat(heads(*(grouped(x, number) for x in (q, k, v)), causal=True).unbind(1), -1)


def padded(x, width):
    return torch.cat([x, x.new_zeros(*x.shape[:-1], width - x.shape[-1])], -1)


def exact(oracle, attn, x, gated):
    """One attention per pair; `gated` takes head dimension and width for independent, and covers reads only."""
    E = Dimension("E", lambda v: v.E)
    c = oracle.coverage(E)
    q, k, v = F.linear(x * c, attn.qkv.weight, attn.qkv.bias).chunk(3, -1)
    total = torch.zeros_like(q)
    pairs = [(int(a.E), int(a.H), p) for a, p in oracle.architectures("EH")]
    if gated:
        for d in {e // h for e, h, _ in pairs}:
            widest = max(e for e, h, _ in pairs if e // h == d)
            probability = sum(p for e, h, p in pairs if e // h == d)
            total = total + probability * c * padded(
                attended(*(t[..., :widest] for t in (q, k, v)), widest // d), total.shape[-1]
            )
    else:
        for e, h, p in pairs:
            total = total + p * padded(attended(*(t[..., :e] for t in (q, k, v)), h), total.shape[-1])
    y = F.linear(total, attn.proj.weight, attn.proj.bias)
    return y if gated else y * c


def published(oracle, attn, x):
    """The authors' form, with q, k and v each in its own third."""
    E = Used(Dimension("E", lambda v: v.E))
    stacked = Used(E.dimension, parts=3)
    width = x.shape[-1]
    weight, bias = oracle.superposed(attn.qkv.weight, stacked, E), oracle.superposed(attn.qkv.bias, stacked)
    total = 0.0
    for h, of_h in zip(oracle.options["H"], oracle.probabilities["H"], strict=True):
        mixed = []
        for t in F.linear(x, weight, bias).chunk(3, -1):
            mixed.append(
                sum(
                    of_h * of_e * padded(grouped(t[..., :e], h), width // h)
                    for e, of_e in zip(oracle.options["E"], oracle.probabilities["E"], strict=True)
                )
            )
        total = total + torch.cat(heads(*mixed, causal=True).unbind(1), -1)
    return F.linear(total, oracle.superposed(attn.proj.weight, E, E), oracle.superposed(attn.proj.bias, E))


@pytest.mark.parametrize("relaxation", ["exact", "gated", "paper"])
def test_attention_is_the_sum_over_widths_and_numbers_of_heads(relaxation):
    space = Attention(relaxation=relaxation).double()
    alphas, mixture = random_mixture(space)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    leaves = [x, *space.parameters(), *alphas.values()]
    oracle = Oracle({"E": WIDTHS, "H": HEADS}, {name: alpha.softmax(-1) for name, alpha in alphas.items()})
    form = published if relaxation == "paper" else partial(exact, gated=relaxation == "gated")
    found, expected = space.relax(mixture)(x), form(oracle, space.attn, x)
    torch.testing.assert_close(found, expected)
    noise = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((y * noise).sum(), leaves) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("widths", "number"), [(8, HEADS), (WIDTHS, 4), (8, 2), ((8, 16), (1, 2))])
@pytest.mark.parametrize("relaxation", ["exact", "gated", "paper"])
def test_either_side_of_the_partition_may_be_fixed(widths, number, relaxation):
    space = Attention(widths, number, relaxation=relaxation).double()
    oracle = Oracle(
        {name: s if isinstance(s, tuple) else (s,) for name, s in (("E", widths), ("H", number))},
        {name: torch.ones(1, dtype=torch.float64) for name in "EH"},
    )
    weights = {name: w.detach() for name, w in random_mixture(space)[1].items()}
    oracle.probabilities.update(weights)
    if weights:
        space.relax(weights)
    x = torch.randn(1, 4, max(oracle.options["E"]), dtype=torch.float64)
    form = published if relaxation == "paper" else partial(exact, gated=relaxation == "gated")
    torch.testing.assert_close(space(x), form(oracle, space.attn, x))


def test_attention_runs_once_for_each_head_dimension_and_once_for_an_architecture(monkeypatch):
    calls = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: calls.append(q.shape) or attention(q, *a, **k)
    )
    space = Attention().double()
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    space(x), space.select(space.architecture(E=8, H=2))(x[..., :8])
    assert [tuple(shape) for shape in calls] == [(1, 4, 4, 6), (1, 2, 4, 4)]
    calls.clear()
    space.relax(random_mixture(space)[1])(x)
    assert sorted((s[-1], s[1]) for s in calls) == [(2, 4), (4, 4), (6, 4), (8, 2), (12, 2), (16, 1), (24, 1)]


def test_a_standalone_attention_keeps_its_number_of_heads():
    space = Attention().double()
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    for h in HEADS:
        network = space.extract(space.architecture(E=16, H=h))
        torch.testing.assert_close(network(x), space.select(space.architecture(E=16, H=h))(x))


# A head tied to the embedding.


@modes
def test_the_head_is_the_embedding_everywhere(heads_are, tmp_path):
    space = gpt(heads=heads_are)
    network = space.extract(space.smallest())
    space.export(network, space.smallest(), tmp_path)
    models = (space, copy.deepcopy(space), network, space.standalone(space.largest()), Network.load(tmp_path))
    for model in models:
        assert model.lm_head.weight is model.wte.weight
        assert sum(name.endswith(("wte.weight", "lm_head.weight")) for name, _ in model.named_parameters()) == 1
    network.load_state_dict(space.inherited(space.smallest()))
    assert network.lm_head.weight is network.wte.weight


class Shares(SearchSpace):
    """Layers that share weights: with one that is always there, and with those of another depth."""

    def __init__(self, other=None, **options):
        super().__init__(**options)
        E, L, M = self.choice("E", (2, 4)), self.choice("L", (1, 2, 3)), self.choice("M", (1, 3))
        self.first = elastic.Linear(3, E)
        self.layers = elastic.Depth(L, [elastic.Linear(E, E, bias=False) for _ in range(3)])
        self.again = elastic.Depth(M, [elastic.Linear(E, E, bias=False) for _ in range(3)])
        self.last = elastic.Linear(other or E, E, bias=False)
        self.head = elastic.Linear(E, 3, bias=False)
        self.last.weight = self.layers[1].weight
        self.again[1].weight = self.again[2].weight = self.layers[2].weight

    def forward(self, x):
        return self.head(self.last(torch.tanh(self.again(self.layers(torch.tanh(self.first(x)))))))

    def example_input(self, batch):
        return torch.randn(batch, 3)


@pytest.mark.slow
def test_a_tied_parameter_is_counted_once_and_tied_again():
    space = Shares().double()
    everything = [
        space.architecture(E=e, L=layers, M=again) for e, layers, again in itertools.product((2, 4), (1, 2, 3), (1, 3))
    ]
    for architecture in everything:
        network, x = space.extract(architecture), torch.randn(2, 3, dtype=torch.float64)
        E, L, M = architecture.choices.values()
        count = 3 * E + E + 3 * E + E * E * (3 + (L > 2 or M > 1))
        assert space.cost(architecture).params == sum(p.numel() for p in network.parameters()) == count
        assert space.expected_cost(space.one_hot(architecture)).params.item() == count
        for group in ([network.last, *network.layers[1:2]], [*network.layers[2:], *network.again[1:]]):
            assert len({id(module.weight) for module in group}) <= 1
        for path in ("hard", "exact", "gated"):
            torch.testing.assert_close(put(space, path, architecture)(x), network(x))
    weights = {name: w.detach() for name, w in random_mixture(space)[1].items()}
    expected = 0
    for architecture in everything:
        rows = [weights[n][space.choices[n].options.index(o)] for n, o in architecture.choices.items()]
        expected = expected + math.prod(rows) * space.cost(architecture).params
    torch.testing.assert_close(space.expected_cost(weights).params, expected)


def test_layers_that_slice_a_weight_differently_cannot_share_it():
    space = Shares(other=4)
    for ask in (space.cost, space.extract):
        with pytest.raises(TangleNASError, match=r"layers.1.weight and last.weight are one parameter, but sliced"):
            ask(space.smallest())


# The standalone network.


def test_an_exported_folder_is_the_network(tmp_path):
    from safetensors.torch import load_file

    space = gpt(dropout=0.1).float()
    architecture = space.sample(torch.Generator().manual_seed(2))
    network, ids = space.eval().extract(architecture), torch.randint(7, (2, 6))
    space.export(network, architecture, tmp_path / "new" / "folder")
    loaded = Network.load(tmp_path / "new" / "folder")
    assert torch.equal(loaded(ids), network(ids))
    assert loaded.config == network.config
    assert "lm_head.weight" not in load_file(tmp_path / "new" / "folder" / "model.safetensors")
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert config["num_heads"] == list(architecture.choices["num_heads"])
    standalone = space.standalone(architecture).eval()
    standalone.load_state_dict(load_file(tmp_path / "new" / "folder" / "model.safetensors"))
    assert torch.equal(standalone(ids), network(ids))


def test_a_state_dict_without_the_embedding_is_refused():
    network = Network(Config(5, 4, 8, (2,), (2,)))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*wte.weight"):
        network.load_state_dict({})


def test_fresh_networks_deviate_by_their_width():
    """A deviation of 0.02 whatever the width leaves the attention of narrow networks uniform for most of a training."""
    space = create_space("gpt_nano", bias=True)
    smallest = space.standalone(space.smallest())
    published = create_space("gpt_nano", weight_init="gpt2")
    for model in (published, published.standalone(published.largest())):
        assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for model, width, layers in ((space, 64, 4), (space.standalone(space.largest()), 64, 4), (smallest, 32, 2)):
        std = math.sqrt(2 / (5 * width))
        for inner in (model.wte, model.wpe, model.blocks[0].fc1, model.blocks[1].attn.qkv):
            assert inner.weight.std().item() == pytest.approx(std, rel=0.1)
        for residual in (model.blocks[1].fc2, model.blocks[1].attn.proj):
            assert residual.weight.std().item() == pytest.approx(std / math.sqrt(2 * layers), rel=0.1)
            assert not residual.bias.any()


def test_fresh_llamas_deviate_by_their_width():
    space = create_space("llama_nano")
    for model, width, layers in ((space, 64, 4), (space.standalone(space.smallest()), 32, 2)):
        std, layer = math.sqrt(2 / (5 * width)), model.model.layers[1]
        assert model.model.embed_tokens.weight.std().item() == pytest.approx(std, rel=0.1)
        assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(std, rel=0.1)
        assert layer.mlp.down_proj.weight.std().item() == pytest.approx(std / math.sqrt(2 * layers), rel=0.1)


def network(**options):
    torch.manual_seed(3)
    defaults = dict(vocab_size=11, block_size=5, embed_dim=12, num_heads=(3, 3), mlp_ratio=(2, 2), bias=True)
    made = Network(Config(**{**defaults, **options}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_generation_follows_its_generator_and_nothing_else():
    model, ids = network(dropout=0.5).train(), torch.randint(11, (3, 2))
    before = torch.get_rng_state()
    first, again = (generate(model, ids, 9, generator=seeded()) for _ in range(2))
    assert first.shape == (3, 11) and torch.equal(first, again) and torch.equal(first[:, :2], ids)
    assert not torch.equal(first, generate(model, ids, 9, generator=seeded(1)))
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert torch.equal(generate(model, ids, 0), ids)


def test_greedy_generation_takes_the_most_likely_token_after_the_last_block():
    model = network().eval()
    with torch.no_grad():  # a tied head by itself likes to repeat the last token
        model.wpe.weight.mul_(3)
        model.norm.weight.normal_()
    ids = torch.randint(11, (2, 3))
    assert len(generate(model, ids, 6, temperature=0).unique()) > 5
    for cold in (dict(temperature=0), dict(temperature=1e-6), dict(top_k=1)):
        found = generate(model, ids, 6, **cold)
        for place in range(3, 9):
            seen = found[:, max(0, place - 5) : place]
            assert torch.equal(found[:, place], model(seen)[:, -1].argmax(-1))


def test_top_k_and_temperature_shape_what_is_drawn():
    model = network().eval()
    ids = torch.zeros(4000, 1, dtype=torch.long)
    logits = model(ids[:1])[0, -1]
    for temperature, k in ((1.0, 3), (2.0, 11), (0.5, 100)):
        drawn = generate(model, ids, 1, temperature, k, seeded())[:, 1].bincount(minlength=11) / 4000
        kept = logits >= logits.sort(descending=True).values[min(k, 11) - 1]
        expected = (logits / temperature).exp() * kept
        assert (drawn - expected / expected.sum()).abs().max() < 0.03
        assert not drawn[~kept].any()


@pytest.mark.parametrize("wrong", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=0)])
def test_impossible_ways_to_generate_are_refused(wrong):
    with pytest.raises(ValueError, match="expected a temperature of at least 0, a top_k of at least 1"):
        generate(network(), torch.zeros(1, 1, dtype=torch.long), 1, **wrong)
    with pytest.raises(ValueError, match="at least one token"):
        generate(network(), torch.zeros(1, 0, dtype=torch.long), 1)


def gpt2(w, settings, ids):
    """The forward of transformers' GPT-2 on its own names and layout: `x @ W + b`, q, k and v side by side."""
    width, number = settings["n_embd"], settings["n_head"]

    def conv1d(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x, name):
        ones = torch.ones(width, dtype=x.dtype)
        return layer_norm(x, ones, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]
    for i in range(settings["n_layer"]):
        at = f"transformer.h.{i}"
        q, k, v = conv1d(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").split(width, 2)
        x = x + conv1d(attended(q, k, v, number), f"{at}.attn.c_proj")
        hidden = conv1d(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        assert hidden.shape[-1] == settings["n_inner"]
        if settings["activation_function"] == "gelu":
            share = torch.erf(hidden / 2**0.5)
        else:
            assert settings["activation_function"] == "gelu_new"
            share = torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3))
        x = x + conv1d(hidden * 0.5 * (1 + share), f"{at}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
@modes
def test_an_extracted_network_is_a_gpt_2(heads_are, bias, gelu):
    options = {"num_heads": (2,), "embed_dim": (16,), "mlp_ratio": (1.5,)} if heads_are == "slices" else {}
    space = gpt(heads=heads_are, bias=bias, gelu=gelu, **options).eval()
    chosen = {"layers": 2, "embed_dim": 16, "num_heads": [2, 2], "mlp_ratio": [1.5, 1.5]}
    found, ids = space.extract(space.architecture(**chosen)), torch.randint(7, (3, 6))
    weights, settings = to_hugging_face(found.state_dict(), found.config)
    assert settings["model_type"] == "gpt2"
    torch.testing.assert_close(gpt2(weights, settings, ids), found(ids))


def test_the_standalone_network_needs_no_engine():
    source = Path(tanglenas_gpt.network.__file__).read_text()
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE)) - set(sys.stdlib_module_names)
    assert imported == {"torch", "safetensors"}


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "slice"}, "unknown heads 'slice'. Did you mean 'slices'.*partition, slices"),
        (
            {"heads": "partition", "num_heads": (1, 3)},
            "3 heads do not partition a width of 16: choose numbers of heads",
        ),
        ({"sharing": "separate"}, "GPT cannot do sharing 'separate'"),
    ],
)
def test_options_that_make_no_network_are_refused(options, message):
    with pytest.raises(TangleNASError, match=message):
        gpt(**options)


def test_the_largest_network_of_slices_is_that_of_a_partition():
    slices, partition = gpt(heads="slices").eval(), gpt(heads="partition").eval()
    partition.load_state_dict(slices.state_dict())
    ids = torch.randint(7, (2, 6))
    torch.testing.assert_close(slices(ids), partition(ids))
    nested = nn.ModuleList(gpt(heads="slices", head_dim=5).blocks)
    assert nested[0].attn.qkv.weight.shape == (3 * 4 * 5, 24)


@pytest.mark.parametrize("name", ["gpt_nano", "llama_nano"])
def test_a_sample_needs_no_token_of_a_line_break(name):
    words = SimpleNamespace(encode=lambda text: torch.arange(len(text.split())), decode=lambda ids: str(len(ids)))
    space = create_space(name, vocab_size=3, block_size=4)
    assert space.show(space.standalone(space.smallest()), words) == "301"
