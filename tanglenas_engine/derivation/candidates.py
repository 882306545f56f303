"""Candidates: architectures within a budget, judged with the weights of a trained supernet, each once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Self

import torch

from tanglenas_engine.data import Samples, TensorSamples, batches
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.devices import device_of
from tanglenas_engine.runtime.progress import Progress, SilentProgress
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.training.measure import measure_inherited, statistics_inputs

HELD_BYTES = 2**30
"""Bytes of a split up to which it stays on the device from one candidate to the next."""

SAVE_SECONDS = 30.0
"""Seconds between checkpoints of what was judged."""

PROPOSALS_PER_CANDIDATE = 20
"""Proposals for each new candidate asked for, before a space counts as exhausted."""


class Candidates:
    """Draws architectures, and judges them with a supernet's weights.

        with Candidates(space, data.weights, data.architecture) as candidates:
            candidates.judge(candidates.fresh(100))
        candidates.rows

    Inside the block the supernet is in this object's hands; behind it, the space is released and in the mode and with
    the statistics that it had. Data are fetched once, no network is built, and everything follows from the seed: what
    an architecture is worth depends on no other candidate. Several ranks draw the same and share the judging.

    Args:
        space: The supernet with its trained weights.
        statistics: Samples that set the statistics of batch norms anew for each candidate.
        samples: What candidates are judged on.
        budget: The limits that every candidate keeps to; None for none.
        objectives: Bound to the space, for costs that are not of `cost.METRICS`; rows have them too.
        cost: What a front trades against accuracy: one of `cost.METRICS`, or the name of an objective.
        limit: How many there may be.
        prior: The mixture to draw from; None draws every row uniformly.
        recalibration_batches: Batches for the statistics; 0 keeps the supernet's.
        checkpoints: Where to keep what was judged. If another run left something there, it is not judged again.

    Attributes:
        rows: One per architecture judged, in this order: digest, accuracy in %, cost, generation and architecture.
    """

    def __init__(
        self,
        space: SearchSpace,
        statistics: Samples,
        samples: Samples,
        *,
        budget: Budget | None = None,
        objectives: Sequence[Objective] = (),
        cost: str = "params",
        limit: int = 100,
        prior: Mixture | None = None,
        recalibration_batches: int = 8,
        batch_size: int = 256,
        seed: int = 0,
        device: torch.device | None = None,
        label: str = "discretize",
        checkpoints: CheckpointFolder | None = None,
        progress: Progress | None = None,
    ):
        self.space, self.prior, self.cost, self.seed = space, prior, cost, seed
        self.budget = Budget(space, {}) if budget is None else budget
        self.objectives = tuple(objectives)
        self.limit = min(limit, space.size)
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: list[Record] = []
        self._device = device_of(None) if device is None else device
        self._batch_size = batch_size
        self._samples = held(samples, batch_size, self._device)
        self._statistics = statistics_inputs(space, statistics, recalibration_batches, seed, self._device, batch_size)
        self._label, self._checkpoints, self._progress = label, checkpoints, progress or SilentProgress()
        self._drawn: set[str] = set()
        self._judged: dict[str, Record] = {}
        self._generation, self._done, self._best = 0, 0, 0.0
        self._known: dict[str, float] = {}
        self._saved = time.monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        state = distributed.broadcast(self._checkpoints.load() if self._checkpoints else None)
        if state is not None:
            self._known = state["accuracies"]
            self._progress.note(f"{self._label}: {len(self._known)} candidates were judged before")
        self.space.to(self._device)
        self._stack.enter_context(self.space.release().as_largest())
        self._stack.enter_context(seeded(self.seed))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stack.close()
        if kind is not None and self._known:
            self._save()

    # Drawing.

    def sample(self) -> Architecture:
        """A random architecture of the space, within the budget or not: of the prior, where there is one.

        Noise from Gumbel's distribution on log-probabilities makes the most probable option of a row a sample of that
        row, whatever else the space asks of its most probable architecture.
        """
        if self.prior is None:
            return self.space.sample(self.generator)
        stacks = {}
        for count, stack in self.prior.detach().stacks.items():
            exponential = torch.empty(stack.shape).exponential_(generator=self.generator).to(stack)
            stacks[count] = stack / exponential.clamp_min(1e-30)  # exp(log p + Gumbel noise)
        return self.space.most_probable(self.space.mixture(stacks))

    def first(self, count: int) -> list[Architecture]:
        """New candidates to begin with: drawn ones, after the prior's most probable within the budget."""
        if self.prior is None:
            return self.fresh(count)
        likely = self.budget.project(self.prior).architecture
        return [*self.fresh(1, lambda: likely), *self.fresh(count - 1)]

    def fresh(self, count: int, propose: Callable[[], Architecture] | None = None) -> list[Architecture]:
        """Up to `count` architectures within the budget that were never drawn before; fewer where none are left.

        Args:
            propose: Gives architectures, which are brought into the budget; by default `draw`.
        """
        found: list[Architecture] = []
        count = min(count, self.limit - len(self._drawn))
        for _ in range(PROPOSALS_PER_CANDIDATE * count):
            if len(found) == count:
                break
            architecture = self.budget.shrink((propose or self.sample)(), self.generator)
            if architecture.digest not in self._drawn:
                self._drawn.add(architecture.digest)
                found.append(architecture)
        return found

    # Judging.

    def judge(self, architectures: Sequence[Architecture], total: int | None = None) -> list[Record]:
        """A row for each of these architectures, which are one generation; those judged before are not judged again.

        Args:
            total: How many there will be in all generations, for the progress line.
        """
        if not self.rows:
            self._total = len(architectures) if total is None else total
            self._line = self._stack.enter_context(self._progress.stage(self._label, self._total, 0))
        new = list({one.digest: one for one in architectures if one.digest not in self._judged}.values())
        accuracies = distributed.map_over_ranks(self._accuracy, new)
        for architecture, accuracy in zip(new, accuracies, strict=True):
            self._known[architecture.digest] = accuracy
            self._judged[architecture.digest] = {
                "digest": architecture.digest,
                "accuracy": accuracy,
                **asdict(self.space.cost(architecture)),
                **{objective.name: objective.cost(architecture) for objective in self.objectives},
                "generation": self._generation,
                "architecture": architecture,
            }
            self.rows.append(self._judged[architecture.digest])
        self._generation += 1
        return [self._judged[architecture.digest] for architecture in architectures]

    def best(self, count: int = 1, since: int = 0) -> list[Record]:
        """The most accurate rows, of generation `since` or later; the first found wins a tie."""
        rows = [row for row in self.rows if row["generation"] >= since]
        return sorted(rows, key=lambda row: -row["accuracy"])[:count]

    def measured(self, architecture: Architecture, samples: Samples) -> float:
        """Accuracy in % on samples, with the supernet's weights and batch norms that fit this architecture."""
        return measure_inherited(self.space, architecture, samples, self._statistics, self._batch_size).accuracy

    def _accuracy(self, architecture: Architecture) -> float:
        if architecture.digest not in self._known:
            self._known[architecture.digest] = self.measured(architecture, self._samples)
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self._save()
        accuracy = self._known[architecture.digest]
        self._best = max(self._best, accuracy)
        for _ in range(min(distributed.world_size(), self._total - self._done)):  # other ranks are as far
            self._done += 1
            self._line.advance()
        self._line.epoch(self._done, self._total, f"best {self._best:.1f} %")
        return accuracy

    def _save(self) -> None:
        if self._checkpoints:
            self._checkpoints.save({"accuracies": self._known})
        self._saved = time.monotonic()


def held(samples: Samples, batch_size: int, device: torch.device) -> Samples:
    """The samples on a device, so that going through them again fetches nothing; as they are if they are too many."""
    stream = batches(samples, batch_size)
    first = next(stream)
    if sum(tensor.nbytes for tensor in first) / len(first[0]) * len(samples) > HELD_BYTES:
        return samples
    inputs, targets = zip(first, *stream, strict=True)
    return TensorSamples(torch.cat(inputs).to(device), torch.cat(targets).to(device))
