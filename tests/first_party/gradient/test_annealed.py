"""The temperature at which the gradient optimizers read alpha."""

import pytest
import torch
from tiny import tiny

from tanglenas_engine import create_optimizer
from tanglenas_engine.data import SPLITS
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import manager
from tanglenas_engine.stages.search import search
from tanglenas_engine.testing.optimizers import check_resume, random_data
from tanglenas_gradient.annealed import Annealed

OPTIMIZERS = [name for name in manager().names("optimizer") if create_optimizer(name).learns_architecture]
ANNEALED = [name for name in OPTIMIZERS if isinstance(create_optimizer(name), Annealed)]
# Samples of these have a temperature, what alpha stands for has none.
MIXED = [name for name in ANNEALED if name not in ("gdas", "hard_concrete")]
LOGITS = [2.0, 0.5, -1.0]


def at(name, fraction, **options):
    """An optimizer whose rows of three options have the logits above, so far into a search."""
    optimizer = create_optimizer(name, **options)
    optimizer.bind(tiny("vit", num_heads=(1, 2, 3)), 0)
    optimizer.alphas[3].data.copy_(torch.tensor(LOGITS).expand_as(optimizer.alphas[3]))
    optimizer.set_progress(fraction)
    return optimizer


def test_every_optimizer_of_ours_that_learns_can_be_annealed():
    # A policy of tunas is not a mixture: its samples are drawn in proportion to its probabilities.
    assert {"darts", "drnas", "gdas"} <= set(ANNEALED) == set(OPTIMIZERS) - {"tunas"}


@pytest.mark.parametrize("name", MIXED)
def test_alpha_is_read_at_the_temperature(name):
    optimizer = at(name, 0.5, final_temperature=0.5)
    assert optimizer.temperature == 0.75
    logits = torch.tensor(LOGITS) / 0.75
    wanted = torch.nn.functional.elu(logits) + 1 if "drnas" in name else logits.exp()
    kept = torch.ones(3) if name != "pc_drnas" else torch.tensor([1.0, 1.0, 0.0])  # its second stage keeps half
    wanted = wanted * kept / (wanted * kept).sum()
    torch.testing.assert_close(optimizer.expected().stacks[3][0], wanted)


@pytest.mark.parametrize("name", MIXED)
def test_the_colder_the_sharper(name):
    def sharpness(fraction, **options):
        return float(at(name, fraction, **options).expected().detach().stacks[3].max())

    assert sharpness(0.99, final_temperature=0.05) > sharpness(0.0, final_temperature=0.05) + 0.1
    assert sharpness(0.4) == sharpness(0.0)


@pytest.mark.parametrize("name", ANNEALED)
def test_the_history_says_the_temperature(name):
    options = {"temperature": 1.0, "final_temperature": 0.25}
    space = tiny("vit")
    history = search(
        space, create_optimizer(name, **options), random_data(space, SPLITS), epochs=3, batch_size=4
    ).history
    assert [row["temperature"] for row in history] == pytest.approx([1.0, 0.625, 0.25])


@pytest.mark.parametrize("name", ANNEALED)
@pytest.mark.part(3)
@pytest.mark.exhaustive
def test_a_search_that_cools_resumes_exactly(name):
    check_resume(lambda: create_optimizer(name, temperature=1.0, final_temperature=0.2), lambda: tiny("vit"))


@pytest.mark.parametrize("name", ANNEALED)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": float("inf")}, "temperature is inf, expected a finite number"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
        ({"final_temperature": float("nan")}, "final_temperature is nan, expected a positive number"),
        ({"temperature": 0.1, "final_temperature": 2.0}, "would rise from 0.1 to 2.0: it has to fall"),
    ],
)
def test_temperatures_that_cannot_be(name, options, message):
    with pytest.raises(TangleNASError, match=message):
        create_optimizer(name, **options)
