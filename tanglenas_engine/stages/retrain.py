"""The retrain stage: give the architecture found its final weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tanglenas_engine.data import DataView, Stream
from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.optimizers.optimizer import Batch
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.devices import device_of, to
from tanglenas_engine.runtime.distributed import parts_of
from tanglenas_engine.runtime.progress import Progress
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.runtime.tracking import Tracker
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.fit import check_fit
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.training.execution import Precision, backend_of
from tanglenas_engine.training.loop import Row, run
from tanglenas_engine.training.losses import _all, correct, cross_entropy, scalar
from tanglenas_engine.training.measure import measure, random_inputs, recalibrate, running_statistics
from tanglenas_engine.training.optim import OptimizerFactory, SchedulerFactory, cosine, made, parameter_groups

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
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    ema: Callable[[nn.Module], EMA] | None = None,
    clip: float | None = 5.0,
    loss: Callable[[Any, Tensor], Tensor] = cross_entropy,
    recalibration_batches: int = 8,
    precision: str = "float32",
    compile: bool | str = False,
    accumulate: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    device: str | None = None,
    checkpoints: CheckpointFolder | None = None,
    checkpoint_every: int | None = None,
    tracker: Tracker | None = None,
    progress: Progress | None = None,
) -> RetrainResult:
    """Train the network of an architecture on the whole training data (weights and architecture splits).

    Modules of the network that have a method `progress(fraction)`, such as a scheduled drop path, are told before each
    epoch how much of the training is done, from 0 to 1.

    Args:
        space: The supernet; its weights matter for "inherit" and "finetune".
        data: A view that reaches `training` and `validation`.
        mode: "scratch" trains from a new initialisation, "finetune" from the supernet's weights, "inherit" takes
            the supernet's weights as they are (statistics of batch norms are set anew).
        optimizer: Makes the optimizer from parameter groups.
        scheduler: Makes the learning-rate schedule from (optimizer, total steps), stepped every iteration.
        wrap: Makes what is trained in place of the network: a module with the network in it, such as one with an
            auxiliary head. The network itself is validated and returned.
        ema: Makes a moving average of the network's weights, which then is what is validated and returned.
        loss: Of what the network gives in train mode, a tensor or several with the logits first, and targets.
        recalibration_batches: Batches that set the statistics of batch norms for "inherit"; 0 keeps the supernet's.
        compile: Whether `torch.compile` takes the network's forward, or with which of its backends. A drop path that
            a schedule changes is compiled anew each time.
        precision, accumulate, checkpoints, checkpoint_every, device, num_workers: As in `search`.

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
    target, loss = device_of(device), scalar(loss)
    precise, backend = Precision(precision, target), backend_of(compile)
    part = parts_of("retrain", batch_size, accumulate)
    with seeded(seed):
        network = space.standalone(architecture) if mode == "scratch" else space.extract(architecture)
        network = network.to(target)
        distributed.synchronize([*network.parameters(), *network.buffers()])
        if mode == "inherit":
            if recalibration_batches:
                recalibrate(network, random_inputs(data.training, batch_size, recalibration_batches, seed, target))
            return RetrainResult(network.eval(), measure(network, data.validation, together=True).accuracy, [])
        stream = Stream(data.training, batch_size, seed=seed, num_workers=num_workers, part=part)
        trained = wrap(network).to(target) if wrap else network
        optimize = made("retrain.optimizer", optimizer, parameter_groups(trained))
        steps = epochs * stream.batches_per_epoch
        schedule = made("retrain.scheduler", scheduler, optimize, steps) if scheduler else None
        average = made("retrain.ema", ema, network) if ema else None
        iterators: list[Iterator[Batch]] = []
        parameters, statistics, scaler = list(trained.parameters()), running_statistics(trained), precise.scaler
        scheduled = [hook for module in trained.modules() if callable(hook := getattr(module, "progress", None))]
        forward = trained if backend is None else torch.compile(trained, dynamic=False, backend=backend)
        trained.train()

        def step(position: int) -> dict[str, Tensor]:
            if not iterators or position % stream.batches_per_epoch == 0:
                for hook in scheduled:
                    hook(position // stream.batches_per_epoch / epochs)
            if not iterators:
                iterators.append(stream.start(position))
            batch = (tensor.chunk(accumulate) for tensor in to(next(iterators[0]), target))
            losses, accuracies = [], []
            optimize.zero_grad()
            for inputs, targets in zip(*batch, strict=True):
                with precise.autocast:
                    outputs = forward(inputs)
                    value = loss(outputs, targets)
                torch.autograd.backward(scaler.scale(value / accumulate))
                losses.append(value.detach())
                accuracies.append(correct(_all(outputs)[0], targets))
            distributed.average([*(parameter.grad for parameter in parameters), *statistics])
            scaler.unscale_(optimize)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            scaler.step(optimize)
            scaler.update()
            if schedule is not None:
                schedule.step()
            if average is not None:
                average.update(network)
            return {"loss": torch.stack(losses).mean(), "accuracy": torch.stack(accuracies).mean()}

        def end_epoch(epoch: int, means: Row) -> Row:
            judged = network if average is None else average.module
            found = measure(judged, data.validation, together=True)
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
                "network": trained,
                "optimizer": optimize,
                **({"scheduler": schedule} if schedule is not None else {}),
                **({"ema": average} if average is not None else {}),
                **({"scaler": scaler} if scaler.is_enabled() else {}),
            },
            parameters=parameters,
            checkpoints=checkpoints,
            checkpoint_every=checkpoint_every,
            tracker=tracker,
            progress=progress,
        )
    final = network if average is None else average.module
    return RetrainResult(final.eval(), history[-1]["validation_accuracy"], history)
