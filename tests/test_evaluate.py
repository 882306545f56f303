"""Evaluation: a plain loop's accuracy, and exact costs."""

import pytest
import torch
from spaces import SPACES, vit

from tanglenas_engine.data import DataView, TensorSamples
from tanglenas_engine.errors import OutOfReachError, TangleNASError
from tanglenas_engine.evaluate import evaluate
from tanglenas_engine.testing import random_data


@pytest.mark.parametrize("name", SPACES)
def test_accuracy_and_costs_are_those_of_the_network(name):
    space = SPACES[name]()
    architecture = space.sample()
    network = space.extract(architecture).train()
    data = random_data(space, ("test",), samples=50)
    result = evaluate(space, architecture, network, data, batch_size=7)
    assert network.training and result.samples == 50

    inputs, targets = data.test.batch(torch.arange(50))
    with torch.no_grad():
        right = network.eval()(inputs).argmax(-1) == targets
    assert result.test_accuracy == pytest.approx(100 * right.double().mean().item())
    assert 0 < result.test_accuracy < 100
    assert result.cost.params == sum(parameter.numel() for parameter in network.parameters())
    assert isinstance(result.cost.flops, int) and result.cost == space.cost(architecture)


def test_the_accuracy_of_a_network_that_knows_the_answers():
    space = vit(num_classes=3)
    network = space.extract(space.smallest()).eval()
    inputs = space.example_input(20)
    with torch.no_grad():
        answers = network(inputs).argmax(-1)
    data = DataView({"test": TensorSamples(inputs, answers)})
    assert evaluate(space, space.smallest(), network, data).test_accuracy == 100
    data = DataView({"test": TensorSamples(inputs, (answers + 1) % 3)})
    assert evaluate(space, space.smallest(), network, data).test_accuracy == 0


def test_data_that_do_not_fit_or_are_out_of_reach():
    space = vit()
    architecture, network = space.smallest(), space.extract(space.smallest())
    with pytest.raises(TangleNASError, match="the data are of shape 1 x 6 x 6"):
        wrong = DataView({"test": TensorSamples(torch.randn(4, 1, 6, 6), torch.zeros(4).long())})
        evaluate(space, architecture, network, wrong)
    with pytest.raises(OutOfReachError, match="the test split is out of reach"):
        evaluate(space, architecture, network, random_data(space, ("validation",)))
    with pytest.raises(TangleNASError, match="device 'tpu' cannot be used"):
        evaluate(space, architecture, network, random_data(space, ("test",)), device="tpu")
    with pytest.raises(TangleNASError, match="batch size 0: give at least 1"):
        evaluate(space, architecture, network, random_data(space, ("test",)), batch_size=0)
