"""The retrain stage: it gives the architecture its final weights."""

from __future__ import annotations

import inspect
import math
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tanglenas_engine.data import DataView, Stream
from tanglenas_engine.derivation.jobs import Trained
from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.optimizers.optimizer import Batch
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.devices import to_device
from tanglenas_engine.runtime.files import HeldError
from tanglenas_engine.runtime.foreign import unusable
from tanglenas_engine.runtime.seeding import checked_seed, seeded
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.fit import check_fit
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.stages.pace import taken_back
from tanglenas_engine.training.channels_last import learns_with_channels_last
from tanglenas_engine.training.distillation import Distillation, check_teaching, hidden_pairs, recorded
from tanglenas_engine.training.loop import Summand, Training
from tanglenas_engine.training.losses import all_outputs, averages_targets, checked_loss, cross_entropy
from tanglenas_engine.training.measure import measure, recalibrate, running_statistics, statistics_inputs
from tanglenas_engine.training.optim import (
    OPTIMIZER,
    SCHEDULE,
    OptimizerFactory,
    SchedulerFactory,
    call_factory,
    cosine,
    make_scheduler,
    parameter_groups,
    stepping,
)
from tanglenas_engine.training.options import Computation, Session, flattened
from tanglenas_engine.training.pieces import PieceLoss, may_ignore
from tanglenas_engine.training.state import Stateful
from tanglenas_engine.training.stopwatch import Stopwatch
from tanglenas_engine.training.trial import try_steps

AVERAGE = "a moving average with update(network), such as timm.utils.ModelEmaV3, or torch's AveragedModel"
MODES = ("scratch", "inherit", "finetune")
Mode = Literal["scratch", "inherit", "finetune"]


class EMA(Protocol):
    """A moving average of a network's weights, such as timm's `ModelEmaV3`.

    `update` may be called `update_parameters`, as in torch's `AveragedModel`. If it has an argument `step`, it gets the
    number of steps that were taken, counted from 1 as in timm.
    """

    module: nn.Module

    @property
    def update(self) -> Callable[..., None]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


@dataclass(frozen=True)
class RetrainResult:
    """The standalone network with its final weights, its validation accuracy in %, and one record per epoch.

    Attributes:
        seconds: The processor seconds of the epochs of the history, in all processes that trained them.
        wall: Their seconds on the wall.
    """

    network: nn.Module
    validation_accuracy: float
    history: list[Record]
    seconds: float = 0.0
    wall: float = 0.0


@flattened
def retrain(
    space: SearchSpace,
    architecture: Architecture,
    data: DataView,
    *,
    mode: Mode = "scratch",
    epochs: int = 100,
    until: int | None = None,
    batch_size: int = 64,
    optimizer: OptimizerFactory = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
    scheduler: SchedulerFactory | None = cosine,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    ema: Callable[[nn.Module], EMA] | None = None,
    loss: Callable[[Any, Tensor], Tensor] = cross_entropy,
    teacher: Literal["largest"] | None = None,
    teacher_weight: float = 0.5,
    temperature: float = 1.0,
    teacher_hidden: float = 0.0,
    recalibration_batches: int = 8,
    seed: int = 0,
    computation: Computation = Computation(),
    session: Session = Session(),
) -> RetrainResult:
    """Train the network of an architecture on the whole training data (weights and architecture splits).

    Before each epoch, the method `set_progress(fraction)` of a module in the network is called with the finished share
    of the training, from 0 to 1. A scheduled drop path uses it.

    Args:
        space: The supernet. Its weights matter for "inherit" and "finetune".
        architecture: The architecture of the network.
        data: A view of `training` and `validation`.
        mode: "scratch" trains from a new initialisation. "finetune" trains from the supernet's weights. "inherit" takes
            the supernet's weights unchanged, and recalibrates the statistics of batch norms.
        epochs: The number of passes over the training data.
        until: The number of epochs after which the training pauses, in the middle of its schedule. Another call with
            the same checkpoints goes on. None trains to the end. If the checkpoint is beyond, the history and the
            accuracy are those of `until`, and the network is that of the checkpoint. 0 makes everything that the
            training needs, tries one loss, two steps with small random gradients and the state after them, and
            trains nothing: the accuracy is NaN.
        batch_size: The number of samples per batch, over all ranks.
        optimizer: A function from parameter groups to the optimizer.
        scheduler: A function from (optimizer, total steps) to the learning-rate schedule, which is stepped in every
            iteration. None keeps the rate constant.
        wrap: A function from the network to the module that is trained, which contains the network, such as one with an
            auxiliary head. The network itself is validated and returned.
        ema: A function from the network to a moving average of its weights. The average is then validated and returned.
            It is told the step if its `update` takes one.
        loss: A function of outputs and targets. The outputs are those of train mode: a tensor, or several with the
            logits first. A cross-entropy, and `auxiliary` of one, is a mean over all targets of a batch that are not
            -100, in however many pieces it is. Another loss is averaged over the pieces as it is (see
            `training.losses.averages_targets`).
        teacher: "largest" lets the network also learn from the logits of the space's largest network, with the
            supernet's weights. None leaves the teacher out.
        teacher_weight: The share of the teacher in the loss, from 0 to 1 (see `training.distillation`).
        temperature: The divisor of both networks' logits before they are compared.
        teacher_hidden: The weight of the teacher's hidden states, whose first channels the outputs of the network's
            layers approach. 0 leaves them out.
        recalibration_batches: The number of batches, without augmentation, that set the statistics of batch norms for
            "inherit" and for the teacher. 0 keeps the supernet's statistics.
        seed: The seed of all random numbers.
        computation: Precision, compilation, accumulation and clipping. Its fields are also options of their own.
        session: Device, workers, checkpoints, tracker and progress. Its fields are also options of their own.

    Raises:
        TangleNASError: An option is out of its range, or the architecture is of another space.
        DivergedError: The training diverged.
        Interrupted: The process was asked to stop, and the state is saved.
    """
    if mode not in MODES:
        raise TangleNASError(f"retrain.mode is {mode!r}, expected one of: {', '.join(MODES)}")
    if teacher not in (None, "largest"):
        raise TangleNASError(f"retrain.teacher is {teacher!r}, expected 'largest' or None")
    if teacher and mode == "inherit":
        raise TangleNASError("retrain.mode 'inherit' trains nothing that a teacher could teach: use 'finetune'")
    check_teaching(teacher_weight, temperature, teacher_hidden)  # also where no teacher is asked for yet
    if teacher_hidden and not teacher:
        raise TangleNASError(
            f"retrain.teacher_hidden is {teacher_hidden!r}, but retrain.teacher is None: set the teacher to 'largest', "
            "or teacher_hidden to 0"
        )
    at_least("retrain.epochs", epochs, 1)
    if until is not None:
        at_least("retrain.until", until, 0)
    at_least("retrain.recalibration_batches", recalibration_batches, 0)
    seed = checked_seed("retrain.seed", seed)
    check_fit(space, data.training, data.validation)
    space.assignment_of(architecture)  # an overridden `standalone` might accept an architecture of another space
    device = session.find_device()
    computation.check(device)
    computation.share("retrain", batch_size)
    if mode == "scratch" and space.scratch_warning:
        warnings.warn(space.scratch_warning, stacklevel=2)
    if space.untrained and (mode == "inherit" or teacher):
        given = "retrain.mode is 'inherit'" if mode == "inherit" else f"retrain.teacher is {teacher!r}"
        raise TangleNASError(
            f"{given}, but {space.untrained}: its outputs are chance. Use mode 'scratch' without a teacher, or search "
            "with search.path_epochs, which train all channels"
        )
    if space.untrained and mode == "finetune":
        warnings.warn(
            f"retrain.mode is 'finetune', but {space.untrained}, so that it starts from chance. search.path_epochs "
            "train all channels",
            stacklevel=2,
        )
    with seeded(seed):
        network = space.standalone(architecture) if mode == "scratch" else space.extract(architecture)
        network = network.to(device)
        distributed.synchronize([*network.parameters(), *network.buffers()])
        if mode == "inherit":
            if until == 0:
                return RetrainResult(network.eval(), math.nan, [])
            _recalibrate(network, data, recalibration_batches, seed)
            return RetrainResult(network.eval(), measure(network, data.validation, together=True).accuracy, [])
        distillation = None
        if teacher:
            largest = space.extract(space.largest()).to(device)
            distributed.synchronize([*largest.parameters(), *largest.buffers()])
            _recalibrate(largest, data, recalibration_batches, seed)
            pairs = hidden_pairs(space, architecture, network) if teacher_hidden else ()
            distillation = Distillation(largest, teacher_weight, temperature, teacher_hidden, pairs)
        return Retraining(
            network,
            data,
            distillation=distillation,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            scheduler=scheduler,
            wrap=wrap,
            ema=ema,
            loss=loss,
            seed=seed,
            computation=computation,
            session=session,
        ).result(until)


def _recalibrate(network: nn.Module, data: DataView, count: int, seed: int) -> None:
    """Set the statistics of batch norms on batches of the training data without augmentation; 0 batches keep them."""
    device = next(network.parameters()).device
    if inputs := statistics_inputs(network, data.plain("training"), count, seed, device):
        recalibrate(network, inputs)


def _update_of(average: EMA) -> Callable[[nn.Module, int], None]:
    """Return the function that updates a moving average by the network, given the number of steps.

    Raises:
        TangleNASError: The average has no such method.
    """
    update = getattr(average, "update", None) or getattr(average, "update_parameters", None)
    if update is None:
        raise unusable("retrain.ema", f"it makes a {type(average).__name__}, which has no update", AVERAGE)
    counts = "step" in inspect.signature(update).parameters
    return lambda network, step: update(network, **({"step": step} if counts else {}))


def _wrapped(network: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return the module around a network that is trained in its place.

    Raises:
        TangleNASError: It is no module, or not all of the network's parameters are in it.
    """
    trained: Any = wrap(network)
    # A wrapper may have a `parameters` of its own, which leaves out what is frozen.
    named = nn.Module.named_parameters(trained) if isinstance(trained, nn.Module) else ()
    inside = {id(parameter) for _, parameter in named}
    missing = [name for name, parameter in network.named_parameters() if id(parameter) not in inside]
    if not isinstance(trained, nn.Module) or missing:
        what = f" without the network's {missing[0]}" if isinstance(trained, nn.Module) else ""
        raise TangleNASError(
            f"retrain.wrap makes a {type(trained).__name__}{what}, expected a module that has the network itself, not "
            "a copy, among its modules and is trained with it"
        )
    return trained


class Retraining(Training):
    """A training of a standalone network. The arguments are those of `retrain`, with the teacher's as one."""

    def __init__(
        self,
        network: nn.Module,
        data: DataView,
        *,
        epochs: int,
        batch_size: int,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        wrap: Callable[[nn.Module], nn.Module] | None,
        ema: Callable[[nn.Module], EMA] | None,
        loss: Callable[[Any, Tensor], Tensor],
        distillation: Distillation | None,
        seed: int,
        computation: Computation,
        session: Session,
    ):
        self.network, self.computation = network, computation
        self.validation = data.validation
        self.device, self.loss = session.find_device(), checked_loss("retrain.loss", loss)
        self._piece_loss = partial(
            PieceLoss, self.loss, averages=averages_targets(loss), ignoring=may_ignore(data.training)
        )
        self._last = learns_with_channels_last(network)
        self.distillation = distillation
        self.precision = computation.precise(self.device)
        self.scaler = self.precision.scaler
        share = computation.share("retrain", batch_size)
        self.stream = Stream(data.training, batch_size, seed=seed, num_workers=session.num_workers, part=share)
        super().__init__("retrain", epochs, self.stream.batches_per_epoch, session)
        self.trained = _wrapped(network, wrap).to(self.device) if wrap else network
        self.optimizer = call_factory("retrain.optimizer", optimizer, parameter_groups(self.trained))
        self.scheduler = (
            make_scheduler("retrain.scheduler", scheduler, self.optimizer, self.steps) if scheduler else None
        )
        self.start(optimizer=self.optimizer)
        self.average = call_factory("retrain.ema", ema, network, needs=("module",), like=AVERAGE) if ema else None
        self._update_average = _update_of(self.average) if self.average else None
        self.parameters, self.statistics = list(self.trained.parameters()), running_statistics(self.trained)
        self._hooks = [h for m in self.trained.modules() if callable(h := getattr(m, "set_progress", None))]
        backend = computation.backend
        if backend is not None and distillation is not None and distillation.pairs:
            raise TangleNASError(
                "retrain.teacher_hidden reads the outputs of layers, which a compiled network does not show: set it to "
                "0, or leave out retrain.compile"
            )
        self._forward = self.trained if backend is None else torch.compile(self.trained, dynamic=False, backend=backend)
        self._iterator: Iterator[Batch] | None = None
        self.stopwatch = Stopwatch(epochs)
        self.trained.train()

    @property
    def final(self) -> nn.Module:
        """The network that is validated and returned: the moving average, if there is one."""
        return self.network if self.average is None else self.average.module

    def result(self, until: int | None = None) -> RetrainResult:
        """Run the training, to its end or until so many epochs are finished, and return its result."""
        if until == 0:
            self._try()
            return RetrainResult(self.final.eval(), math.nan, [])
        history = self.run(until)
        seconds, wall = self.stopwatch.ends[len(history) - 1].tolist()
        return RetrainResult(self.final.eval(), history[-1]["validation_accuracy"], history, seconds, wall)

    def _try(self) -> None:
        """Try the loss of the first batch, and the optimizer and the schedule, and leave the network as it is."""
        inputs, targets = (piece.chunk(self.computation.accumulate)[0] for piece in self.stream.batch(0))
        inputs, targets = to_device((inputs, targets), self.device, self._last)
        parts = [("retrain.optimizer", self.optimizer, OPTIMIZER), ("retrain.scheduler", self.scheduler, SCHEDULE)]
        with taken_back({"network": self.trained}):
            with torch.no_grad():
                self.loss(self.precision.forward(self.trained, inputs), targets)
            try_steps([part for part in parts if part[1] is not None], self.parameters, self.steps)

    def inputs(self, position: int) -> list[Tensor]:
        return [self.stream.batch(position)[0]]

    def stateful(self) -> Mapping[str, Stateful | None]:
        return {
            "network": self.trained,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.average,
            "scaler": self.scaler if self.scaler.is_enabled() else None,
            "stopwatch": self.stopwatch,
        }

    def step(self, position: int) -> dict[str, Summand]:
        if self._iterator is None or position % self.steps_per_epoch == 0:
            for hook in self._hooks:
                hook(position // self.steps_per_epoch / self.epochs)
        if self._iterator is None:  # a resumed training starts its stream where it left off
            self._iterator = self.stream.start(position)
        count = self.computation.accumulate
        batch = to_device(next(self._iterator), self.device, self._last)
        pieces = [tensor.chunk(count) for tensor in batch]
        loss = self._piece_loss([pieces[1]])
        losses, accuracies = [], []
        self.optimizer.zero_grad()
        for inputs, targets in zip(*pieces, strict=True):
            watched = [] if self.distillation is None else self.distillation.watched
            with recorded(self.network, watched) as states:
                outputs = self.precision.forward(self._forward, inputs)
            value, logits = loss(outputs, targets), all_outputs(outputs)[0]
            if self.distillation is not None:
                autocast = self.precision.autocast
                value = self.distillation(value, logits, inputs, targets, states, autocast, loss.mean)
            torch.autograd.backward(self.scaler.scale(value / count))
            losses.append(value.detach())
            accuracies.append(loss.accuracy(logits, targets))
        distributed.average([*(parameter.grad for parameter in self.parameters), *self.statistics])
        self.scaler.unscale_(self.optimizer)
        if self.computation.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.computation.clip)
        with stepping("retrain.optimizer"):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None:
            with stepping("retrain.scheduler", SCHEDULE):
                self.scheduler.step()
        if self._update_average is not None:
            self._update_average(self.network, position + 1)
        return loss.weigh({"loss": torch.stack(losses).mean(), "accuracy": torch.stack(accuracies).mean()})

    def end_epoch(self, epoch: int, means: Record) -> Record:
        found = measure(self.final, self.validation, together=True)
        self.stopwatch.end_epoch(epoch)
        return {**means, "validation_accuracy": found.accuracy, "validation_loss": found.loss}

    def record_like(self) -> Record:
        return {"loss": 0.0, "accuracy": 0.0, "validation_accuracy": 0.0, "validation_loss": math.nan}

    def describe(self, record: Record) -> str:
        accuracy, validation = record["accuracy"], record["validation_accuracy"]
        return f"loss {record['loss']:.3f}  train {accuracy:.1f} %  valid {validation:.1f} %"


@dataclass(frozen=True)
class Recipe:
    """The options of `retrain`, for any architecture of a space: a function that a race trains by.

    A training that was called for fewer epochs before goes on from its checkpoint.

    Args:
        space: The space.
        data: A view of `training` and `validation`.
        epochs: The number of epochs of a complete training.
        options: The other options of `retrain`. The mode is "scratch".
        identity: A digest of all this, if results are kept in a folder that other recipes use too.
        folder: A folder for the checkpoints of trainings, for workers on several machines one that all of them see.
            None takes a folder of this object's own, which is deleted with it.
    """

    space: SearchSpace
    data: DataView
    epochs: int = 100
    options: Mapping[str, Any] = field(default_factory=dict)
    identity: str = ""
    folder: Path | None = None
    _own: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.folder is None:  # the copies of workers share the folder, and leave it to this object
            own = tempfile.mkdtemp(prefix="tanglenas-trainings-")
            weakref.finalize(self, shutil.rmtree, own, ignore_errors=True)
            object.__setattr__(self, "_own", own)

    def __call__(self, architecture: Architecture, epochs: int) -> Trained:
        """Train the network until so many epochs of its training are finished.

        Raises:
            DivergedError: The training diverged.
            TangleNASError: An option is out of its range, or a file cannot be written.
        """
        given = {**self.options, "mode": "scratch", "epochs": self.epochs, "until": epochs}
        kept = Kept(self.folder or Path(self._own), self.identity)
        return trained(lambda **more: retrain(self.space, architecture, self.data, **given, **more), architecture, kept)


class Kept(NamedTuple):
    """A folder with the checkpoints of trainings, and a digest of what they depend on beside the architecture."""

    folder: Path
    identity: str

    def open(self, architecture: Architecture, stack: ExitStack) -> CheckpointFolder | None:
        """Hold the folder of a network's training. Damaged checkpoints are deleted, so that it begins anew.

        It is None if another process holds the folder: a worker that counts as lost may still train there.

        Raises:
            TangleNASError: The folder cannot be created or written.
        """
        name = architecture.digest
        folder = CheckpointFolder(self.folder / name, f"{self.identity}/{name}")
        try:
            stack.enter_context(folder)
        except HeldError:
            return None
        try:
            folder.load()
        except TangleNASError:
            folder.discard()
        return folder


def trained(training: Callable[..., RetrainResult], architecture: Architecture, kept: Kept) -> Trained:
    """Train, and return what a race keeps of the training.

    Args:
        training: A function that trains. It gets the option `checkpoints` if checkpoints are kept.
        architecture: The architecture of the network.
        kept: The place of checkpoints, from which a training that was paused goes on.

    Raises:
        DivergedError: The training diverged.
        TangleNASError: The folder cannot be written, or the training raised the error.
    """
    with ExitStack() as stack:
        checkpoints = kept.open(architecture, stack)
        found = training(checkpoints=checkpoints) if checkpoints else training()
    return Trained(found.history[-1]["validation_loss"], found.validation_accuracy, found.seconds, wall=found.wall)
