"""Images whose channels are last in memory, and the networks that do not learn from them."""

import sys
from functools import partial

import pytest
import torch
from tiny import tiny
from torch import nn

from tanglenas_engine import create_optimizer, create_space, retrain, search
from tanglenas_engine.runtime.devices import to_device
from tanglenas_engine.testing import random_data
from tanglenas_engine.training.channels_last import learns_with_channels_last


@pytest.mark.parametrize(
    ("layer", "learns"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), False),
        (nn.Conv2d(15, 8, 1, stride=(1, 2)), False),
        (nn.Conv2d(16, 8, 1, stride=2), True),
        (nn.Conv2d(4, 8, 1), True),
        (nn.Conv2d(4, 8, 3, stride=2), True),
        (nn.Conv2d(8, 8, 1, stride=2, groups=8), True),
    ],
)
def test_a_pointwise_convolution_with_a_stride_over_few_channels_does_not_learn_so(layer, learns):
    assert learns_with_channels_last(nn.Sequential(nn.ReLU(), layer)) == learns


@pytest.mark.parametrize(
    ("space", "learns"),
    [("resnet_nano", False), ("resnet18", True), ("mobilenetv3_nano", True), ("autoformer_nano", True)],
)
def test_a_supernet_counts_with_its_smallest_options(space, learns):
    assert learns_with_channels_last(create_space(space)) == learns


@pytest.mark.parametrize("name", ["resnet_nano", "mobilenetv3_nano"])
def test_stages_lay_out_images_as_the_network_needs(name, monkeypatch):
    space, seen = tiny(name), []
    data = random_data(space, ("training", "validation", "weights", "architecture"))

    def watched(batch, device, last=True):
        seen.append(last)
        return to_device(batch, device, last)

    for stage in ("search", "retrain"):
        monkeypatch.setattr(sys.modules[f"tanglenas_engine.stages.{stage}"], "to_device", watched)
    sgd = partial(torch.optim.SGD, lr=0.01)
    search(space, create_optimizer("spos"), data, epochs=1, batch_size=4, weight_optimizer=sgd, device="cpu")
    retrain(space, space.smallest(), data, epochs=1, batch_size=4, optimizer=sgd, device="cpu")
    assert set(seen) == {name == "mobilenetv3_nano"}
    images = torch.randn(2, 3, 4, 4)
    (kept, _), (laid, _) = (to_device((images, images), torch.device("cpu"), last) for last in (False, True))
    assert kept is images and laid.stride(1) == 1
