"""The search stage: train a supernet and its architecture parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tanglenas_engine.data import DataView, Stream
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.optimizers.optimizer import Batch, Loss, Optimizer, Step, normalized_entropy
from tanglenas_engine.optimizers.stopping import Stop
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.devices import to
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.fit import check_fit
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.training.execution import Compiled, executing
from tanglenas_engine.training.loop import Stateful, Training
from tanglenas_engine.training.losses import correct, cross_entropy, scalar
from tanglenas_engine.training.measure import (
    measure_inherited,
    running_statistics,
)
from tanglenas_engine.training.optim import OptimizerFactory, SchedulerFactory, cosine, made, parameter_groups
from tanglenas_engine.training.options import Computation, Session, flattened

Strategy = Literal["alternating", "simultaneous"]
Table = Callable[[Architecture], Mapping[str, float]]
"""What a benchmark says of an architecture."""


@dataclass(frozen=True)
class SearchResult:
    """The result of a search; the trained weights are in the space.

    `architecture` and `mixture` are None for a method that derives its architecture afterwards. `history` has
    one record per epoch: losses, accuracies in %, entropy of the mixture from 1 (undecided) to 0, the current
    architecture with its cost and, under "mixture", its weights by choice. For each target it has the expected cost
    and the cost of the current architecture, and under `penalty_NAME` what the loss of alpha was charged. If the
    search stopped early, the last record says why under "stopped".
    """

    architecture: Architecture | None
    mixture: Mixture | None
    history: list[Record]


@flattened
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
    stop: Stop | None = None,
    loss: Loss = cross_entropy,
    recalibration_batches: int = 8,
    seed: int = 0,
    table: Table | None = None,
    computation: Computation = Computation(),
    session: Session = Session(),
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
        stop: Ends the search after an epoch past the warm-up, such as `EarlyStopping`.
        loss: Of outputs and targets, `(B, classes)` and `(B,)`, or `(B, T, tokens)` and `(B, T)`.
        recalibration_batches: Batches that set the statistics of batch norms for the architecture that is validated;
            0 takes the supernet's, which are of all architectures together.
        table: Asked once an epoch about the current architecture, for the history.
        computation: Precision, compilation, accumulation and clipping. Its fields are also options of their own.
        session: Device, workers, checkpoints, tracker and progress. Its fields are also options of their own.

    Raises:
        TangleNASError: An option is out of its range, the data do not fit the space, or the training diverged.
        Interrupted: The process was asked to stop, and the state is saved.
    """
    kinds = {"alternating": Search, "simultaneous": SimultaneousSearch}
    if strategy not in kinds:
        raise TangleNASError(f"search.strategy is {strategy!r}, expected 'alternating' or 'simultaneous'")
    return kinds[strategy](
        space,
        optimizer,
        data,
        epochs=epochs,
        batch_size=batch_size,
        weight_optimizer=weight_optimizer,
        architecture_optimizer=architecture_optimizer,
        scheduler=scheduler,
        warmup_epochs=warmup_epochs,
        targets=targets,
        stop=stop,
        loss=loss,
        recalibration_batches=recalibration_batches,
        seed=seed,
        table=table,
        computation=computation,
        session=session,
    ).result()


class Search(Training):
    """A search whose iterations take an architecture step and a weight step on batches of their own.

    A method without architecture parameters takes weight steps only. The arguments are those of `search`.
    """

    def __init__(
        self,
        space: SearchSpace,
        optimizer: Optimizer,
        data: DataView,
        *,
        epochs: int,
        batch_size: int,
        weight_optimizer: OptimizerFactory,
        architecture_optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        warmup_epochs: int,
        targets: Sequence[Target],
        stop: Stop | None,
        loss: Loss,
        recalibration_batches: int,
        seed: int,
        table: Table | None,
        computation: Computation,
        session: Session,
    ):
        _check_options(space, optimizer, epochs, warmup_epochs, computation)
        if stop is not None:
            stop.check(space, optimizer)
        check_fit(space, data.weights)
        self.space, self.optimizer, self.validation = space, optimizer, data.validation
        self.loss, self.seed, self.table, self.stop = scalar(loss), seed, table, stop
        self.warmup_epochs, self.computation = warmup_epochs, computation
        self.device = session.find_device()
        self.precision, self.backend = computation.precise(self.device), computation.backend
        self.scaler = self.precision.scaler
        share = computation.share("search", batch_size)
        space.to(self.device).train()
        distributed.synchronize([*space.parameters(), *space.buffers()])
        optimizer.bind(space, seed)
        self.targets, self.active_targets = targets, _bound(targets, space, optimizer)
        for target in targets:
            if target.objective.source:
                session.note(f"search: {target.name} in {target.objective.unit}, of {target.objective.source}")
        splits = [data.weights, data.architecture] if self.takes_architecture_batches else [data.weights]
        self.streams = [
            Stream(split, batch_size, seed=2 * seed + number, num_workers=session.num_workers, part=share)
            for number, split in enumerate(splits)
        ]
        super().__init__("search", epochs, self.streams[0].batches_per_epoch, session)
        self.weights, self.alphas = list(space.parameters()), optimizer.parameters()
        self.parameters = [*self.weights, *self.alphas]
        self.statistics = running_statistics(space)
        self.weight_optimizer = made("search.weight_optimizer", weight_optimizer, parameter_groups(space))
        self.architecture_optimizer = (
            made("search.architecture_optimizer", architecture_optimizer, self.alphas)
            if optimizer.learns_architecture
            else None
        )
        self.scheduler = made("search.scheduler", scheduler, self.weight_optimizer, self.steps) if scheduler else None
        self._iterators: list[Iterator[Batch]] = []
        self._one = torch.ones((), device=self.device)

    @property
    def takes_architecture_batches(self) -> bool:
        """True if alpha learns from batches of the architecture split."""
        return self.optimizer.learns_architecture

    def result(self) -> SearchResult:
        """Run the search and return what it found."""
        ways = [self.precision.run, *([] if self.backend is None else [Compiled(self.space, self.backend).run])]
        try:
            with seeded(self.seed), executing(self.space, *ways):
                history = self.run()
        finally:
            self.space.release()
            self.space.superposition.channel_divisor = 1  # an architecture has all channels
        mixture = self.optimizer.expected()
        return SearchResult(self.optimizer.current(), mixture and mixture.detach(), history)

    def stateful(self) -> Mapping[str, Stateful]:
        parts: dict[str, Stateful | None] = {
            "space": self.space,
            "optimizer": self.optimizer,
            "weight_optimizer": self.weight_optimizer,
            "architecture_optimizer": self.architecture_optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler if self.scaler.is_enabled() else None,
        }
        return {name: part for name, part in parts.items() if part is not None}

    # One iteration.

    def step(self, position: int) -> dict[str, Tensor]:
        pieces = self._next_pieces(position)
        learns = self.architecture_optimizer is not None and position >= self.warmup_epochs * self.steps_per_epoch
        measured = self.update(pieces, learns)
        self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        seen = [correct(piece.outputs, piece.weight_batch[1]) for piece in pieces if piece.outputs is not None]
        if seen:
            measured["weight_accuracy"] = torch.stack(seen).mean()
        return measured

    def update(self, pieces: Sequence[Step], learns: bool) -> dict[str, Tensor]:
        """Move alpha, if it `learns` by now, and then the weights."""
        measured = self.architecture_step(pieces) if learns else {}
        self._zero_gradients()
        return {**measured, **self.weight_step(pieces)}

    def architecture_step(self, pieces: Sequence[Step]) -> dict[str, Tensor]:
        """Move alpha by its mean gradient over the pieces of a batch and the ranks, and by that of the targets."""
        losses, gradients = [], []
        for piece in pieces:
            losses.append(self.optimizer.architecture_backward(piece))
            gradients.append([alpha.grad for alpha in self.alphas])
        for alpha, *parts in zip(self.alphas, *gradients, strict=True):
            alpha.grad = sum(parts[1:], parts[0]) / len(parts)
        distributed.average(alpha.grad for alpha in self.alphas)
        return {"architecture_loss": torch.stack(losses).mean(), **self._move_alphas()}

    def weight_step(self, pieces: Sequence[Step], learning: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """Move the weights by their mean gradients over the pieces of a batch and the ranks.

        Args:
            learning: Further tensors that get a gradient from the same backward pass.
        """
        total = torch.zeros((), device=self.device)
        for piece in pieces:
            for term in self.optimizer.weight_losses(piece):
                term = term / len(pieces)
                torch.autograd.backward(self.scaler.scale(term))
                total += term.detach()
        # Statistics are means of batches: exchanged in every step, they are those of the ranks' batches together.
        distributed.average([*(tensor.grad for tensor in (*self.weights, *learning)), *self.statistics])
        self.scaler.unscale_(self.weight_optimizer)
        if self.computation.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.weights, self.computation.clip)
        self.scaler.step(self.weight_optimizer)
        return {"weight_loss": total}

    def _move_alphas(self, penalty: Tensor | None = None) -> dict[str, Tensor]:
        """Step alpha's optimizer, with the gradients of a penalty and of the targets added; return the charges."""
        assert self.architecture_optimizer is not None
        self.scaler.unscale_(self.architecture_optimizer)
        if penalty is not None:
            torch.autograd.backward(penalty)
        charges = self._charge_targets()
        self.scaler.step(self.architecture_optimizer)
        return charges

    def _charge_targets(self) -> dict[str, Tensor]:
        """Add the gradients of the targets' charges to those of alpha, and return the charges."""
        if not self.active_targets:
            return {}
        mixture = self.optimizer.expected()
        assert mixture is not None
        charges = {f"penalty_{target.name}": target.charge(mixture) for target in self.active_targets}
        total = torch.stack(list(charges.values())).sum()
        gradients = torch.autograd.grad(total, self.alphas, allow_unused=True)
        for alpha, gradient in zip(self.alphas, gradients, strict=True):
            if gradient is not None:
                alpha.grad = gradient if alpha.grad is None else alpha.grad + gradient
        return charges

    def _zero_gradients(self) -> None:
        self.weight_optimizer.zero_grad()
        if self.architecture_optimizer is not None:
            self.architecture_optimizer.zero_grad()

    def _next_pieces(self, position: int) -> list[Step]:
        """Return the next batches, cut into the pieces that are accumulated."""
        if not self._iterators or position % self.steps_per_epoch == 0:
            self.optimizer.set_progress(position // self.steps_per_epoch / self.epochs)
        if not self._iterators:  # a resumed search starts its streams where it left off
            self._iterators.extend(stream.start(position) for stream in self.streams)
        count = self.computation.accumulate
        batches = [[t.chunk(count) for t in to(next(iterator), self.device)] for iterator in self._iterators]
        weight_batches, *others = [list(zip(*batch, strict=True)) for batch in batches]
        return [
            Step(
                index=position,
                space=self.space,
                loss=self.loss,
                weight_batch=weight_batches[number],
                architecture_batch=others[0][number] if others else None,
                weight_optimizer=self.weight_optimizer,
                scale=self.scaler.scale(self._one),
            )
            for number in range(count)
        ]

    # The end of an epoch.

    def end_epoch(self, epoch: int, means: Record) -> Record:
        current = self.optimizer.current()
        # What alpha says now, judged as discretize would; methods that derive later show the largest network.
        shown = current or self.space.largest()
        found = measure_inherited(self.space, shown, self.validation, self._statistics, together=True)
        record: Record = {
            **means,
            "validation_accuracy": found.accuracy,
            "validation_loss": found.loss,
            **self.optimizer.schedules(),
        }
        mixture = self.optimizer.expected()
        if mixture is None or current is None:
            return record
        record |= self._current_record(mixture.detach(), current)
        if self.stop is not None and epoch > self.warmup_epochs and (reason := self.stop(current, record)):
            record["stopped"] = reason
            self.session.note(f"search: stopped after epoch {epoch} of {self.epochs}: {reason}")
        return record

    def _current_record(self, mixture: Mixture, current: Architecture) -> Record:
        """What the history keeps of the mixture and of the architecture that it stands for."""
        expected, cost = self.space.expected_cost(mixture), self.space.cost(current)
        record: Record = {
            "entropy": normalized_entropy(mixture),
            "expected_params": float(expected.params),
            "expected_flops": float(expected.flops),
            "params": cost.params,
            "flops": cost.flops,
            "digest": current.digest,
            "architecture": str(current),
            "mixture": {name: mixture[name].tolist() for name in mixture},
            **(self.table(current) if self.table else {}),
        }
        for target in self.targets:
            record.setdefault(f"expected_{target.name}", float(target.objective.expected(mixture)))
            record.setdefault(target.name, target.objective.cost(current))
        return record

    def describe(self, record: Record) -> str:
        train = f"  train {record['weight_accuracy']:.1f} %" if "weight_accuracy" in record else ""
        what = record.get("architecture", "(largest network)")
        return f"loss {record['weight_loss']:.3f}{train}  valid {record['validation_accuracy']:.1f} %  {what}"


class SimultaneousSearch(Search):
    """A search in which one backward pass on the weights split serves the weights and alpha."""

    @property
    def takes_architecture_batches(self) -> bool:
        return False

    def update(self, pieces: Sequence[Step], learns: bool) -> dict[str, Tensor]:
        """Move the weights and, if it `learns` by now, alpha."""
        self._zero_gradients()
        measured = self.weight_step(pieces, self.alphas if learns else ())
        return {**measured, **self._move_alphas(self.optimizer.regularizer())} if learns else measured


def _check_options(
    space: SearchSpace, optimizer: Optimizer, epochs: int, warmup_epochs: int, computation: Computation
) -> None:
    at_least("search.epochs", epochs, 1)
    at_least("search.warmup_epochs", warmup_epochs, 0)
    if warmup_epochs >= epochs and optimizer.learns_architecture:
        raise TangleNASError(f"{warmup_epochs} warm-up epochs leave no epoch of {epochs} in which alpha learns")
    if not space.rows:
        raise TangleNASError(f"the space {space.label} has no choices: there is nothing to search")
    if at_least("search.accumulate", computation.accumulate, 1) > 1 and not optimizer.accumulates:
        raise TangleNASError(
            f"search.accumulate is {computation.accumulate}, but {optimizer.label} takes alpha's gradient from a "
            "whole batch: leave it out, and use a smaller batch_size"
        )


def _bound(targets: Sequence[Target], space: SearchSpace, optimizer: Optimizer) -> list[Target]:
    """Bind targets to the space, and return those that change alpha's loss.

    Raises:
        TangleNASError: Two are of one objective, one cannot be met, or the optimizer cannot follow one.
    """
    names = [target.name for target in targets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TangleNASError(f"search.targets has two for {twice[0]!r}: give one for each objective")
    active = [target for target in targets if target.active]
    if active and not optimizer.learns_architecture:
        raise TangleNASError(
            f"search.targets: {optimizer.label} has no architecture parameters that a target for {active[0].name} "
            "could draw. Leave it out, and give a hard budget to discretize"
        )
    for target in targets:
        target.bind(space)
    return active
