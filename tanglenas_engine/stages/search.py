"""The search stage: train a supernet and its architecture parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tanglenas_engine.data import DataView, Stream
from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.optimizers.optimizer import Batch, Loss, Optimizer, Step, entropy
from tanglenas_engine.optimizers.stopping import _Stops
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.devices import device_of, to
from tanglenas_engine.runtime.distributed import parts_of
from tanglenas_engine.runtime.progress import Progress
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.runtime.tracking import Tracker
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.fit import check_fit
from tanglenas_engine.spaces.objective import Target
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.training.execution import Compiled, Precision, backend_of, executing
from tanglenas_engine.training.loop import Row, run
from tanglenas_engine.training.losses import correct, cross_entropy, scalar
from tanglenas_engine.training.measure import measure, running_statistics
from tanglenas_engine.training.optim import OptimizerFactory, SchedulerFactory, cosine, made, parameter_groups

Strategy = Literal["alternating", "simultaneous"]


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves; the trained weights are in the space.

    `architecture` and `mixture` are None for a method that derives its architecture afterwards. `history` has
    one row per epoch: losses, accuracies in %, entropy of the mixture from 1 (undecided) to 0, the current
    architecture with its cost and, under "mixture", its weights by choice. For each target it has the expected cost
    and the cost of the current architecture, and under `penalty_NAME` what the loss of alpha was charged. If the
    search stopped early, the last row says why under "stopped".
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
    targets: Sequence[Target] = (),
    max_skips: int | None = None,
    skip_options: Sequence[str] = ("skip_connect",),
    min_entropy: float | None = None,
    clip: float | None = 5.0,
    loss: Loss = cross_entropy,
    precision: str = "float32",
    compile: bool | str = False,
    accumulate: int = 1,
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

    The ranks of a process group share every batch, and end with the same weights and the same architecture.

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
        targets: Costs to keep down, in expectation; the loss of alpha is charged for missing them.
        max_skips: Stop after the epoch, past the warm-up, in which one choice of the current architecture (a cell's
            operations, say) has more than so many of `skip_options`: the usual sign of a collapse (Liang et al., 2019,
            arXiv:1909.06035). What is found then is that architecture.
        skip_options: Names of options that count as skip connections.
        min_entropy: Stop after the epoch, past the warm-up, in which the entropy in the history falls below this:
            alpha has decided, and more epochs change little.
        clip: Largest norm of the weights' gradient.
        loss: Of outputs and targets, `(B, classes)` and `(B,)`, or `(B, T, tokens)` and `(B, T)`.
        precision: What matrix products are computed in: "float32", "bfloat16", or "float16" on a GPU. Weights, alpha,
            masks and losses are float32 throughout.
        compile: Whether `torch.compile` takes the forwards of mixtures, or with which of its backends. Sampled
            architectures (spos, gdas, validation) run uncompiled: each is another network.
        accumulate: Into how many parts a batch is cut, whose gradients are added up before a step: less memory for
            the same step, but for batch norms, which see the parts.
        num_workers: Processes that load data.
        device: Such as "cpu" or "cuda:0"; by default CUDA where there is one.
        table: What a benchmark says of an architecture; asked once an epoch about the current one, for the history.
        checkpoints: Where to save after every epoch, and every `checkpoint_every` iterations if given; a search
            that finds its own checkpoint there goes on from it and ends as if it had not been cut off. Of several
            ranks the first has them, the others None.

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
        raise TangleNASError(f"the space {space.label} has no choices: there is nothing to search")
    stops = _Stops(space, optimizer, max_skips, skip_options, min_entropy)
    check_fit(space, data.weights)
    target, loss = device_of(device), scalar(loss)
    precise, backend = Precision(precision, target), backend_of(compile)
    part = parts_of("search", batch_size, accumulate)
    if accumulate > 1 and not optimizer.accumulates:
        raise TangleNASError(
            f"search.accumulate is {accumulate}, but {optimizer.name or type(optimizer).__name__} takes alpha's "
            "gradient from a whole batch: leave it out, and use a smaller batch_size"
        )
    space.to(target).train()
    distributed.synchronize([*space.parameters(), *space.buffers()])
    optimizer.bind(space, seed)
    drawn = _bound(targets, space, optimizer)
    for wanted in targets:
        if wanted.objective.source and progress is not None:
            progress.note(f"search: {wanted.name} in {wanted.objective.unit}, of {wanted.objective.source}")
    weights = Stream(data.weights, batch_size, seed=2 * seed, num_workers=num_workers, part=part)
    learns = optimizer.learns_architecture
    alternating = learns and strategy == "alternating"
    streams = [weights]
    if alternating:
        streams.append(Stream(data.architecture, batch_size, seed=2 * seed + 1, num_workers=num_workers, part=part))
    per_epoch = weights.batches_per_epoch
    of_weights = made("search.weight_optimizer", weight_optimizer, parameter_groups(space))
    parameters, alphas = list(space.parameters()), optimizer.parameters()
    statistics = running_statistics(space)
    of_alpha = made("search.architecture_optimizer", architecture_optimizer, alphas) if learns else None
    schedule = made("search.scheduler", scheduler, of_weights, epochs * per_epoch) if scheduler else None
    iterators: list[Iterator[Batch]] = []
    scaler, one = precise.scaler, torch.ones((), device=target)

    def charge() -> dict[str, Tensor]:
        """Add the targets' gradients to those of alpha, and say what they charge."""
        if not drawn:
            return {}
        mixture = optimizer.expected()
        assert mixture is not None
        charges = {f"penalty_{wanted.name}": wanted.charge(mixture) for wanted in drawn}
        total = torch.stack(list(charges.values())).sum()
        gradients = torch.autograd.grad(total, alphas, allow_unused=True)
        for alpha, gradient in zip(alphas, gradients, strict=True):
            if gradient is not None:
                alpha.grad = gradient if alpha.grad is None else alpha.grad + gradient
        return charges

    def architecture_backward(steps: Sequence[Step]) -> Tensor:
        """Set alpha's gradient to its mean over the parts of a batch and the ranks, and give the mean loss here."""
        losses, gradients = [], []
        for now in steps:
            losses.append(optimizer.architecture_backward(now))
            gradients.append([alpha.grad for alpha in alphas])
        for alpha, *parts in zip(alphas, *gradients, strict=True):
            alpha.grad = sum(parts[1:], parts[0]) / len(parts)
        distributed.average(alpha.grad for alpha in alphas)
        return torch.stack(losses).mean()

    def weight_backward(steps: Sequence[Step], learning: Sequence[Tensor]) -> Tensor:
        """Set the weights' gradients to their means over the parts of a batch and the ranks; give the loss here."""
        total = torch.zeros((), device=target)
        for now in steps:
            for term in optimizer.weight_losses(now):
                term = term / len(steps)
                torch.autograd.backward(scaler.scale(term))
                total += term.detach()
        # Statistics are means of batches: exchanged in every step, they are those of the ranks' batches together.
        distributed.average([*(parameter.grad for parameter in learning), *statistics])
        return total

    def step(position: int) -> dict[str, Tensor]:
        if not iterators or position % per_epoch == 0:
            optimizer.progress(position // per_epoch / epochs)
        if not iterators:  # a resumed search starts its streams where it left off
            iterators.extend(stream.start(position) for stream in streams)
        warm = position >= warmup_epochs * per_epoch
        batches = [[tensor.chunk(accumulate) for tensor in to(next(iterator), target)] for iterator in iterators]
        pieces = [list(zip(*batch, strict=True)) for batch in batches]
        steps = [
            Step(
                index=position,
                space=space,
                loss=loss,
                weight_batch=pieces[0][number],
                architecture_batch=pieces[1][number] if alternating else None,
                weight_optimizer=of_weights,
                scale=scaler.scale(one),
            )
            for number in range(accumulate)
        ]
        measured: dict[str, Tensor] = {}
        if alternating and warm and of_alpha is not None:
            measured["architecture_loss"] = architecture_backward(steps)
            scaler.unscale_(of_alpha)
            measured.update(charge())
            scaler.step(of_alpha)
        of_weights.zero_grad()
        if of_alpha is not None:
            of_alpha.zero_grad()
        together = not alternating and warm and of_alpha is not None
        measured["weight_loss"] = weight_backward(steps, [*parameters, *alphas] if together else parameters)
        scaler.unscale_(of_weights)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(of_weights)
        if together and of_alpha is not None:
            scaler.unscale_(of_alpha)
            if (penalty := optimizer.regularizer()) is not None:
                torch.autograd.backward(penalty)
            measured.update(charge())
            scaler.step(of_alpha)
        scaler.update()
        if schedule is not None:
            schedule.step()
        seen = [correct(now.outputs, now.weight_batch[1]) for now in steps if now.outputs is not None]
        if seen:
            measured["weight_accuracy"] = torch.stack(seen).mean()
        return measured

    def end_epoch(epoch: int, means: Row) -> Row:
        current = optimizer.current()
        # What alpha says now, judged as it would be extracted; methods that derive later show the largest network.
        space.select(current or space.largest())
        found = measure(space, data.validation, together=True)
        row: Row = {
            **means,
            "validation_accuracy": found.accuracy,
            "validation_loss": found.loss,
            **optimizer.schedules(),
        }
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
            for wanted in targets:
                row.setdefault(f"expected_{wanted.name}", float(wanted.objective.expected(mixture)))
                row.setdefault(wanted.name, wanted.objective.cost(current))
            if epoch > warmup_epochs and (reason := stops.reason(current, row["entropy"])):
                row["stopped"] = reason
                if progress is not None:
                    progress.note(f"search: stopped after epoch {epoch} of {epochs}: {reason}")
        return row

    ways = [precise.run, *([] if backend is None else [Compiled(space, backend).run])]
    try:
        with seeded(seed), executing(space, *ways):
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
                    **({"scaler": scaler} if scaler.is_enabled() else {}),
                },
                parameters=[*parameters, *alphas],
                checkpoints=checkpoints,
                checkpoint_every=checkpoint_every,
                tracker=tracker,
                progress=progress,
            )
    finally:
        space.release()
        space.superposition.parts = 1  # an architecture has all channels
    mixture = optimizer.expected()
    return SearchResult(optimizer.current(), mixture and mixture.detach(), history)


def _bound(targets: Sequence[Target], space: SearchSpace, optimizer: Optimizer) -> list[Target]:
    """Bind targets to the space, and give those that draw alpha.

    Raises:
        TangleNASError: Two are of one objective, one cannot be met, or the optimizer cannot follow one.
    """
    names = [one.name for one in targets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TangleNASError(f"search.targets has two for {twice[0]!r}: give one for each objective")
    drawn = [one for one in targets if one.draws]
    if drawn and not optimizer.learns_architecture:
        raise TangleNASError(
            f"search.targets: {optimizer.name or type(optimizer).__name__} has no architecture parameters that a "
            f"target for {drawn[0].name} could draw. Leave it out, and give a hard budget to discretize"
        )
    for one in targets:
        one.bind(space)
    return drawn


def _describe(row: Row) -> str:
    train = f"  train {row['weight_accuracy']:.1f} %" if "weight_accuracy" in row else ""
    what = row.get("architecture", "(largest network)")
    return f"loss {row['weight_loss']:.3f}{train}  valid {row['validation_accuracy']:.1f} %  {what}"
