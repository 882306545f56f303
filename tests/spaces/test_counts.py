"""Multiply-accumulates of whatever module a space holds are counted, and torch's own counter agrees."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tanglenas_engine import SearchSpace, elastic
from tanglenas_engine.spaces.products import count_products
from tanglenas_engine.testing import check_corners, check_costs, check_learning

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Around(SearchSpace):
    """A module of fixed size between two elastic layers, on `(B, 4, 6, 6, 6)` cut to what the module takes."""

    def __init__(self, make, shape, **options):
        super().__init__(**options)
        self.shape = shape
        torch.manual_seed(0)
        self.inner = make()
        size = int(torch.Size(shape).numel())
        width = self.choice("width", (2, 3))
        self.first = elastic.Linear(5, width)
        self.second = elastic.Linear(width, size)
        with torch.no_grad():
            outputs = self.called(self.second(self.first(torch.randn(2, 5))))
        self.last = nn.Linear(outputs.shape[1], 3)

    def called(self, x):
        y = self.inner(x.reshape(len(x), *self.shape))
        return (y[0] if isinstance(y, tuple) else y).flatten(1)

    def forward(self, x):
        return self.last(self.called(self.second(self.first(x))))

    def example_input(self, batch):
        return torch.randn(batch, 5)


class ToItself(nn.Module):
    """Call a module on the same input several times."""

    def __init__(self, module, times):
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x):
        return self.module(*[x] * self.times)


class Steps(nn.Module):
    """Apply an RNN cell to each step of `(B, T, C)`."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Bags(nn.Module):
    """Look words up that do not depend on the input, so that the bag's count is all there is."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4)

    def forward(self, x):
        words = torch.zeros(len(x), 3, dtype=torch.long, device=x.device)
        return x + self.bag(words)


class Functional(nn.Module):
    """Has weights of its own and calls torch's functions on them."""

    def __init__(self):
        super().__init__()
        self.weight, self.scores = nn.Parameter(torch.empty(6, 4)), nn.Parameter(torch.empty(6))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        nn.init.normal_(self.scores)

    def forward(self, x):
        y = F.linear(x, self.weight)
        return torch.cat([y, (y @ self.scores)[:, None]], 1)


def transformer():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


MODULES = {
    # The module, the shape of one input, and the multiply-accumulates counted by hand.
    "Linear": (lambda: nn.Linear(4, 6), (4,), 4 * 6),
    "Linear of steps": (lambda: nn.Linear(4, 6), (5, 4), 5 * 4 * 6),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 5), 5 * 6 * 4 * 3),
    "Conv1d in groups": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (4, 5), 5 * 6 * 2 * 3),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5), 9 * 6 * 4 * 9),
    "Conv3d": (lambda: nn.Conv3d(4, 2, 3), (4, 4, 4, 4), 8 * 2 * 4 * 27),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (4, 5), 5 * 4 * 6 * 3),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 2, 2), (4, 3, 3), 9 * 4 * 6 * 4),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 2, 2), (4, 2, 2, 2), 8 * 4 * 2 * 8),
    "Bilinear": (lambda: ToItself(nn.Bilinear(4, 4, 6), 2), (4,), 6 * (4 * 4 + 4)),
    "RNN": (lambda: nn.RNN(4, 6, batch_first=True), (5, 4), 5 * (4 + 6) * 6),
    "GRU": (lambda: nn.GRU(4, 6, batch_first=True), (5, 4), 5 * (4 + 6) * 18),
    "GRU of two layers and directions": (
        lambda: nn.GRU(4, 6, 2, batch_first=True, bidirectional=True),
        (5, 4),
        5 * 2 * (4 + 6) * 18 + 5 * 2 * (12 + 6) * 18,
    ),
    "LSTM": (lambda: nn.LSTM(4, 6, batch_first=True), (5, 4), 5 * (4 + 6) * 24),
    "LSTM with a projection": (
        lambda: nn.LSTM(4, 6, batch_first=True, proj_size=3),
        (5, 4),
        5 * (4 + 3) * 24 + 5 * 6 * 3,
    ),
    "RNNCell": (lambda: Steps(nn.RNNCell(4, 6)), (5, 4), 5 * (4 + 6) * 6),
    "GRUCell": (lambda: Steps(nn.GRUCell(4, 6)), (5, 4), 5 * (4 + 6) * 18),
    "LSTMCell": (lambda: Steps(nn.LSTMCell(4, 6)), (5, 4), 5 * (4 + 6) * 24),
    "MultiheadAttention": (
        lambda: ToItself(nn.MultiheadAttention(4, 2, batch_first=True), 3),
        (5, 4),
        5 * 4 * 16 + 2 * 5 * 5 * 4,
    ),
    "TransformerEncoderLayer": (transformer, (5, 4), 5 * 4 * 16 + 2 * 5 * 5 * 4 + 2 * 5 * 4 * 8),
    "EmbeddingBag": (Bags, (4,), 0),
    "LayerNorm": (lambda: nn.LayerNorm(4), (4,), 0),
    "PReLU": (lambda: nn.PReLU(4), (4,), 0),
    "functions": (Functional, (4,), 4 * 6 + 6),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_torch_is_counted(name):
    make, shape, by_hand = MODULES[name]
    space = Around(make, shape).eval()
    for width in (2, 3):
        architecture = space.architecture(width=width)
        around = 5 * width + width * int(torch.Size(shape).numel()) + space.last.weight.numel()
        assert space.cost(architecture).flops == around + by_hand


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.part(3)
def test_the_conformance_kit_agrees_with_the_counter_of_torch(name):
    make, shape, _ = MODULES[name]
    check_costs(lambda: Around(make, shape))


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer", "GRU", "Conv1d", "functions"])
@pytest.mark.slow
def test_a_space_may_hold_a_plain_module_of_torch(name):
    make, shape, _ = MODULES[name]
    check_corners(lambda: Around(make, shape))
    check_learning(lambda: Around(make, shape))


def test_a_standalone_network_shares_no_weight_with_the_supernet():
    """An RNN keeps its weights in a list of its own too."""
    space = Around(lambda: nn.GRU(4, 6, batch_first=True), (5, 4))
    network = space.standalone(space.largest())
    ours = {parameter.data_ptr() for parameter in space.parameters()}
    assert not ours & {weight.data_ptr() for weight in network.inner._flat_weights}


def test_the_oracle_itself_counts_as_torch_does_on_real_tensors():
    network = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Flatten(), nn.Linear(18, 2))
    x = torch.randn(1, 4, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    assert count_products(network, x) == counter.get_total_flops() // 2 == 6 * 3 * 12 + 36


class Conv1d(elastic.Elastic, nn.Conv1d):
    """An author's elastic convolution that does not say what it costs."""

    def __init__(self, inputs, outputs, kernel):
        nn.Conv1d.__init__(self, inputs, outputs.max, kernel, padding=kernel // 2)
        self.declare(weight=(outputs, None, None), bias=(outputs,))

    def forward(self, x):
        return F.conv1d(x, self.current("weight"), self.current("bias"), padding=self.padding)

    def plain(self, assignment):
        outputs = self.axes["weight"][0].entries(assignment)
        return nn.Conv1d(self.in_channels, outputs, self.kernel_size[0], padding=self.padding[0])


class CountedConv1d(Conv1d):
    def macs(self, output):
        outputs = self.axes["weight"][0].size
        return [(output.shape[0] * output.shape[2] * self.in_channels * self.kernel_size[0], (outputs,))]


class Sequence(SearchSpace):
    layer = Conv1d

    def __init__(self, **options):
        super().__init__(**options)
        width = self.choice("width", (8, 4))
        self.conv = self.layer(4, width, 3)
        self.head = elastic.Linear(width, 3)

    def forward(self, x):
        return self.head(self.conv(x).mean(2))

    def example_input(self, batch):
        return torch.randn(batch, 4, 16)


class Counted(Sequence):
    layer = CountedConv1d


class Pairs(Counted):
    """Computes a product of a chosen size outside of every elastic layer that could say so."""

    def __init__(self, **options):
        super().__init__(**options)
        self.pairs = ToItself(_Products(), 1)

    def forward(self, x):
        y = self.conv(x)
        return self.head((y + self.pairs(y)).mean(2))


class _Products(nn.Module):
    def forward(self, x):
        return x @ (x.transpose(1, 2) @ x)


def test_an_elastic_layer_without_a_count_warns_and_is_counted_at_its_largest():
    with pytest.warns(UserWarning, match=r"not exact: conv \(Conv1d\) computes products.*no method `macs`"):
        cost = Sequence().cost(Sequence().smallest())
    assert cost.flops == 16 * 8 * 4 * 3 + 4 * 3


def test_an_elastic_layer_without_a_count_is_an_error_in_the_kit():
    with pytest.raises(AssertionError, match=r"conv \(Conv1d\) computes products of its own, but has no method `macs`"):
        check_costs(Sequence)


def test_an_elastic_layer_that_says_its_count_passes():
    check_costs(Counted)
    assert Counted().cost(Counted().smallest()).flops == 16 * 4 * 4 * 3 + 4 * 3


def test_a_product_of_a_chosen_size_in_a_plain_module_is_an_error_in_the_kit():
    with pytest.raises(AssertionError, match=r"known: pairs.module \(_Products\) computes products of chosen sizes"):
        check_costs(Pairs)


class Block(nn.Module):
    """Attention in the forward of an ordinary module over elastic layers: of chosen heads, or of fixed ones."""

    def __init__(self, width, heads):
        super().__init__()
        self.q, self.k, self.v = (elastic.Linear(width, heads * 4) for _ in range(3))
        self.out = elastic.Linear(heads * 4, width)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return x + self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Blocks(SearchSpace):
    """Blocks up to a depth, or one of two kinds of them."""

    def __init__(self, layout, fixed, **options):
        super().__init__(**options)
        width, heads = self.choice("width", (16, 8)), 2 if fixed else self.choice("heads", (1, 2, 4))
        self.stem, self.head = elastic.Linear(3, width), elastic.Linear(width, 2)
        if layout == "depth":
            depth = self.choice("depth", (1, 2, 3))
            self.blocks = elastic.Depth(depth, [Block(width, heads) for _ in range(3)])
        else:
            kind = self.choice("kind", ("linear", "attention", "again"))
            layers = {"linear": elastic.Linear(width, width)}
            layers |= {name: Block(width, heads) for name in ("attention", "again")}
            self.blocks = elastic.MixedOperation({
                name: (kind.map(lambda chosen, name=name: int(chosen == name)), layer) for name, layer in layers.items()
            })  # fmt: skip

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(1))

    def example_input(self, batch):
        return torch.randn(batch, 8, 3)


@pytest.mark.parametrize(
    "layout, names", [("depth", ["blocks.0", "blocks.1", "blocks.2"]), ("kind", ["attention", "again"])]
)
def test_products_of_chosen_sizes_in_the_forward_of_a_block_warn(layout, names):
    """Wherever the block is, also in architectures of the largest depth or of another operation only."""
    with pytest.warns(UserWarning, match="are not exact") as warned:
        uncounted = Blocks(layout, fixed=False).cost_model.uncounted
    assert len(uncounted) == len(names) and len(warned) == 1
    for name, sentence in zip(names, uncounted, strict=True):
        assert f"{name} (Block) computes products of chosen sizes, which count in elastic layers" in sentence


@pytest.mark.parametrize("layout", ["depth", "kind"])
def test_products_of_fixed_sizes_in_the_forward_of_a_block_count(layout):
    check_costs(partial(Blocks, layout, fixed=True))


def test_a_method_macs_that_says_another_number_is_an_error_in_the_kit():
    class Wrong(Counted):
        class layer(CountedConv1d):
            def macs(self, output):
                return [(2 * constant, sizes) for constant, sizes in super().macs(output)]

    with pytest.raises(AssertionError, match=r"costs \d+ multiply-accumulates, torch counts \d+ in its network"):
        check_costs(Wrong)


def test_a_layer_in_several_places_counts_once_for_each_call():
    class Shared(Sequence):
        layer = CountedConv1d

        def __init__(self, **options):
            super().__init__(**options)
            self.once = nn.Linear(16, 16)
            self.again = nn.Sequential(self.once)

        def forward(self, x):
            return self.head(self.conv(self.again(self.once(x))).mean(2))

    check_costs(Shared)
    assert Shared().cost(Shared().largest()).flops == 2 * 4 * 256 + 16 * 8 * 4 * 3 + 8 * 3


def test_an_operation_that_torch_cannot_count_is_named():
    library = torch.library.Library("tanglenas_tests", "FRAGMENT")
    library.define("product(Tensor x) -> Tensor")
    library.impl("product", lambda x: x * 2, "CompositeExplicitAutograd")

    class Foreign(nn.Module):
        def forward(self, x):
            return torch.ops.tanglenas_tests.product(x)

    with pytest.warns(UserWarning, match=r"inner \(Foreign\) calls tanglenas_tests.product, which torch cannot count"):
        space = Around(Foreign, (4,))
        space.cost(space.largest())
