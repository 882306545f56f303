"""The search stage: train a supernet and its architecture parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tanglenas_engine.architecture import Architecture
from tanglenas_engine.checkpoint import CheckpointFolder
from tanglenas_engine.data import DataView, Samples, Stream, batches
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.mixture import Mixture
from tanglenas_engine.optimizer import Batch, Loss, Optimizer, Step, entropy
from tanglenas_engine.progress import Progress
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
    run,
    to,
)

Strategy = Literal["alternating", "simultaneous"]


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves; the trained weights are in the space.

    `architecture` and `mixture` are None for a method that derives its architecture afterwards. `history` has
    one row per epoch: losses, accuracies in %, entropy of the mixture from 1 (undecided) to 0, the current
    architecture with its cost and, under "mixture", its weights by choice.
    """

    architecture: Architecture | None
    mixture: Mixture | None
    history: list[Row]


def search(
    space: SearchSpace,
    optimizer: Optimizer,
    data: DataView,
    *,
    epochs: int = 50,
    batch_size: int = 64,
    weight_optimizer: OptimizerFactory = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
    architecture_optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=3e-4, betas=(0.5, 0.999)),
    scheduler: SchedulerFactory | None = cosine,
    strategy: Strategy = "alternating",
    warmup_epochs: int = 0,
    clip: float | None = 5.0,
    loss: Loss = cross_entropy,
    seed: int = 0,
    num_workers: int = 0,
    device: str | None = None,
    table: Callable[[Architecture], Mapping[str, float]] | None = None,
    checkpoints: CheckpointFolder | None = None,
    checkpoint_every: int | None = None,
    tracker: Tracker | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Search `space` with `optimizer`: in every iteration an architecture step and a weight step.

    Args:
        data: A view that reaches the splits `weights`, `architecture` and `validation`.
        epochs: Passes over the weights split.
        weight_optimizer: Makes the optimizer of the supernet's weights from parameter groups.
        architecture_optimizer: Makes the optimizer of alpha from its parameters.
        scheduler: Makes the learning-rate schedule of the weights from (optimizer, total steps); stepped every
            iteration. None keeps the rate.
        strategy: "alternating" takes alpha's gradient from a fresh batch of the architecture split, before each
            weight step (first-order DARTS); "simultaneous" lets one backward pass on the weights split serve both.
        warmup_epochs: Epochs in which only the weights learn.
        clip: Largest norm of the weights' gradient.
        loss: Of outputs and targets, `(B, classes)` and `(B,)`, or `(B, T, tokens)` and `(B, T)`.
        num_workers: Processes that load data.
        device: Such as "cpu" or "cuda:0"; by default CUDA where there is one.
        table: What a benchmark says of an architecture; asked once an epoch about the current one, for the history.
        checkpoints: Where to save after every epoch, and every `checkpoint_every` iterations if given; a search
            that finds its own checkpoint there goes on from it and ends as if it had not been cut off.

    Raises:
        TangleNASError: An option cannot be, the data do not fit the space, or training diverged.
        Interrupted: The process was asked to stop, and the state is saved.
    """
    at_least("search.epochs", epochs, 1)
    at_least("search.warmup_epochs", warmup_epochs, 0)
    if strategy not in ("alternating", "simultaneous"):
        raise TangleNASError(f"search.strategy is {strategy!r}, expected 'alternating' or 'simultaneous'")
    if warmup_epochs >= epochs and optimizer.learns_architecture:
        raise TangleNASError(f"{warmup_epochs} warm-up epochs leave no epoch of {epochs} in which alpha learns")
    if not space.rows:
        raise TangleNASError(f"the space {space._label} has no choices: there is nothing to search")
    check_fit(space, data.weights)
    target = device_of(device)
    space.to(target).train()
    optimizer.bind(space, seed)
    weights = Stream(data.weights, batch_size, seed=2 * seed, num_workers=num_workers)
    learns = optimizer.learns_architecture
    alternating = learns and strategy == "alternating"
    streams = [weights]
    if alternating:
        streams.append(Stream(data.architecture, batch_size, seed=2 * seed + 1, num_workers=num_workers))
    per_epoch = weights.batches_per_epoch
    of_weights = weight_optimizer(parameter_groups(space))
    of_alpha = architecture_optimizer(list(optimizer.alphas.values())) if learns else None
    schedule = scheduler(of_weights, epochs * per_epoch) if scheduler else None
    iterators: list[Iterator[Batch]] = []

    def step(position: int) -> dict[str, Tensor]:
        if not iterators or position % per_epoch == 0:
            optimizer.progress(position // per_epoch / epochs)
        if not iterators:  # a resumed search starts its streams where it left off
            iterators.extend(stream.start(position) for stream in streams)
        warm = position >= warmup_epochs * per_epoch
        now = Step(
            index=position,
            space=space,
            loss=loss,
            weight_batch=to(next(iterators[0]), target),
            architecture_batch=to(next(iterators[1]), target) if alternating else None,
            weight_optimizer=of_weights,
        )
        measured: dict[str, Tensor] = {}
        if alternating and warm and of_alpha is not None:
            measured["architecture_loss"] = optimizer.architecture_backward(now)
            of_alpha.step()
        of_weights.zero_grad()
        if of_alpha is not None:
            of_alpha.zero_grad()
        total = torch.zeros((), device=target)
        for term in optimizer.weight_losses(now):
            torch.autograd.backward(term)
            total += term.detach()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(space.parameters(), clip)
        of_weights.step()
        if not alternating and warm and of_alpha is not None:
            if (penalty := optimizer.regularizer()) is not None:
                torch.autograd.backward(penalty)
            of_alpha.step()
        if schedule is not None:
            schedule.step()
        measured["weight_loss"] = total
        if now.outputs is not None:
            measured["weight_accuracy"] = correct(now.outputs, now.weight_batch[1])
        return measured

    def end_epoch(epoch: int, means: Row) -> Row:
        current = optimizer.current()
        # What alpha says now, judged as it would be extracted; methods that derive later show the largest network.
        space.select(current or space.largest())
        found = measure(space, data.validation)
        row: Row = {**means, "validation_accuracy": found.accuracy, "validation_loss": found.loss}
        mixture = optimizer.expected()
        if mixture is not None and current is not None:
            mixture = mixture.detach()
            expected, cost = space.expected_cost(mixture), space.cost(current)
            row.update(
                entropy=entropy(mixture),
                expected_params=float(expected.params),
                expected_flops=float(expected.flops),
                params=cost.params,
                flops=cost.flops,
                digest=current.digest,
                architecture=str(current),
                mixture={name: mixture[name].tolist() for name in mixture},
                **(table(current) if table else {}),
            )
        return row

    try:
        with seeded(seed):
            history = run(
                name="search",
                epochs=epochs,
                steps_per_epoch=per_epoch,
                step=step,
                end_epoch=end_epoch,
                describe=_describe,
                stateful={
                    "space": space,
                    "optimizer": optimizer,
                    "weight_optimizer": of_weights,
                    **({"architecture_optimizer": of_alpha} if of_alpha is not None else {}),
                    **({"scheduler": schedule} if schedule is not None else {}),
                },
                parameters=[*space.parameters(), *optimizer.alphas.values()],
                checkpoints=checkpoints,
                checkpoint_every=checkpoint_every,
                tracker=tracker,
                progress=progress,
            )
    finally:
        space.release()
    mixture = optimizer.expected()
    return SearchResult(optimizer.current(), mixture and mixture.detach(), history)


def check_fit(space: SearchSpace, samples: Samples) -> None:
    """Check that a space takes these inputs and has an output for every class.

    Raises:
        TangleNASError: It does not; the message has both shapes.
    """
    labels = samples.labels
    inputs, targets = next(batches(samples, 256 if labels is None else 1))
    with torch.random.fork_rng(devices=[]):  # a look at a space changes no number of a run
        wanted = space.example_input(1)
    if inputs.shape[1:] != wanted.shape[1:] or inputs.is_floating_point() != wanted.is_floating_point():
        raise TangleNASError(
            f"the data are of shape {_shape(inputs)}, but the space {space._label} takes {_shape(wanted)}: create the "
            "space with what fits the dataset (image_size and in_channels, or block_size), or change the dataset's"
        )
    parameters = next(space.parameters())
    wanted = wanted.to(parameters.device, parameters.dtype if wanted.is_floating_point() else None)
    training = space.training
    with torch.no_grad():
        classes = space.release().eval()(wanted).shape[-1]
    space.train(training)
    largest = int(max(inputs.max(), targets.max()) if labels is None else labels.max())
    if largest >= classes:
        kind, option = ("token", "vocab_size") if labels is None else ("class", "num_classes")
        raise TangleNASError(
            f"the data have a {kind} {largest}, but the space {space._label} has {classes} outputs: create it with "
            f"the dataset's {option}, which is at least {largest + 1}"
        )


def _shape(inputs: Tensor) -> str:
    kind = "" if inputs.is_floating_point() else " tokens"
    return " x ".join(str(n) for n in inputs.shape[1:]) + (" (C x H x W)" if inputs.dim() == 4 else kind)


def _describe(row: Row) -> str:
    train = f"  train {row['weight_accuracy']:.1f} %" if "weight_accuracy" in row else ""
    what = row.get("architecture", "(largest network)")
    return f"loss {row['weight_loss']:.3f}{train}  valid {row['validation_accuracy']:.1f} %  {what}"
