"""Units in order of importance: the largest network stays the same, and smaller ones keep what matters most."""

import pytest
import torch
from spaces import Convolutional, inputs, make, vit
from tiny import ALL, tiny
from torch import nn

from tanglenas_engine import SearchSpace, elastic, elasticize
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.units import magnitude, order_units, taylor, units_of
from tanglenas_engine.training.losses import cross_entropy


def random_weights(space):
    """Weights that are trained as far as a test can tell: none is constant, and units differ in importance."""
    torch.manual_seed(4)
    with torch.no_grad():
        for tensor in (*space.parameters(), *space.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return space.eval()


def labelled(space):
    x = space.example_input(3)
    shape = space(x).shape
    return x, torch.randint(shape[-1], shape[:-1])


@pytest.fixture
def in_float64():
    """Importances are computed twice and compared: float32 rounds sums of other orders by more than the bound."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("by", ["magnitude", "taylor"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.part(3)
@pytest.mark.slow
def test_the_largest_network_stays_and_the_most_important_units_come_first(name, by, in_float64):
    space = random_weights(tiny(name))
    x, targets = labelled(space)
    importance = magnitude if by == "magnitude" else taylor(space, cross_entropy, [(x, targets)])
    before, state = space(x).detach(), {name: tensor.clone() for name, tensor in space.state_dict().items()}
    groups = units_of(space)
    kept = order_units(space, importance)
    after = space(x).detach()
    assert after.dtype == before.dtype and not space.training
    torch.testing.assert_close(after, before, rtol=1e-5, atol=3e-5 * float(before.abs().max()))
    moved = [name for name, tensor in space.state_dict().items() if not torch.equal(tensor, state[name])]
    assert bool(moved) == any(str(units) not in " ".join(kept) for units in groups)
    for units, values in zip(groups, importance(groups), strict=True):
        if str(units) not in " ".join(kept):
            assert (values.diff() <= 1e-6 * values.max()).all(), units
    space.select(space.smallest())(x)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_has_no_order_of_units_is_said_and_every_first_party_space_has_all_in_order():
    for name in ALL:
        kept = order_units(tiny(name))
        if name == "convolutional":  # its grouped convolution ties channels to their neighbours
            assert kept and all("keep their order" in sentence for sentence in kept)
        elif name.startswith(("nb201", "darts", "toy_cell")):
            assert len(kept) == 1 and "nothing to order" in kept[0]
        else:
            assert not kept, (name, kept)


@pytest.mark.parametrize("kv_heads", [(2, 3), (3,)])
def test_a_head_of_keys_takes_its_queries_along(kv_heads):
    """Where the number of heads is chosen: the last head of keys, with its two heads of queries, comes first."""
    space = random_weights(tiny("llama_nano", layers=(1,), num_kv_heads=kv_heads, embed_dim=(24,), mlp_width=(16,)))
    attention = space.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, 16:] *= 10
    queries, keys = (layer.weight.detach().clone() for layer in (attention.q_proj, attention.k_proj))
    kept = order_units(space)
    moved = len(kv_heads) > 1
    assert moved or "nothing to order" in kept[0]
    assert torch.equal(attention.q_proj.weight[:8], queries[16:] if moved else queries[:8])
    assert torch.equal(attention.k_proj.weight[:4], keys[8:] if moved else keys[:4])


def test_heads_move_as_blocks_and_q_k_and_v_with_them():
    space = random_weights(vit(num_heads=(1, 3), head_dim=4))
    attention = space.blocks[0].attn
    with torch.no_grad():
        attention.proj.weight[:, 8:] *= 10  # the last head matters most
    rows = attention.qkv.weight.detach().unflatten(0, (3, 3, 4)).clone()
    assert order_units(space) == []
    first = attention.qkv.weight.unflatten(0, (3, 3, 4))[:, 0]
    assert torch.equal(first.sort(-1).values, rows[:, 2].sort(-1).values)  # the channels of the residual moved too


def test_partitioned_heads_stay_where_they_are_while_the_residual_moves():
    space = random_weights(tiny("gpt_nano", heads="partition", num_heads=(2, 3)))
    ids = space.example_input(2)
    before, bias = space(ids), space.blocks[0].attn.qkv.bias
    bias = None if bias is None else bias.clone()
    assert order_units(space) == []
    torch.testing.assert_close(space(ids), before, rtol=1e-5, atol=1e-5)
    assert any("wte" in place.label for units in units_of(space) for place in units.places)
    assert not any(".qkv.weight" in p.label and p.dim == 0 for units in units_of(space) for p in units.places)


def test_tied_embeddings_move_once():
    space = random_weights(tiny("gpt_nano"))
    order_units(space)
    assert space.lm_head.weight is space.wte.weight
    (units,) = [units for units in units_of(space) if any("wte" in place.label for place in units.places)]
    assert not any("lm_head" in place.label for place in units.places)


class Flattened(SearchSpace):
    """Channels that a linear layer reads flattened, so that their own size does not say what reads them."""

    def __init__(self):
        super().__init__()
        channels, hidden = self.choice("channels", (2, 4)), self.choice("hidden", (3, 6))
        self.conv = elastic.Conv2d(1, channels, 3)
        self.fc1 = elastic.Linear(channels * 16, hidden)
        self.fc2 = elastic.Linear(hidden, 2)
        nn.init.zeros_(self.fc2.weight)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(self.conv(x).flatten(1))))

    def example_input(self, batch):
        return torch.randn(batch, 1, 4, 4)


def test_a_size_that_a_layer_reads_otherwise_keeps_its_order_and_the_others_move():
    """The head of zeros hides every change, so it is made random for the comparison and restored."""
    torch.manual_seed(0)
    space = Flattened()
    state = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    first, second = order_units(space)
    assert "conv.weight and 1 more" in first and "fc1.weight)" in second
    assert torch.equal(space.conv.weight, state["conv.weight"])
    assert torch.equal(space.fc2.weight, torch.zeros(2, 6)) and space.fc2.weight.dtype == torch.float32
    assert not torch.equal(space.fc1.weight, state["fc1.weight"])
    assert torch.equal(space.fc1.weight.sort(0).values, state["fc1.weight"].sort(0).values)


def test_a_grouped_convolution_ties_channels_and_bottlenecks_are_ordered_all_the_same():
    space = make("convolutional").eval()
    x = inputs(space, 2)
    before = space(x)
    kept = order_units(space)
    torch.testing.assert_close(space(x), before)
    assert isinstance(space, Convolutional) and len(kept) < len(units_of(space))


def test_importance_needs_data_and_finite_weights():
    space = vit()
    with pytest.raises(TangleNASError, match="needs a batch of data"):
        order_units(space, taylor(space, cross_entropy, []))
    with torch.no_grad():
        space.norm.weight.fill_(torch.nan)
    with pytest.raises(TangleNASError, match="not finite: the weights diverged"):
        order_units(space)


def test_ordering_draws_no_random_numbers():
    space = vit()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    order_units(space)
    assert torch.equal(torch.rand(3), expected)


def test_units_of_a_network_that_computes_in_float32_alone_are_ordered():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.last(torch.relu(self.first(x.float() / 255)))

    space = elasticize(Images(), torch.randint(255, (2, 8), dtype=torch.uint8))
    x, before = space.example_input(4), space.first.weight.clone()
    outputs = space(x)
    assert order_units(space) == [] and not torch.equal(space.first.weight, before)
    torch.testing.assert_close(space(x), outputs)
