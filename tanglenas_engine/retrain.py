"""The retrain stage: give the architecture found its final weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tanglenas_engine.architecture import Architecture
from tanglenas_engine.checkpoint import CheckpointFolder
from tanglenas_engine.data import DataView, Stream
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.optimizer import Batch, Loss
from tanglenas_engine.progress import Progress
from tanglenas_engine.search import check_fit
from tanglenas_engine.seeding import seeded
from tanglenas_engine.space import SearchSpace
from tanglenas_engine.tracking import Tracker
from tanglenas_engine.training import (
    OptimizerFactory,
    Row,
    SchedulerFactory,
    at_least,
    correct,
    cosine,
    cross_entropy,
    device_of,
    measure,
    parameter_groups,
    random_inputs,
    recalibrate,
    run,
    to,
)

MODES = ("scratch", "inherit", "finetune")
Mode = Literal["scratch", "inherit", "finetune"]


class EMA(Protocol):
    """A moving average of a network's weights, such as timm's `ModelEmaV3`."""

    module: nn.Module

    def update(self, model: nn.Module) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


@dataclass(frozen=True)
class RetrainResult:
    """The standalone network with its final weights, its validation accuracy in %, one history row per epoch."""

    network: nn.Module
    validation_accuracy: float
    history: list[Row]


def retrain(
    space: SearchSpace,
    architecture: Architecture,
    data: DataView,
    *,
    mode: Mode = "scratch",
    epochs: int = 100,
    batch_size: int = 64,
    optimizer: OptimizerFactory = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
    scheduler: SchedulerFactory | None = cosine,
    ema: Callable[[nn.Module], EMA] | None = None,
    clip: float | None = 5.0,
    loss: Loss = cross_entropy,
    recalibration_batches: int = 8,
    seed: int = 0,
    num_workers: int = 0,
    device: str | None = None,
    checkpoints: CheckpointFolder | None = None,
    checkpoint_every: int | None = None,
    tracker: Tracker | None = None,
    progress: Progress | None = None,
) -> RetrainResult:
    """Train the network of an architecture on the whole training data (weights and architecture splits).

    Args:
        space: The supernet; its weights matter for "inherit" and "finetune".
        data: A view that reaches `training` and `validation`.
        mode: "scratch" trains from a new initialisation, "finetune" from the supernet's weights, "inherit" takes
            the supernet's weights as they are (statistics of batch norms are set anew).
        optimizer: Makes the optimizer from parameter groups.
        scheduler: Makes the learning-rate schedule from (optimizer, total steps), stepped every iteration.
        ema: Makes a moving average of the weights, which then is what is validated and returned.
        recalibration_batches: Batches that set the statistics of batch norms for "inherit"; 0 keeps the supernet's.
        checkpoints, checkpoint_every, device, num_workers: As in `search`.

    Raises:
        TangleNASError: An option cannot be, the architecture is not of this space, or training diverged.
        Interrupted: The process was asked to stop, and the state is saved.
    """
    if mode not in MODES:
        raise TangleNASError(f"retrain.mode is {mode!r}, expected one of: {', '.join(MODES)}")
    at_least("retrain.epochs", epochs, 1)
    at_least("retrain.recalibration_batches", recalibration_batches, 0)
    check_fit(space, data.training)
    space.assignment_of(architecture)  # whether it has one: a space may override what makes the network
    target = device_of(device)
    with seeded(seed):
        network = space.standalone(architecture) if mode == "scratch" else space.extract(architecture)
        network = network.to(target)
        if mode == "inherit":
            if recalibration_batches:
                recalibrate(network, random_inputs(data.training, batch_size, recalibration_batches, seed, target))
            return RetrainResult(network.eval(), measure(network, data.validation).accuracy, [])
        stream = Stream(data.training, batch_size, seed=seed, num_workers=num_workers)
        optimize = optimizer(parameter_groups(network))
        schedule = scheduler(optimize, epochs * stream.batches_per_epoch) if scheduler else None
        average = ema(network) if ema else None
        iterators: list[Iterator[Batch]] = []
        network.train()

        def step(position: int) -> dict[str, Tensor]:
            if not iterators:
                iterators.append(stream.start(position))
            inputs, targets = to(next(iterators[0]), target)
            outputs = network(inputs)
            value = loss(outputs, targets)
            optimize.zero_grad()
            torch.autograd.backward(value)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimize.step()
            if schedule is not None:
                schedule.step()
            if average is not None:
                average.update(network)
            return {"loss": value.detach(), "accuracy": correct(outputs, targets)}

        def end_epoch(epoch: int, means: Row) -> Row:
            judged = network if average is None else average.module
            found = measure(judged, data.validation)
            return {**means, "validation_accuracy": found.accuracy, "validation_loss": found.loss}

        history = run(
            name="retrain",
            epochs=epochs,
            steps_per_epoch=stream.batches_per_epoch,
            step=step,
            end_epoch=end_epoch,
            describe=lambda row: (
                f"loss {row['loss']:.3f}  train {row['accuracy']:.1f} %  valid {row['validation_accuracy']:.1f} %"
            ),
            stateful={
                "network": network,
                "optimizer": optimize,
                **({"scheduler": schedule} if schedule is not None else {}),
                **({"ema": average} if average is not None else {}),
            },
            parameters=list(network.parameters()),
            checkpoints=checkpoints,
            checkpoint_every=checkpoint_every,
            tracker=tracker,
            progress=progress,
        )
    final = network if average is None else average.module
    return RetrainResult(final.eval(), history[-1]["validation_accuracy"], history)
