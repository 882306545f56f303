"""The evaluate stage: what the final network is worth, on data that had no part in making it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tanglenas_engine.architecture import Architecture
from tanglenas_engine.cost import Cost
from tanglenas_engine.data import DataView
from tanglenas_engine.search import check_fit
from tanglenas_engine.space import SearchSpace
from tanglenas_engine.training import device_of, measure


@dataclass(frozen=True)
class EvaluateResult:
    """Test accuracy in % and mean cross-entropy, number of test samples, and the network's cost.

    The cost is in parameters and in multiply-accumulates for one input.
    """

    test_accuracy: float
    test_loss: float
    samples: int
    cost: Cost


def evaluate(
    space: SearchSpace,
    architecture: Architecture,
    network: nn.Module,
    data: DataView,
    *,
    batch_size: int = 256,
    device: str | None = None,
) -> EvaluateResult:
    """Judge a standalone network of `architecture` on the `test` split of `data`.

    Raises:
        TangleNASError: The data do not fit the space, or the architecture is of another one.
    """
    check_fit(space, data.test)
    network = network.to(device_of(device))
    found = measure(network, data.test, batch_size)
    return EvaluateResult(found.accuracy, found.loss, len(data.test), space.cost(architecture))
