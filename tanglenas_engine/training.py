"""What search and retrain share: a loop over epochs that reports, checkpoints and resumes exactly."""

from __future__ import annotations

import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine import distributed
from tanglenas_engine.checkpoint import CheckpointFolder
from tanglenas_engine.data import Samples, Stream, batches
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.progress import Progress, SilentProgress
from tanglenas_engine.seeding import restore_rng_state, rng_state
from tanglenas_engine.tracking import NullTracker, Tracker

T = TypeVar("T")
Row = dict[str, Any]
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]

FUSED = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers with a fused step: on a CPU it takes a quarter of the time of one operation after another.

That of SGD fails where a parameter gets its first gradient after others, as on a path that is sampled.
"""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Interrupted(KeyboardInterrupt):
    """A stage was asked to stop and has saved its state."""


def cosine(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup: float = 0.05, final: float = 0.01
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over a share of the steps, then a cosine down to a share `final` of the learning rate."""
    rising = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, total_steps - rising))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Parameters for an optimizer: biases, norms and tokens apart, without weight decay."""
    decayed = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed]},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def run(
    *,
    name: str,
    epochs: int,
    steps_per_epoch: int,
    step: Callable[[int], Mapping[str, Tensor]],
    end_epoch: Callable[[int, Row], Row],
    describe: Callable[[Row], str],
    stateful: Mapping[str, Stateful],
    parameters: Sequence[Tensor],
    checkpoints: CheckpointFolder | None = None,
    checkpoint_every: int | None = None,
    tracker: Tracker | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Run `step` for all steps of all epochs and return one history row per epoch.

    Several ranks run it side by side. What is decided (rows, a reason to stop, a request to) holds on all of them.

    Args:
        step: Takes the number of the step, counted over all epochs, and returns scalar tensors; they stay on
            their device until the epoch ends, where their means go to `end_epoch`. It leaves equal state on all ranks.
        end_epoch: Takes the epoch, counted from 1, and the means, and returns the history row, that of rank 0 on all
            ranks. A reason under "stopped" makes it the last one.
        describe: The row as a person reads it in the progress line.
        stateful: What a checkpoint holds beside the position, the history and the random generators.
        parameters: What is trained. It must be finite, as the means must, or nothing is saved.
        checkpoints: Where rank 0 saves; None on the others.
        checkpoint_every: Steps between checkpoints within an epoch; there is one after every epoch anyway.

    Raises:
        TangleNASError: Training diverged; the first step in which a mean was not finite is named, and the checkpoint
            from before it stays.
        Interrupted: On SIGINT or SIGTERM, after the current step was finished and saved.
    """
    if checkpoint_every is not None:
        at_least(f"{name}.checkpoint_every", checkpoint_every, 1)
    progress = progress or SilentProgress()
    tracker = tracker or NullTracker()
    history: list[Row] = []
    sums: dict[str, Tensor] = {}
    # The first step in which a value was not finite, 0 while there is none; on the device, so that no step waits.
    broken_in: dict[str, Tensor] = {}
    position = 0
    saving = distributed.anywhere(checkpoints is not None)
    state = distributed.broadcast(checkpoints.load() if checkpoints else None)
    if state is None:
        distributed.diverge()
    else:
        with _own(name, checkpoints):
            for key, part in stateful.items():
                part.load_state_dict(state[key])
            position, history, ranks = state["position"], state["history"], state["ranks"]
            own = distributed.rank() if len(ranks) == distributed.world() else 0
            restore_rng_state(ranks[own]["rng"])
            if len(ranks) == distributed.world():
                sums = ranks[own]["sums"]
            else:  # another number of them
                sums = {key: torch.stack([one["sums"][key] for one in ranks]).mean(0) for key in ranks[0]["sums"]}
                distributed.diverge()
        progress.note(f"{name}: resuming at step {position} of {epochs * steps_per_epoch}")

    def check_finite() -> None:
        broken = [(first, key) for key, step in broken_in.items() if (first := int(step))]
        if not bool(torch.stack([parameter.isfinite().all() for parameter in parameters]).all()):
            broken.append((position, "a parameter"))
        broken = [pair for pairs in distributed.gather(broken) for pair in pairs]
        if broken:
            first, what = min(broken, key=lambda pair: pair[0])
            raise TangleNASError(
                f"{name}: {what} is not finite by step {first} of {epochs * steps_per_epoch}: training "
                "diverged. Lower the learning rate, or clip gradients"
            )

    def save() -> None:
        if not saving:
            return
        check_finite()
        ranks = distributed.gather({"sums": sums, "rng": rng_state()})
        if checkpoints:
            parts = {key: part.state_dict() for key, part in stateful.items()}
            checkpoints.save({**parts, "position": position, "history": history, "ranks": ranks})

    with _stop_requests() as stop, progress.stage(name, epochs * steps_per_epoch, position) as line:
        while position < epochs * steps_per_epoch and not (history and history[-1].get("stopped")):
            for key, value in step(position).items():
                sums[key] = value.detach() + sums[key] if key in sums else value.detach().clone()
                first = torch.where(value.detach().isfinite(), 0, position + 1)
                broken_in[key] = torch.where(broken_in[key] > 0, broken_in[key], first) if key in broken_in else first
            position += 1
            line.advance()
            if position % steps_per_epoch == 0:
                epoch = position // steps_per_epoch
                check_finite()
                distributed.check_equal(parameters)
                distributed.average(sums.values())
                means = {key: float(value) / steps_per_epoch for key, value in sums.items()}
                row = distributed.broadcast({"epoch": epoch, **end_epoch(epoch, means)})
                history.append(row)
                sums = {}
                numbers = {key: n for key, n in row.items() if isinstance(n, int | float) and key != "epoch"}
                tracker.log_metrics({f"{name}/{key}": value for key, value in numbers.items()}, step=epoch)
                line.epoch(epoch, epochs, describe(row))
                save()
            elif checkpoint_every and position % checkpoint_every == 0:
                save()
            if distributed.anywhere(stop.is_set()) and position < epochs * steps_per_epoch:
                save()
                where = f" and is saved in {checkpoints.folder}" if checkpoints else ", but it had nowhere to save"
                raise Interrupted(
                    f"{name} stopped at step {position} of {epochs * steps_per_epoch}{where}. "
                    "Run the same command again to continue"
                )
    return history


@contextmanager
def _own(name: str, checkpoints: CheckpointFolder | None) -> Iterator[None]:
    """Every optimizer, schedule and average refuses the state of another one in its own way: here, in one."""
    try:
        yield
    except TangleNASError:
        raise
    except Exception as error:
        raise TangleNASError(
            f"{name}: the checkpoint{f' in {checkpoints.folder}' if checkpoints else ''} is not of this run "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Delete the folder to start afresh"
        ) from error


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set once; a second signal acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        event.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Measured(NamedTuple):
    """Accuracy in % and mean cross-entropy over all targets."""

    accuracy: float
    loss: float


@torch.no_grad()
def measure(network: nn.Module, samples: Samples, batch_size: int = 256, together: bool = False) -> Measured:
    """Accuracy and loss of a network in eval mode, over all targets; its mode is restored.

    `together` has every rank look at its part of the samples, with equal networks; otherwise each is by itself.
    """
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    hits = torch.zeros((), dtype=torch.long, device=device)
    loss, count = torch.zeros((), device=device), 0
    part = torch.arange(distributed.rank(), len(samples), distributed.world()) if together else None
    for batch in batches(samples, batch_size, part):
        inputs, targets = to(batch, device)
        outputs = network(inputs)
        hits += (outputs.argmax(-1) == targets).sum()
        loss += cross_entropy(outputs, targets) * targets.numel()
        count += targets.numel()
    network.train(training)
    sums = [float(hits), float(loss), count]
    right, wrong, seen = distributed.total(sums) if together else sums
    return Measured(100.0 * right / seen, wrong / seen)


def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of every batch norm in `network` to their average over `batches` of inputs.

    A sampled path uses statistics that were gathered under other paths; this makes them its own. Everything else
    is in eval mode meanwhile: dropout would disturb them.
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
    """Inputs of `count` random batches: a dataset may be sorted by class, and its first batches all of one."""
    stream = Stream(samples, min(batch_size, len(samples)), seed=seed)
    return [laid_out(inputs.to(device)) for inputs, _ in itertools.islice(stream.start(), count)]


def cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean over all targets, of images `(B,)` or of tokens `(B, T)`; `outputs` has the classes last."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)


def scalar(loss: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A loss whose result is checked to be one number, a TangleNASError otherwise."""

    def checked(outputs: Any, targets: Tensor) -> Tensor:
        value = loss(outputs, targets)
        if not isinstance(value, Tensor) or value.dim():
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TangleNASError(
                f"the loss gives {what}, expected a tensor with one number: of torch's losses, take those with the "
                "reduction 'mean'"
            )
        return value

    return checked


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """Accuracy of a batch in %, as a tensor on its device."""
    return 100.0 * (outputs.detach().argmax(-1) == targets).float().mean()


def device_of(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one (of several ranks each has its own), else the CPU."""
    if name is None or (name == "cuda" and torch.cuda.is_available()):
        return distributed.own_device()
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TangleNASError(f"device {name!r} cannot be used: {reason}. Use 'cpu', or leave it out") from None
    return device


def made(name: str, factory: Callable[..., T], *arguments: Any) -> T:
    """What a factory makes that someone configured: of an optimizer, or of what goes with it.

    An optimizer of torch takes its steps in one pass over the parameters where it can, unless it was told how.

    Raises:
        TangleNASError: It makes nothing of the kind from what such a factory is given.
    """
    try:
        result = factory(*arguments)
        what = "" if hasattr(result, "state_dict") else f"it makes a {type(result).__name__}"
    except (TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if what:
        raise TangleNASError(
            f"{name} cannot be used ({what}). Expected what takes {len(arguments)} argument"
            f"{'s' * (len(arguments) > 1)} and makes something that can be saved, such as torch.optim.SGD or cosine"
        )
    if type(result) in FUSED:
        _fuse(result)
    return result


def _fuse(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        untold = group["fused"] is None and not group["foreach"] and not group["differentiable"]
        if untold and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"]):
            group["fused"] = True
    optimizer.register_step_pre_hook(_align)


def _align(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Lay gradients out in memory as their parameters are: a fused step goes through both as they lie.

    Backward passes do; a gradient that a search method sets itself may be the transposed one of a product.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if parameter.grad.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)


def at_least(name: str, value: Any, least: int) -> int:
    """`value`, checked to be an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TangleNASError(f"{name} is {value!r}, expected a whole number of at least {least}")
    return value


def parts_of(stage: str, batch_size: int, accumulate: int) -> tuple[int, int]:
    """This rank's part of every batch, and of how many, once it is checked that they and what they accumulate fit."""
    count = distributed.world() * at_least(f"{stage}.accumulate", accumulate, 1)
    if batch_size % count:
        raise TangleNASError(
            f"{stage}.batch_size is {batch_size}, expected a multiple of {count}: every batch is shared by "
            f"{distributed.world()} process(es), each of which takes its part in {accumulate} piece(s)"
        )
    return distributed.rank(), distributed.world()


def running_statistics(network: nn.Module) -> list[Tensor]:
    """The running means and variances of all batch norms."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]


def to(batch: Iterable[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets on a device; pinned memory is copied without waiting."""
    inputs, targets = batch
    return laid_out(inputs.to(device, non_blocking=True)), targets.to(device, non_blocking=True)


def laid_out(inputs: Tensor) -> Tensor:
    """The same inputs; images on a CPU with the channels last in memory, as a network of convolutions then keeps them.

    Depthwise convolutions and batch norms take up to half the time so: benchmarks/README.md has the figures.
    """
    if inputs.dim() != 4 or inputs.device.type != "cpu":
        return inputs
    # Of a single channel torch takes either layout for the other, and would hand back what it got.
    return torch.empty_like(inputs, memory_format=torch.channels_last).copy_(inputs)
