"""torch.compile: the same numbers, two graphs for a whole search, and no break in them."""

import shutil
from functools import partial

import pytest
import torch
from ranked import searched
from spaces import vit
from tiny import tiny
from torch import nn
from torch._dynamo.utils import counters

from tanglenas_engine.data import SPLITS
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.stages.retrain import retrain
from tanglenas_engine.testing import random_data, same
from tanglenas_engine.training.execution import backend_of
from tanglenas_toy.cell import ToyCell

# Traces as torch.compile does and runs what it traced without a compiler: seconds instead of minutes.
TRACED = "aot_eager"


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    """How many graphs were compiled; there must be no break between any two."""
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def near(one, other):
    """Whether two states are equal to rounding."""
    for part in ("alphas", "weights"):
        for key, value in one[part].items():
            torch.testing.assert_close(value, other[part][key], rtol=0, atol=1e-5)
    assert one["architecture"] == other["architecture"]


@pytest.mark.exhaustive
def test_alpha_moves_through_20_steps_of_two_graphs():
    options = dict(space=partial(vit, depth=(1,)), architecture_optimizer=partial(torch.optim.Adam, lr=0.01))
    plain, compiled = (searched("drnas", compile=way, **options) for way in (False, TRACED))
    assert graphs() == 2  # the step of the weights and that of alpha
    near(plain, compiled)
    first, last = (row["mixture"] for row in (compiled["history"][0], compiled["history"][-1]))
    assert max(abs(a - b) for name in first for a, b in zip(_flat(first[name]), _flat(last[name]), strict=True)) > 0.01


def _flat(weights):
    return [value for row in weights for value in (row if isinstance(row, list) else [row])]


class OneCell(ToyCell):
    """The first of the three cells, whose layers are those of the others: tracing takes a time for each."""

    def __init__(self, channels=2):
        super().__init__(channels, image_size=8)
        del self.cells[1:]
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(2 * channels * 2 * 2, 10))


# As few layers as have everything of their kind; test_alpha_moves has the transformer for images.
KINDS = {
    "language": partial(tiny, "gpt_nano", layers=(1,)),
    "mobile": partial(tiny, "mobilenetv3_nano", relaxation="gated", stages=("s2_c16_nhs_se0.25",)),
    "cell": OneCell,
}


@pytest.mark.parametrize("space", KINDS.values(), ids=KINDS)
@pytest.mark.exhaustive
def test_spaces_of_all_kinds_compile_without_a_break(space):
    options = dict(space=space, epochs=1)
    plain, compiled = (searched("drnas", compile=way, **options) for way in (False, TRACED))
    assert graphs() == 2
    near(plain, compiled)


@pytest.mark.exhaustive
def test_second_order_steps_compile_too():
    space = partial(tiny, "stages")
    plain, compiled = (searched("darts2", space, epochs=1, compile=way) for way in (False, TRACED))
    # w' stands in for the weights with the mixture's gradient, w with and without.
    assert graphs() <= 4
    near(plain, compiled)


@pytest.mark.exhaustive
def test_a_simultaneous_search_has_one_graph():
    searched("drnas", partial(tiny, "stages"), epochs=2, strategy="simultaneous", compile=TRACED)
    assert graphs() == 1


@pytest.mark.parametrize("optimizer", ["spos", "gdas", "sandwich"])
@pytest.mark.exhaustive
def test_sampled_architectures_run_as_they_are(optimizer):
    plain, compiled = (searched(optimizer, epochs=1, compile=way) for way in (False, TRACED))
    assert graphs() == 0
    same(plain, compiled, optimizer)


@pytest.mark.exhaustive
def test_low_precision_compiles():
    options = dict(space=partial(vit, depth=(1,)), epochs=1, precision="bfloat16")
    low, compiled = (searched("drnas", **options, compile=way) for way in (False, TRACED))
    assert graphs() == 2
    assert compiled["history"][0]["weight_loss"] == pytest.approx(low["history"][0]["weight_loss"], abs=1e-2)


@pytest.mark.exhaustive
def test_retraining_compiles_one_graph():
    space = vit()
    data = random_data(space, SPLITS, samples=24)
    architecture = space.sample(torch.Generator().manual_seed(1))
    sgd = dict(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05), scheduler=None)
    plain, compiled = (
        retrain(space, architecture, data, epochs=3, batch_size=8, seed=3, compile=way, **sgd)
        for way in (False, TRACED)
    )
    assert graphs() == 1
    assert plain.network.state_dict().keys() == compiled.network.state_dict().keys()
    for one, other in zip(plain.network.parameters(), compiled.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.exhaustive
def test_compiled_code_computes_the_same():
    options = dict(space=partial(tiny, "stages"), epochs=1)
    plain, compiled = (searched("drnas", compile=way, **options) for way in (False, True))
    assert graphs() == 2
    near(plain, compiled)


def test_a_backend_that_is_none():
    assert (backend_of(True), backend_of(False), backend_of(TRACED)) == ("inductor", None, TRACED)
    with pytest.raises(TangleNASError, match=r"unknown backend of torch\.compile 'inducter'\. Did you mean 'inductor'"):
        searched("drnas", compile="inducter")
