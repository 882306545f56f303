"""The evaluate stage: it measures the final network on data that was never used to make it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from tanglenas_engine.data import DataView
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.devices import device_of
from tanglenas_engine.runtime.progress import Progress
from tanglenas_engine.runtime.seeding import checked_seed
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.runtime.weights import load_state
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.cost import Cost
from tanglenas_engine.spaces.fit import check_fit
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.training.measure import measure

MAX_ASSIGNMENTS = 10**6
"""The largest number of assignments of a space that are listed one by one."""


@dataclass(frozen=True)
class EvaluateResult:
    """The test accuracy in %, the mean cross-entropy in nats, the number of test samples, and the network's cost.

    Costs are in parameters and in multiply-accumulates for one input.

    Attributes:
        cost: The cost of the network.
        largest, smallest: The costs of the largest and of the smallest network of the space, to compare it with.
        confusion: The number of test samples for each class (row) and each output of the network (column); None for
            data without labels, such as text.
    """

    test_accuracy: float
    test_loss: float
    samples: int
    cost: Cost
    largest: Cost
    smallest: Cost
    confusion: tuple[tuple[int, ...], ...] | None = None


def evaluate(
    space: SearchSpace,
    architecture: Architecture,
    network: nn.Module,
    data: DataView,
    *,
    batch_size: int = 256,
    device: str | None = None,
) -> EvaluateResult:
    """Measure a standalone network of `architecture` on the `test` split of `data`. The ranks share the split.

    Raises:
        TangleNASError: The data do not fit the space, or the architecture is of another space.
    """
    check_fit(space, data.test)
    network = network.to(device_of(device))
    predicted: list[Tensor] = []
    widths = {0}

    def watch(module: nn.Module, inputs: object, outputs: Tensor) -> None:
        predicted.append(outputs.argmax(-1))
        widths.add(outputs.shape[-1])

    labels = data.test.labels
    if labels is not None and labels.dim() != 1:  # a sample with several targets is of no one class
        labels = None
    hook = None if labels is None else network.register_forward_hook(watch)
    try:
        found = measure(network, data.test, batch_size, together=True)
    finally:
        if hook is not None:
            hook.remove()
    confusion = None if labels is None else _confusion(labels, predicted, max(widths))
    return EvaluateResult(
        found.accuracy,
        found.loss,
        len(data.test),
        cost=space.cost(architecture),
        largest=space.cost(space.largest()),
        smallest=space.cost(space.smallest()),
        confusion=confusion,
    )


def _confusion(labels: Tensor, predicted: Sequence[Tensor], width: int) -> tuple[tuple[int, ...], ...]:
    """Count the samples of all ranks for each class and each of the network's outputs.

    Args:
        labels: The classes of all samples, shape (N,).
        predicted: The outputs that this rank's batches of `measure` predicted, each of shape (B,).
        width: The number of outputs, or 0 on a rank without a batch.
    """
    total, ranks = distributed.sum_over_ranks([float(width), float(width > 0)])
    outputs = round(total / ranks)
    own = labels[distributed.rank() :: distributed.world_size()].long()  # a product of uint8 would overflow
    found = torch.cat([own.new_empty(0), *(part.cpu() for part in predicted)])
    counts = torch.bincount(own * outputs + found, minlength=outputs * outputs)
    summed = distributed.sum_over_ranks([float(count) for count in counts.tolist()])
    return tuple(
        tuple(round(count) for count in summed[start : start + outputs]) for start in range(0, outputs**2, outputs)
    )


@dataclass(frozen=True)
class RankCorrelation:
    """The agreement between the ranks of architectures by a supernet and by a table.

    Attributes:
        kendall_tau: Kendall's tau: 1 for the same order, -1 for the reverse order, nan if either ranks all alike.
        spearman: Spearman's correlation, with the same range.
        baselines: Spearman's correlation of the table with what takes no search: `params` and `macs`, by which larger
            networks are the better ones, and `before_search`, the supernet's loss with its weights before the search.
        rows: One record per architecture: digest, supernet loss and accuracy in %, the loss before the search, costs,
            table value and rank, and choices.
    """

    kendall_tau: float
    spearman: float
    baselines: dict[str, float]
    rows: list[Record]


def rank_correlation(
    space: SearchSpace,
    data: DataView,
    table: Callable[[Architecture], Mapping[str, float]] | None,
    *,
    listed: Sequence[Architecture] | None = None,
    architectures: int | Literal["all"] | None = None,
    before: Mapping[str, Tensor] | None = None,
    recalibration_batches: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    device: str | None = None,
    checkpoints: CheckpointFolder | None = None,
    progress: Progress | None = None,
) -> RankCorrelation | None:
    """Compare the losses of architectures in a supernet with a benchmark table. Losses that are not finite are last.

    The losses are computed as for derivation. Without `listed` and `architectures` the function returns None.

    Args:
        space: The supernet with its trained weights. Its state is restored.
        data: A view of `weights` (for the statistics of batch norms) and `architecture` (for accuracies).
        table: A function from an architecture to the benchmark's `table_value` and `table_rank`, which is 1 for the
            best, or to nothing where the benchmark lacks it. Such an architecture is left out.
        listed: The architectures of a table that lacks most of the space. No others are compared.
        architectures: The number of random architectures to compare, or "all". None skips the comparison, or compares
            all that are listed.
        before: The state of the supernet before the search, whose ranking is a baseline. An untrained supernet may rank
            as well as a trained one, where a simple property of networks decides. None leaves the baseline out.
        recalibration_batches: The number of batches that set the statistics of batch norms for each architecture. 0
            keeps the supernet's statistics.
        batch_size: The number of samples per batch.
        seed: The seed of the random architectures and batches.
        device: A name such as "cpu". None takes CUDA if there is one.
        checkpoints: The folder for the scores of an interrupted comparison, as in `discretize`.
        progress: The progress output for a person.

    Raises:
        TangleNASError: There is no table, it lists fewer than 2 of the architectures, "all" are more than can be
            listed, or `before` is of another network.
    """
    if listed is not None and architectures in (None, "all"):
        architectures = len(listed)
    if architectures is None:
        return None
    if architectures != "all":
        at_least("rank_correlation.architectures", architectures, 2)
    at_least("rank_correlation.recalibration_batches", recalibration_batches, 0)
    seed = checked_seed("rank_correlation.seed", seed)
    if table is None:
        raise TangleNASError(
            f"rank_correlation.architectures is {architectures!r}, but there is no table to compare with: set "
            "benchmark.path, or leave rank_correlation.architectures out"
        )
    from tanglenas_engine.tables import rank_correlations

    check_fit(space, data.architecture)
    target = device_of(device)
    space.to(target)
    if before is not None:
        with _state(space, before):
            pass  # an error is told before the comparison
    every = architectures == "all" or architectures >= space.size
    judging = partial(
        Candidates,
        space,
        data.plain("weights"),
        data.plain("architecture"),
        limit=space.size if architectures == "all" else architectures,
        recalibration_batches=recalibration_batches,
        batch_size=batch_size,
        seed=seed,
        device=target,
        tells_best=False,
        progress=progress,
    )
    with judging(label="rank correlation", checkpoints=checkpoints) as candidates:
        if listed is not None:
            drawn = _some(listed, candidates.limit, seed)
        else:
            drawn = _all_architectures(space) if every else candidates.fresh(candidates.limit)
        looked_up = [(architecture, row) for architecture in drawn if (row := table(architecture))]
        compared, known = [architecture for architecture, _ in looked_up], [row for _, row in looked_up]
        if len(compared) < 2:
            raise TangleNASError(
                f"rank_correlation.architectures is {architectures!r}, but the table lists {len(compared)} of the "
                f"{len(drawn)} architectures that were drawn, expected 2 or more: "
                + ("" if every else "raise rank_correlation.architectures, or set it to 'all', or ")
                + "set benchmark.path to a table with more of them"
            )
        scored = candidates.judge(compared, on="all samples")
    untrained: list[Record] = [{} for _ in scored]
    if before is not None:
        with _state(space, before), judging(label="rank correlation before the search") as candidates:
            untrained = [{"loss_before_search": row["loss"]} for row in candidates.judge(compared, on="all samples")]
    rows = [
        {key: row[key] for key in ("digest", "loss", "accuracy")}
        | first
        | {key: row[key] for key in ("params", "macs")}
        | {key: value[key] for key in ("table_value", "table_rank")}
        | {"architecture": str(row["architecture"])}
        for row, first, value in zip(scored, untrained, known, strict=True)
    ]

    if (lost := sum(not math.isfinite(row["loss"]) for row in rows)) and progress is not None:
        progress.note(
            f"rank correlation: the loss of {lost} of {len(rows)} architectures is not finite in the supernet: they "
            "are its worst"
        )

    def agreement(measure: str, sign: int) -> dict[str, float]:
        values = [row[measure] if math.isfinite(row[measure]) else math.inf for row in rows]
        # Ranks are compared, as some tables' metrics are better high and others low. The lowest rank is the best.
        return rank_correlations([sign * value for value in values], [-row["table_rank"] for row in rows])

    baselines = {name: agreement(name, 1)["spearman"] for name in ("params", "macs")}
    if before is not None:
        baselines["before_search"] = agreement("loss_before_search", -1)["spearman"]
    return RankCorrelation(**agreement("loss", -1), baselines=baselines, rows=rows)


@contextmanager
def _state(network: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a network other weights and statistics inside the block.

    Raises:
        TangleNASError: They are of another network.
    """
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        load_state(network, state, "rank_correlation.before")
        yield
    finally:
        network.load_state_dict(own)


def _some(listed: Sequence[Architecture], count: int, seed: int) -> list[Architecture]:
    """Return so many of the architectures, or all if they are fewer, in their order; the seed decides which."""
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(seed)).tolist()
    return [listed[i] for i in sorted(order[:count])]


def _all_architectures(space: SearchSpace) -> list[Architecture]:
    """Return all architectures of a space."""
    if math.prod(map(len, space.decisions())) > MAX_ASSIGNMENTS:
        raise TangleNASError(
            f"{space.label} has {space.size:,} architectures, too many to go through: set "
            "rank_correlation.architectures to a number, such as 200"
        )
    return list(space.all_architectures())
