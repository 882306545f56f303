"""The search stage: it trains a supernet and its architecture parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from tanglenas_engine.data import DataView, Stream
from tanglenas_engine.derivation.targets import Target, band_of, bind_targets
from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.optimizers.optimizer import Batch, Loss, Optimizer, Step
from tanglenas_engine.optimizers.stopping import Stop
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.devices import to_device
from tanglenas_engine.runtime.seeding import checked_seed, seeded
from tanglenas_engine.runtime.timer import Clock
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.fit import check_fit
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.stages.ordering import Order, order_network
from tanglenas_engine.stages.overfitting import overfitted
from tanglenas_engine.stages.pace import Pace, taken_back
from tanglenas_engine.stages.split_losses import largest_loss, split_losses
from tanglenas_engine.stages.table_values import Table, table_values
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.training.channels_last import learns_with_channels_last
from tanglenas_engine.training.execution import Compiled, executing
from tanglenas_engine.training.loop import Summand, Training
from tanglenas_engine.training.losses import averages_targets, checked_loss, cross_entropy, is_cross_entropy
from tanglenas_engine.training.measure import Measured, measure_inherited, running_statistics, statistics_inputs
from tanglenas_engine.training.optim import (
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

Phase = Literal["warm-up", "search", "path"]
"""What a step does: the weights learn alone, or alpha too, or the weights by random architectures."""
Strategy = Literal["alternating", "simultaneous"]
"""The order of alpha's and the weights' steps: in turns, or both from one backward pass."""


@dataclass(frozen=True)
class SearchResult:
    """The result of a search. The trained weights are in the space.

    Attributes:
        architecture: The architecture that alpha represents, or None for a method that derives one afterwards.
        mixture: The mixture that alpha represents, or None for such a method.
        history: One record per epoch: losses, accuracies in %, the mixture's entropy from 1 (undecided) to 0, and the
            current architecture with its cost. "mixture" holds the weights by choice. Each target adds its expected
            cost, its cost for the current architecture and, under `penalty_NAME`, its charge on the loss of alpha.
            "stopped" in the last record is the reason why the search ended early.
        split_losses: The loss of one network on each split.
        targets: The costs that the search aimed for, by name.
        units: The units of all costs that were given as targets, aimed for or only reported.
    """

    architecture: Architecture | None
    mixture: Mixture | None
    history: list[Record]
    split_losses: dict[str, float]
    targets: dict[str, float]
    units: dict[str, str] = field(default_factory=dict)


@flattened
def search(
    space: SearchSpace,
    optimizer: Optimizer,
    data: DataView,
    *,
    epochs: int = 50,
    seconds: float | None = None,
    clock: Clock = "processor",
    batch_size: int = 64,
    weight_optimizer: OptimizerFactory = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
    architecture_optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=3e-4, betas=(0.5, 0.999)),
    scheduler: SchedulerFactory | None = cosine,
    strategy: Strategy = "alternating",
    warmup_epochs: int = 0,
    path_epochs: int = 0,
    targets: Sequence[Target] = (),
    band: tuple[float, float] | None = (0.93, 1.0),
    order: Order | None = None,
    order_layers: bool = False,
    stop: Stop | None = None,
    loss: Loss = cross_entropy,
    recalibration_batches: int = 8,
    seed: int = 0,
    table: Table | None = None,
    computation: Computation = Computation(),
    session: Session = Session(),
) -> SearchResult:
    """Search `space` with `optimizer`. Every iteration takes an architecture step and a weight step.

    The ranks of a process group share every batch, and end with the same weights and the same architecture.

    Args:
        space: The supernet. The search trains its weights.
        optimizer: The search method.
        data: A view of the splits `weights`, `architecture` and `validation`.
        epochs: The number of passes over the weights split.
        seconds: The time that the search may take, instead of `epochs`. A trial of a few steps says how many epochs
            fit; the schedule is complete at the end of the last. None counts epochs.
        clock: The clock for `seconds`: "processor" adds up the seconds of all threads and ranks, which other programs
            on the machine change little if there is one thread; "wall" is right for a GPU.
        batch_size: The number of samples per batch, over all ranks.
        weight_optimizer: A function from parameter groups to the optimizer of the supernet's weights.
        architecture_optimizer: A function from parameters to the optimizer of alpha.
        scheduler: A function from (optimizer, total steps) to the learning-rate schedule of the weights, which is
            stepped in every iteration. None keeps the rate constant.
        strategy: "alternating" takes alpha's gradient from a new batch of the architecture split before each weight
            step (first-order DARTS). "simultaneous" uses one backward pass on the weights split for both.
        warmup_epochs: The number of epochs at the start in which only the weights learn.
        path_epochs: The number of epochs at the end in which the weights learn by random architectures, while alpha
            rests, with a learning-rate schedule of their own. Weights that only ever learned in mixtures judge
            architectures badly, and a few such epochs mend that. A method without architecture parameters draws
            architectures all the time, so that nothing changes for it.
        targets: Costs to aim for. A method that draws architectures draws within the band. The others, or all with
            architecture parameters if the band is None, limit the costs in expectation: the loss of alpha is charged
            for missing them.
        band: The least and the most that a drawn architecture costs, as shares of the tightest target. None draws from
            the whole space.
        order: The importance by which the units of every size are put in order before the search, if the space starts
            from a trained network: architectures keep the first ones. "magnitude" takes the weights, "taylor" the
            first-order change of the loss on a few batches. The largest network's outputs stay the same.
        order_layers: True lets a smaller depth drop the layers without which the largest network's loss rises least, on
            the same batches. False drops the last ones.
        stop: A rule that can end the search after an epoch past the warm-up, such as `EarlyStopping`. For a method
            without architecture parameters, it gets None for the current architecture.
        loss: A function of outputs and targets, `(B, classes)` and `(B,)`, or `(B, T, tokens)` and `(B, T)`. A
            cross-entropy is a mean over all targets of a batch that are not -100, in however many pieces it is. Another
            loss is averaged over the pieces as it is (see `training.losses.averages_targets`).
        recalibration_batches: The number of batches that set the statistics of batch norms for the architecture that is
            validated; 0 takes the supernet's, which are of all architectures together.
        seed: The seed of all random numbers.
        table: A function that is called once per epoch with the current architecture, if there is one. Its values,
            which are numbers, go to the history under names that it has for nothing else.
        computation: Precision, compilation, accumulation and clipping. Its fields are also options of their own.
        session: Device, workers, checkpoints, tracker and progress. Its fields are also options of their own.

    Raises:
        TangleNASError: An option is out of its range, the data do not fit the space, or the training diverged.
        Interrupted: The process was asked to stop, and the state is saved.
    """
    kinds = {"alternating": Search, "simultaneous": SimultaneousSearch}
    if strategy not in kinds:
        raise TangleNASError(f"search.strategy is {strategy!r}, expected 'alternating' or 'simultaneous'")
    if strategy == "simultaneous" and not optimizer.simultaneous:
        raise TangleNASError(
            f"search.strategy is 'simultaneous', but {optimizer.label} takes alpha's gradient in a step of its own: "
            "use 'alternating', or another optimizer"
        )
    return kinds[strategy](
        space,
        optimizer,
        data,
        epochs=epochs,
        seconds=seconds,
        clock=clock,
        batch_size=batch_size,
        weight_optimizer=weight_optimizer,
        architecture_optimizer=architecture_optimizer,
        scheduler=scheduler,
        warmup_epochs=warmup_epochs,
        path_epochs=path_epochs,
        targets=targets,
        band=band,
        order=order,
        order_layers=order_layers,
        stop=stop,
        loss=loss,
        recalibration_batches=recalibration_batches,
        seed=seed,
        table=table,
        computation=computation,
        session=session,
    ).result()


class Search(Training):
    """A search whose iterations take an architecture step and a weight step, each on its own batch.

    A method without architecture parameters takes only weight steps. The arguments are those of `search`.
    """

    def __init__(
        self,
        space: SearchSpace,
        optimizer: Optimizer,
        data: DataView,
        *,
        epochs: int,
        seconds: float | None,
        clock: Clock,
        batch_size: int,
        weight_optimizer: OptimizerFactory,
        architecture_optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        warmup_epochs: int,
        path_epochs: int,
        targets: Sequence[Target],
        band: tuple[float, float] | None,
        order: Order | None,
        order_layers: bool,
        stop: Stop | None,
        loss: Loss,
        recalibration_batches: int,
        seed: int,
        table: Table | None,
        computation: Computation,
        session: Session,
    ):
        seed = checked_seed("search.seed", seed)
        _check_options(space, optimizer, epochs if seconds is None else None, warmup_epochs, path_epochs, computation)
        if stop is not None:
            stop.check(space, optimizer)
            if path_epochs:
                raise TangleNASError(
                    f"search.stop may end the search before its {path_epochs} path epochs: leave one of the two out"
                )
        check_fit(space, data.weights, data.architecture, data.validation)
        self.space, self.optimizer, self.validation = space, optimizer, data.validation
        self.loss, self.seed, self.table, self.stop = checked_loss("search.loss", loss), seed, table, stop
        self._plain_loss, averages = is_cross_entropy(loss), averages_targets(loss)
        self.warmup_epochs, self.computation = warmup_epochs, computation
        self.path_epochs = path_epochs if optimizer.learns_architecture else 0
        self.device = session.find_device()
        self._last = learns_with_channels_last(space)
        self.pace = None if seconds is None else Pace(seconds, clock, self.device)
        self.precision, self.backend = computation.precise(self.device), computation.backend
        self.scaler = self.precision.scaler
        share = computation.share("search", batch_size)
        self._data, count = data, at_least("search.recalibration_batches", recalibration_batches, 0)
        space.to(self.device).train()
        for sentence in order_network(
            space, data.plain("weights"), units=order, layers=order_layers, loss=self.loss, averages=averages,
            batch_size=batch_size, seed=seed, device=self.device,
        ):  # fmt: skip
            session.note(f"search: {sentence}")
        distributed.synchronize([*space.parameters(), *space.buffers()])
        optimizer.bind(space, seed)
        self.targets, self.active_targets = targets, bind_targets(targets, space)
        draws = not optimizer.learns_architecture or (optimizer.draws_in_band and band)
        if self.active_targets and (draws or (self.path_epochs and band)):
            source = band_of(space, optimizer.label, self.active_targets, band)
            optimizer.draw_from(source)
            if not source.exact:
                session.note(f"search: {source.caveat()}")
        if draws:
            self.active_targets = []
        for target in targets:
            if target.objective.source:
                session.note(f"search: {target.objective.origin()}")
        splits = [data.weights, data.architecture] if self.takes_architecture_batches else [data.weights]
        self.streams = [
            Stream(split, batch_size, seed=2 * seed + number, num_workers=session.num_workers, part=share)
            for number, split in enumerate(splits)
        ]
        self._piece_loss = partial(PieceLoss, self.loss, averages=averages, ignoring=any(map(may_ignore, splits)))
        super().__init__("search", epochs, self.streams[0].batches_per_epoch, session)
        self.weights, self.alphas = list(space.parameters()), optimizer.parameters()
        self.parameters = [*self.weights, *self.alphas]
        self.statistics = running_statistics(space)
        self._schedule = scheduler
        self.weight_optimizer = call_factory("search.weight_optimizer", weight_optimizer, parameter_groups(space))
        self.architecture_optimizer: torch.optim.Optimizer | None = None
        if optimizer.learns_architecture:
            name = "search.architecture_optimizer"
            self.architecture_optimizer = call_factory(name, architecture_optimizer, self.alphas)
        self._first_options = [
            copy.deepcopy({name: option for name, option in group.items() if name != "params"})
            for group in self.weight_optimizer.param_groups
        ]
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        if self.pace is None:
            self._make_scheduler()
        self._statistics = statistics_inputs(space, data.plain("weights"), count, seed, self.device)
        self._iterators: list[Iterator[Batch]] = []
        self._one = torch.ones((), device=self.device)

    def _make_scheduler(self, phase: Phase = "search") -> None:
        """Make the schedule of the learning rate, for the mixtures or for the path epochs after them.

        Each begins with the options that the optimizer began with.
        """
        for group, options in zip(self.weight_optimizer.param_groups, self._first_options, strict=True):
            group.update(copy.deepcopy(options))
        self.schedule_start = self._first_path if phase == "path" else 0
        if self._schedule is not None:
            steps = self.steps - self._first_path if phase == "path" else self._first_path
            self.scheduler = make_scheduler("search.scheduler", self._schedule, self.weight_optimizer, steps)
        if phase == "search":
            made = {"weight_optimizer": self.weight_optimizer, "architecture_optimizer": self.architecture_optimizer}
            self.start(**{name: one for name, one in made.items() if one is not None})

    @property
    def _first_path(self) -> int:
        """The number of the first step of the path epochs."""
        return (self.epochs - self.path_epochs) * self.steps_per_epoch

    def _phase(self, position: int) -> Phase:
        """Return what a step does."""
        if position >= self._first_path:
            return "path"
        return "warm-up" if position < self.warmup_epochs * self.steps_per_epoch else "search"

    def _alpha_learns(self, phase: Phase) -> bool:
        return self.optimizer.learns_architecture and phase == "search"

    @property
    def takes_architecture_batches(self) -> bool:
        """True if alpha learns from batches of the architecture split."""
        return self.optimizer.learns_architecture

    def result(self) -> SearchResult:
        """Run the search and return its result."""
        ways = [self.precision.forward, *([] if self.backend is None else [Compiled(self.space, self.backend).forward])]
        try:
            with seeded(self.seed), executing(self.space, *ways):
                # A search that resumes has not loaded its checkpoint yet: these are the weights that it started from.
                before = largest_loss(self.space, self._data, self._statistics) if self._plain_loss else None
                history = self.run()
                network = self.optimizer.current() or self._stand_in
                trained = history[-1]["weight_loss"] if self._plain_loss else 0.0
                losses = split_losses(self.space, network, self._data, self._statistics, self._note, trained, before)
                if self._plain_loss and (warning := overfitted(history, self.optimizer.learns_architecture)):
                    self._note(warning)
        finally:
            self.space.release()
            self.space.superposition.channel_divisor = 1  # partial channels end with the search
        mixture = self.optimizer.expected()
        aims = {target.name: float(target.limit) for target in self.targets if target.limit is not None}
        units = {target.name: target.objective.unit for target in self.targets}
        return SearchResult(self.optimizer.current(), mixture and mixture.detach(), history, losses, aims, units)

    def _note(self, sentence: str) -> None:
        self.session.note(f"search: {sentence}")

    def prepare(self, saved: Mapping[str, Any] | None) -> None:
        """Fix the number of epochs of a search by seconds: that of the checkpoint, or what a trial says.

        If the checkpoint is from the path epochs, make their schedule first, so that its state can be loaded.
        """
        if self.pace is not None:
            self._plan(self.pace, saved)
            self._make_scheduler()
        position = 0 if saved is None else saved.get("position")
        if isinstance(position, int) and position > self._first_path:
            self._make_scheduler("path")

    def _plan(self, pace: Pace, saved: Mapping[str, Any] | None) -> None:
        """Set the number of epochs of a search by seconds."""
        if saved is None:
            with taken_back({name: part for name, part in self._parts().items() if part is not pace}):
                self._try_steps(pace)
            self._iterators.clear()  # the trial took batches from them
            self.session.note(
                f"search: {pace.seconds:g} {pace.clock} seconds are {pace.epochs} epochs of "
                f"{self.steps_per_epoch} steps. search.epochs = {pace.epochs} gives the same result again"
            )
        else:
            pace.load_state_dict(saved.get("pace"))
        self.epochs = pace.epochs

    def _try_steps(self, pace: Pace) -> None:
        """Take steps of each phase, validate once, and let the pace say how many epochs fit."""
        counts: dict[Phase, int] = {"warm-up": 0, "path": self.path_epochs}
        if self.architecture_optimizer is not None:
            counts["warm-up"] = self.warmup_epochs

        def step_time(phase: Phase, first: int) -> float:
            self._iterators.clear()
            return pace.measure(lambda number: self._step(first + number, phase))

        after = step_time("search", counts["warm-up"] * self.steps_per_epoch)
        fixed = {phase: step_time(phase, 0) if count else after for phase, count in counts.items()}
        validation = pace.measure(lambda _: self._measure_current(), untimed=0, timed=1)

        def epoch(step: float) -> float:
            return self.steps_per_epoch * step + validation

        pace.fit(epoch(after), [(f"{phase} epochs", count, epoch(fixed[phase])) for phase, count in counts.items()])

    def resumed(self, last: int) -> None:
        """Tell the optimizer the progress of the search. A search that resumes after its last step takes no step."""
        self._set_progress(last, self._phase(last))

    def _set_progress(self, position: int, phase: Phase) -> None:
        last = max(1, self.epochs - self.path_epochs - 1)
        self.optimizer.set_progress(min(1.0, position // self.steps_per_epoch / last))
        state = self.space.superposition
        if phase == "path":
            state.channel_divisor = 1  # architectures have all of their channels
        state.trained_divisor = state.channel_divisor

    def stateful(self) -> Mapping[str, Stateful | None]:
        return {
            "pace": self.pace,
            "space": self.space,
            "optimizer": self.optimizer,
            "weight_optimizer": self.weight_optimizer,
            "architecture_optimizer": self.architecture_optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler if self.scaler.is_enabled() else None,
            **{f"target_{one.name}": one for one in self.active_targets if one.multiplier is not None},
        }

    # One iteration.

    def step(self, position: int) -> dict[str, Summand]:
        if position == self._first_path:
            self._make_scheduler("path")
        return self._step(position, self._phase(position))

    def _step(self, position: int, phase: Phase) -> dict[str, Summand]:
        pieces, loss = self._next_pieces(position, phase)
        measured = self.update(pieces, phase)
        self.scaler.update()
        if self.scheduler is not None:
            with stepping("search.scheduler", SCHEDULE):
                self.scheduler.step()
        seen = [loss.accuracy(piece.outputs, piece.weight_batch[1]) for piece in pieces if piece.outputs is not None]
        if seen:
            measured["weight_accuracy"] = torch.stack(seen).mean()
        return loss.weigh(measured, ("weight_loss", "architecture_loss"), "weight_accuracy")

    def update(self, pieces: Sequence[Step], phase: Phase) -> dict[str, Tensor]:
        """Take an architecture step, if alpha learns in this phase, and then a weight step."""
        self._zero_gradients()  # before the architecture step, which then has the memory of the weights' gradients
        measured = self.architecture_step(pieces) if self._alpha_learns(phase) else {}
        return {**measured, **self.weight_step(pieces, phase)}

    def architecture_step(self, pieces: Sequence[Step]) -> dict[str, Tensor]:
        """Move alpha by its mean gradient over the pieces of a batch and the ranks, plus that of the targets."""
        losses, gradients = [], []
        for piece in pieces:
            losses.append(self.optimizer.architecture_backward(piece))
            gradients.append([alpha.grad for alpha in self.alphas])
        for alpha, *parts in zip(self.alphas, *gradients, strict=True):
            alpha.grad = sum(parts[1:], parts[0]) / len(parts)
        distributed.average(alpha.grad for alpha in self.alphas)
        return {"architecture_loss": torch.stack(losses).mean(), **self._move_alphas()}

    def weight_step(self, pieces: Sequence[Step], phase: Phase, learning: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """Move the weights by their mean gradient over the pieces of a batch and over the ranks.

        Args:
            pieces: The pieces of the batch.
            phase: What the step does.
            learning: Further tensors that get a gradient from the same backward pass.
        """
        total = torch.zeros((), device=self.device)
        losses = self.optimizer.path_losses if phase == "path" else self.optimizer.weight_losses
        for piece in pieces:
            terms = torch.zeros((), device=self.device)
            for term in losses(piece):
                torch.autograd.backward(self.scaler.scale(term / len(pieces)))
                terms += term.detach()
            # Terms that are not finite are reported in any case: the training diverged.
            reported = terms if piece.reported is None else torch.where(terms.isfinite(), piece.reported, terms)
            total += reported / len(pieces)
        # Running statistics are means over batches. Averaged in every step, they are means over all ranks' batches.
        distributed.average([*(tensor.grad for tensor in (*self.weights, *learning)), *self.statistics])
        self.scaler.unscale_(self.weight_optimizer)
        if self.computation.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.weights, self.computation.clip)
        with stepping("search.weight_optimizer"):
            self.scaler.step(self.weight_optimizer)
        return {"weight_loss": total}

    def _move_alphas(self, penalty: Tensor | None = None) -> dict[str, Tensor]:
        """Step alpha's optimizer with the gradients of a penalty and of the targets added; return the charges."""
        assert self.architecture_optimizer is not None
        self.scaler.unscale_(self.architecture_optimizer)
        if penalty is not None:
            torch.autograd.backward(penalty)
        charges = self._charge_targets()
        with stepping("search.architecture_optimizer"):
            self.scaler.step(self.architecture_optimizer)
        return charges

    def _charge_targets(self) -> dict[str, Tensor]:
        """Add the gradients of the targets' charges to those of alpha, and return the charges."""
        if not self.active_targets:
            return {}
        mixture = self.optimizer.expected()
        assert mixture is not None
        charges = {f"penalty_{target.name}": target.charge(mixture) for target in self.active_targets}
        multipliers = {
            f"multiplier_{one.name}": one.multiplier for one in self.active_targets if one.multiplier is not None
        }
        total = torch.stack(list(charges.values())).sum()
        gradients = torch.autograd.grad(total, self.alphas, allow_unused=True)
        for alpha, gradient in zip(self.alphas, gradients, strict=True):
            if gradient is not None:
                alpha.grad = gradient if alpha.grad is None else alpha.grad + gradient
        return {**charges, **multipliers}

    def _zero_gradients(self) -> None:
        self.weight_optimizer.zero_grad()
        if self.architecture_optimizer is not None:
            self.architecture_optimizer.zero_grad()

    def _next_pieces(self, position: int, phase: Phase) -> tuple[list[Step], PieceLoss]:
        """Return the next batches, cut into the pieces that are accumulated, and the loss of these."""
        if position % self.steps_per_epoch == 0:
            self._set_progress(position, phase)
        if not self._iterators:  # a resumed search starts its streams where it left off
            self._iterators.extend(stream.start(position) for stream in self.streams)
        count = self.computation.accumulate
        taken = (to_device(next(iterator), self.device, self._last) for iterator in self._iterators)
        batches = [[tensor.chunk(count) for tensor in batch] for batch in taken]
        loss = self._piece_loss([targets for _, targets in batches])
        weight_batches, *others = [list(zip(*batch, strict=True)) for batch in batches]
        steps = [
            Step(
                index=position,
                space=self.space,
                loss=loss,
                weight_batch=weight_batches[number],
                architecture_batch=others[0][number] if others else None,
                weight_optimizer=self.weight_optimizer,
                scale=self.scaler.scale(self._one),
                mean=loss.mean,
                progress=min(1.0, position / max(1, self._first_path)),
            )
            for number in range(count)
        ]
        return steps, loss

    # The end of an epoch.

    def end_epoch(self, epoch: int, means: Record) -> Record:
        current, found = self._measure_current()
        record: Record = {
            **means,
            "validation_accuracy": found.accuracy,
            "validation_loss": found.loss,
            **self.optimizer.schedules(),
        }
        mixture = self.optimizer.expected()
        if mixture is not None and current is not None:
            record |= self._current_record(mixture.detach(), current)
            if self.table is not None:
                record |= table_values(self.table, current, {*record, "epoch", "stopped"})
        if self.stop is not None and epoch > self.warmup_epochs and (reason := self.stop(current, record)):
            record["stopped"] = reason
            self.session.note(f"search: stopped after epoch {epoch} of {self.epochs}: {reason}")
        return record

    def _measure_current(self) -> tuple[Architecture | None, Measured]:
        """Measure the current architecture as discretize does, or one that stands for all where there is none."""
        current = self.optimizer.current()
        network = current or self._stand_in
        return current, measure_inherited(self.space, network, self.validation, self._statistics, together=True)

    @cached_property
    def _stand_in(self) -> Architecture:
        """The network that is validated where no architecture is the current one.

        It is the largest of the space, or a random one of the band: beyond the band, weights do not learn.
        """
        source = self.optimizer.source
        if source is self.space:
            return self.space.largest()
        return source.sample(torch.Generator().manual_seed(self.optimizer.derive_seed(-1, "validation")))

    def inputs(self, position: int) -> list[Tensor]:
        return [stream.batch(position)[0] for stream in self.streams]

    def record_like(self) -> Record:
        like: Record = {"weight_loss": 0.0, "validation_accuracy": 0.0, "validation_loss": math.nan}
        like |= self.optimizer.schedules()
        mixture, current = self.optimizer.expected(), self.optimizer.current()
        if mixture is not None and current is not None:
            like |= self._current_record(mixture.detach(), current)
        like |= {"stopped": ""} if self.stop else {}
        return {name: float(value) if isinstance(value, int) else value for name, value in like.items()}

    def _current_record(self, mixture: Mixture, current: Architecture) -> Record:
        """Return the part of the record about the mixture and the current architecture."""
        expected, cost = self.space.expected_cost(mixture), self.space.cost(current)
        record: Record = {
            "entropy": mixture.entropy(),
            "expected_params": float(expected.params),
            "expected_macs": float(expected.macs),
            "params": cost.params,
            "macs": cost.macs,
            "digest": current.digest,
            "architecture": str(current),
            "mixture": {name: mixture[name].tolist() for name in mixture},
        }
        for target in self.targets:
            record.setdefault(f"expected_{target.name}", float(target.objective.expected(mixture)))
            record.setdefault(target.name, target.objective.cost(current))
        return record

    def describe(self, record: Record) -> str:
        train = f"  train {record['weight_accuracy']:.1f} %" if "weight_accuracy" in record else ""
        stand_in = "largest network" if self.optimizer.source is self.space else "a network of the band"
        what = record.get("architecture", f"({stand_in})")
        return f"loss {record['weight_loss']:.3f}{train}  valid {record['validation_accuracy']:.1f} %  {what}"


class SimultaneousSearch(Search):
    """A search in which one backward pass on the weights split serves the weights and alpha."""

    @property
    def takes_architecture_batches(self) -> bool:
        return False

    def update(self, pieces: Sequence[Step], phase: Phase) -> dict[str, Tensor]:
        """Move the weights, and also alpha if it learns in this phase."""
        self._zero_gradients()
        learns = self._alpha_learns(phase)
        measured = self.weight_step(pieces, phase, self.alphas if learns else ())
        return {**measured, **self._move_alphas(self.optimizer.regularizer())} if learns else measured


def _check_options(
    space: SearchSpace,
    optimizer: Optimizer,
    epochs: int | None,
    warmup_epochs: int,
    path_epochs: int,
    computation: Computation,
) -> None:
    """Check options against each other. A search by seconds has no number of epochs yet."""
    others = at_least("search.warmup_epochs", warmup_epochs, 0) + at_least("search.path_epochs", path_epochs, 0)
    if epochs is not None and others >= at_least("search.epochs", epochs, 1) and optimizer.learns_architecture:
        given = f"search.warmup_epochs is {warmup_epochs}" + f", search.path_epochs {path_epochs}" * bool(path_epochs)
        raise TangleNASError(
            f"{given} and search.epochs {epochs}, so alpha would learn in no epoch: lower the first, or raise the last"
        )
    if not space.rows:
        raise TangleNASError(f"the space {space.label} has no choices: there is nothing to search")
    if at_least("search.accumulate", computation.accumulate, 1) > 1 and not optimizer.accumulates:
        raise TangleNASError(
            f"search.accumulate is {computation.accumulate}, but {optimizer.label} takes alpha's gradient from a "
            "whole batch: leave it out, and use a smaller batch_size"
        )
