"""Measuring a network: accuracy, loss, and the statistics of its batch norms."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tanglenas_engine.data import Samples, Stream, batches
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.devices import channels_last, to_device
from tanglenas_engine.training.losses import cross_entropy


class Measured(NamedTuple):
    """Accuracy in % and mean cross-entropy over all targets."""

    accuracy: float
    loss: float


@torch.no_grad()
def measure(network: nn.Module, samples: Samples, batch_size: int = 256, together: bool = False) -> Measured:
    """Return accuracy and loss of a network in eval mode over all targets, and restore the network's mode.

    Args:
        network: The network.
        samples: The samples.
        batch_size: The number of samples per batch.
        together: True shares the samples between the ranks, which must have equal networks. False measures on this rank
            alone.
    """
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    hits = torch.zeros((), dtype=torch.long, device=device)
    loss, count = torch.zeros((), device=device), 0
    part = torch.arange(distributed.rank(), len(samples), distributed.world_size()) if together else None
    for batch in batches(samples, batch_size, part):
        inputs, targets = to_device(batch, device)
        outputs = network(inputs)
        hits += (outputs.argmax(-1) == targets).sum()
        loss += cross_entropy(outputs, targets) * targets.numel()
        count += targets.numel()
    network.train(training)
    sums = [float(hits), float(loss), count]
    right, wrong, seen = distributed.sum_over_ranks(sums) if together else sums
    return Measured(100.0 * right / seen, wrong / seen)


def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of every batch norm in `network` to their average over `batches` of inputs.

    A sampled path has statistics that were gathered under other paths. Recalibration gives it statistics of its own.
    All other modules are in eval mode meanwhile, because dropout would distort the statistics.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta, training = [norm.momentum for norm in norms], network.training
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None
    with torch.no_grad():
        for inputs in batches:
            network(inputs)
    network.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def random_inputs(samples: Samples, batch_size: int, count: int, seed: int, device: torch.device) -> list[Tensor]:
    """Return the inputs of `count` random batches.

    They are random because the first batches of a sorted dataset would all be of one class.
    """
    stream = Stream(samples, min(batch_size, len(samples)), seed=seed)
    return [channels_last(inputs.to(device)) for inputs, _ in itertools.islice(stream.start(), count)]


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Return the running means and variances of all batch norms."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
