"""Low precision: what is computed in it and what stays float32, and what cannot be."""

import pytest
import torch
from ranked import searched
from spaces import vit

from tanglenas_engine import create_optimizer
from tanglenas_engine.data import SPLITS
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.optimizers.optimizer import Step
from tanglenas_engine.stages.retrain import retrain
from tanglenas_engine.stages.search import search
from tanglenas_engine.testing import random_data
from tanglenas_engine.training.execution import Precision
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.measure import measure
from tanglenas_engine.training.optim import parameter_groups

CPU = torch.device("cpu")


def watched(space):
    """The space, and a record of the types that its layers compute in and its masks have, as they come."""
    seen = {"outputs": set(), "masks": set()}

    def look(module, inputs, output):
        if not module.training:  # a look at whether the data fit
            return
        seen["outputs"].add(output.dtype)
        if module.axes and space.superposition.mixture is not None:
            seen["masks"].update(factor.whole().dtype for factor in module.factors("weight"))

    space.blocks[0].mlp.fc1.register_forward_hook(look)
    return space, seen


@pytest.mark.parametrize("optimizer", ["drnas", "darts2", "gdas", "spos"])
def test_a_search_in_bfloat16_keeps_everything_but_matrix_products_in_float32(optimizer):
    space, seen = watched(vit())
    losses = []

    def loss(outputs, targets):
        losses.append(cross_entropy(outputs, targets))
        assert outputs.dtype == losses[-1].dtype == torch.float32
        return losses[-1]

    method = create_optimizer(optimizer)
    data = random_data(space, ("weights", "architecture", "validation"))
    result = search(space, method, data, epochs=2, batch_size=4, precision="bfloat16", loss=loss)
    assert seen["outputs"] == {torch.bfloat16}
    assert seen["masks"] <= {torch.float32}
    assert bool(seen["masks"]) == (optimizer != "spos")
    assert {tensor.dtype for tensor in [*space.parameters(), *method.alphas.values()]} == {torch.float32}
    assert losses and len(result.history) == 2


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_in_bfloat16_is_near_one_in_float32_and_not_the_same():
    full, low = searched("drnas"), searched("drnas", precision="bfloat16")
    rows = zip(full["history"], low["history"], strict=True)
    assert 0 < max(abs(one["weight_loss"] - other["weight_loss"]) for one, other in rows) < 0.02


@pytest.mark.slow
def test_the_space_is_as_before_a_search_in_low_precision():
    space = vit()
    data = random_data(space, ("weights", "architecture", "validation"))
    search(space, create_optimizer("drnas"), data, epochs=2, batch_size=4, precision="bfloat16")
    assert space.execute is None
    assert space.eval()(space.example_input(2)).dtype == torch.float32
    with pytest.raises(TangleNASError, match="not finite"):
        search(
            space, create_optimizer("drnas"), data, epochs=2, batch_size=4, precision="bfloat16",
            loss=lambda outputs, targets: cross_entropy(outputs, targets) * float("nan"),
        )  # fmt: skip
    assert space.execute is None


@pytest.mark.slow
def test_retraining_in_bfloat16():
    space = vit()
    data = random_data(space, SPLITS, samples=24)
    architecture = space.sample(torch.Generator().manual_seed(1))
    options = dict(epochs=3, batch_size=8, seed=3)
    full = retrain(space, architecture, data, **options)
    low = retrain(space, architecture, data, **options, precision="bfloat16")
    assert all(parameter.dtype == torch.float32 for parameter in low.network.parameters())
    assert 0 < abs(full.history[-1]["loss"] - low.history[-1]["loss"]) < 0.02
    # What is reported is what the network is worth in full precision.
    assert low.validation_accuracy == measure(low.network, data.validation).accuracy


@pytest.mark.slow
def test_accumulated_batches_retrain_as_one_batch():
    space = vit()
    data = random_data(space, SPLITS, samples=24)
    architecture = space.sample(torch.Generator().manual_seed(1))
    sgd = dict(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9), scheduler=None)
    whole, parts = (
        retrain(space, architecture, data, epochs=3, batch_size=12, seed=3, accumulate=n, **sgd) for n in (1, 3)
    )
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert whole.history[-1]["accuracy"] == pytest.approx(parts.history[-1]["accuracy"])


@pytest.mark.slow
def test_scaled_losses_give_scaled_gradients_of_alpha():
    """Half precision on a GPU scales losses: what an optimizer leaves in alpha has to be scaled as well."""
    for name in ("darts", "darts2", "drnas", "gdas"):
        gradients = []
        for scale in (1.0, 1024.0):
            torch.manual_seed(0)
            space, optimizer = vit().train(), create_optimizer(name)
            optimizer.bind(space, 0)
            data = random_data(space, ("weights", "architecture"))
            batches = [samples.batch(torch.arange(8)) for samples in (data.weights, data.architecture)]
            sgd = torch.optim.SGD(parameter_groups(space), lr=0.05)
            loss = optimizer.architecture_backward(Step(0, space, cross_entropy, *batches, sgd, scale=scale))
            gradients.append([loss, *(alpha.grad / scale for alpha in optimizer.alphas.values())])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_a_precision_that_cannot_be():
    with pytest.raises(TangleNASError, match=r"unknown precision 'bfloat'\. Did you mean 'bfloat16'"):
        Precision("bfloat", CPU)
    with pytest.raises(TangleNASError, match=r"'float16' needs a GPU, and the device is 'cpu': use 'bfloat16'"):
        searched("drnas", precision="float16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 needs a GPU")
@pytest.mark.parametrize("optimizer", ["drnas", "darts2", "gdas", "spos"])
def test_a_search_in_float16(optimizer):
    full = searched(optimizer, device="cuda")
    low = searched(optimizer, device="cuda", precision="float16")
    assert low["history"][-1]["weight_loss"] == pytest.approx(full["history"][-1]["weight_loss"], abs=0.05)
