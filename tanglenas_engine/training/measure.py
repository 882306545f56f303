"""Measuring a network: accuracy, loss, and the statistics of its batch norms."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.data import IGNORED, Samples, Stream, batches
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.devices import channels_last, to_device
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace

STATISTICS_BATCH = 256
"""The number of samples in each batch that sets the statistics of batch norms, in every stage."""


class Measured(NamedTuple):
    """Accuracy in % and mean cross-entropy over all targets."""

    accuracy: float
    loss: float


@torch.no_grad()
def measure(network: nn.Module, samples: Samples, batch_size: int = 256, together: bool = False) -> Measured:
    """Return accuracy and loss of a network in eval mode over all targets but `IGNORED`, and restore its mode.

    Args:
        network: The network.
        samples: The samples.
        batch_size: The number of samples per batch.
        together: True shares the samples between the ranks, which must have equal networks. False measures on this rank
            alone.

    Raises:
        TangleNASError: All targets are `IGNORED`.
    """
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    hits, count = torch.zeros(2, dtype=torch.long, device=device)
    loss = torch.zeros((), device=device)
    part = torch.arange(distributed.rank(), len(samples), distributed.world_size()) if together else None
    for batch in batches(samples, batch_size, part):
        inputs, targets = to_device(batch, device)
        outputs = network(inputs)
        hits += (outputs.argmax(-1) == targets).sum()
        loss += F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten(), reduction="sum")
        count += (targets != IGNORED).sum()
    network.train(training)
    sums = [float(hits), float(loss), float(count)]
    right, wrong, seen = distributed.sum_over_ranks(sums) if together else sums
    if not seen:
        raise TangleNASError(
            f"none of the {len(samples)} samples to measure has a target: all are {IGNORED}, which counts for no loss. "
            "Give the dataset's splits samples with labels"
        )
    return Measured(100.0 * right / seen, wrong / seen)


@torch.no_grad()
def measure_inherited(
    space: SearchSpace,
    architecture: Architecture,
    samples: Samples,
    statistics: Sequence[Tensor],
    batch_size: int = 256,
    together: bool = False,
) -> Measured:
    """Return the accuracy and loss of an architecture with the supernet's weights.

    This is the one way in which search, discretize and evaluate judge inherited weights. The space keeps its mode and
    its buffers; afterwards its next forwards compute this architecture.

    Args:
        statistics: Batches of inputs that set the statistics of batch norms for this architecture. Those of the
            supernet are of other architectures. Without any, the supernet's are taken.
    """
    with inherited(space, architecture, statistics):
        return measure(space, samples, batch_size, together)


@contextmanager
def inherited(space: SearchSpace, architecture: Architecture, statistics: Sequence[Tensor]) -> Iterator[None]:
    """Compute an architecture with batch norms recalibrated in the block; then the space has its buffers again.

    It has the share of channels that the weights were trained with: the others are as they were initialised. And it has
    the precision of its weights, which a search may lower.
    """
    buffers = [(buffer, buffer.clone()) for buffer in space.buffers()]
    state = space.superposition
    divisor, state.channel_divisor = state.channel_divisor, state.trained_divisor
    execute, space.execute = space.execute, None
    space.select(architecture)
    try:
        if statistics:
            recalibrate(space, statistics)
        yield
    finally:
        state.channel_divisor, space.execute = divisor, execute
        for buffer, before in buffers:
            buffer.copy_(before)


class LossEstimate(NamedTuple):
    """Mean cross-entropy over all targets, its standard error, and the loss of guessing by frequencies.

    `IGNORED` targets are left out. The standard error is that of a ratio of two sums over samples: of losses and of
    numbers of targets. So it holds also where the targets of one sample are alike.
    """

    mean: float
    error: float
    guessing: float


@torch.no_grad()
def estimate_loss(network: nn.Module, samples: Samples, batch_size: int = 256) -> LossEstimate:
    """Return the loss of a network in eval mode over samples; its mode is restored."""
    device, training = next(network.parameters()).device, network.training
    network.eval()
    sums, numbers, counts = [], [], torch.zeros((), device=device)  # sums and numbers of targets: (B,) for each batch
    for batch in batches(samples, batch_size):
        inputs, targets = to_device(batch, device)
        outputs = network(inputs)
        counts = counts + torch.bincount(targets[targets >= 0], minlength=outputs.shape[-1])
        each = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
        sums.append(each.view(len(inputs), -1).sum(1).double())
        numbers.append((targets != IGNORED).view(len(inputs), -1).sum(1))
    network.train(training)
    lost, told = torch.cat(sums), torch.cat(numbers)
    mean = lost.sum() / told.sum()
    error = (lost - mean * told).square().sum().sqrt() / told.sum()
    guessing = torch.special.entr(counts / counts.sum()).sum()
    return LossEstimate(float(mean), float(error), float(guessing))


def statistics_inputs(
    network: nn.Module, samples: Samples, count: int, seed: int, device: torch.device
) -> list[Tensor]:
    """Return `count` random batches of inputs that recalibrate a network; none if it has no batch norms.

    Args:
        samples: Samples without augmentation (`DataView.plain`), as those that the network is measured on.
    """
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    return random_inputs(samples, STATISTICS_BATCH, count if norms else 0, seed, device)


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
