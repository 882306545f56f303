"""Superposition: masks that are the expectation over architectures.

A mixture gives every row of choices a distribution over its options. The expected zero-padded slice of a weight
`W` is `W * M`, where `M` holds for every entry the probability that it is in use (the paper's Algorithm 1 sums
the padded slices one by one; for any number of choices that sum is this mask).

Dimensions that share no row of choices are independent: each has its own *coverage* `P(size > i)`, and `M` is
their outer product. Dimensions that share rows are covered jointly: given the shared options `e` they are
independent again, so `M = sum_e p(e) * outer(coverage given e, ...)`, one small matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tanglenas_engine.errors import unknown
from tanglenas_engine.superposition.size import Assignment, Axis, Row, Size, combinations

COVERED: dict[str, frozenset[str]] = {
    # Algorithm 1 on every weight, heads once (where they are read), LayerNorm over the covered width.
    "exact": frozenset({"read", "write", "statistics", "value", "group"}),
    # Each width where it is read and nowhere else, by its own coverage.
    "gated": frozenset({"read", "statistics", "value", "group"}),
    # The authors' semantics: Algorithm 1 at every read and write, heads three times, LayerNorm over all.
    "paper": frozenset({"read", "write", "unit", "again", "value"}),
}
"""Which roles of a dimension a mixture covers, for each relaxation: the one place that decides it."""

EDGES = "edges"
"""Under which name a file of mixing weights has those of edges, one number for each."""


class Factor(NamedTuple):
    """A factor of a parameter's mask, which broadcasts against the parameter.

    Rows of a weight that every architecture uses together, or not at all, are a band, and have one row in `mask`:
    row i stands for the next `bands[i]` rows of the weight. Without `bands` nothing is left out.
    """

    mask: Tensor
    bands: tuple[int, ...] | None = None
    windows: tuple[int, ...] | None = None
    """The kernel sizes, ascending, of a factor over a kernel alone: it is constant on what each adds to the last."""

    def whole(self) -> Tensor:
        """The factor with all rows."""
        return self.mask if self.bands is None else expanded(self.mask, self.bands)


def expanded(mask: Tensor, bands: Sequence[int]) -> Tensor:
    """Row i of `mask` repeated `bands[i]` times."""
    if len(bands) == 1:
        return mask.expand(bands[0], *mask.shape[1:])
    return torch.cat([row.expand(n, *row.shape[1:]) for row, n in zip(torch.split(mask, 1), bands, strict=True)])


class Mixture(Mapping[str, Tensor]):
    """Weights on the simplex for every choice: `(options,)`, or `(layers, options)` for a choice per layer.

    They are stored stacked, all rows with K options in one `(rows, K)` tensor, so that sampling and masking
    take the same few operations however many choices there are.

    Attributes:
        edges: In a cell space, what multiplies the output of the edges with these rows (edge normalization).
        kept: Of rows that have been pruned, the positions of the options left: the others have weight 0, and an
            operation that stands for none but those is not computed.
    """

    def __init__(self, rows: Mapping[str, tuple[Row, ...]], stacks: Mapping[int, Tensor]):
        self._rows = rows
        self.stacks = dict(stacks)
        self.edges: dict[Row, Tensor] = {}
        self.kept: dict[Row, frozenset[int]] = {}

    def __getitem__(self, name: str) -> Tensor:
        rows = self._rows[name]
        weights = self.stacks[len(rows[0].options)][rows[0].slot : rows[0].slot + len(rows)]
        return weights[0] if rows[0].layer is None else weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def superposition(self) -> Superposition:
        """The state of the space whose choices these are."""
        return superposition_of(next(iter(self._rows.values()))[0])

    def tensors(self) -> dict[str, Tensor]:
        """All there is to save: the weights by choice and, if there are any, those of edges."""
        return {**self, **({EDGES: torch.stack(list(self.edges.values()))} if self.edges else {})}

    def detach(self) -> Mixture:
        """The same weights as constants."""
        mixture = Mixture(self._rows, {count: stack.detach() for count, stack in self.stacks.items()})
        mixture.edges, mixture.kept = {row: weight.detach() for row, weight in self.edges.items()}, self.kept
        return mixture

    def joint(self, rows: Sequence[Row], slots: Tensor) -> Tensor:
        """Probabilities of the combinations of `rows`, `(instances, combinations)`; `slots` is `(instances, rows)`."""
        weights: Tensor | None = None
        for position, row in enumerate(rows):
            one = self.stacks[len(row.options)][slots[:, position]]  # (instances, K)
            weights = one if weights is None else (weights[:, :, None] * one[:, None, :]).flatten(1)
        return next(iter(self.stacks.values())).new_ones(len(slots), 1) if weights is None else weights


class _Cover:
    """The mask of a few axes that share rows, as tables from which a mixture makes it."""

    def __init__(self, axes: Sequence[Axis], conditional: bool, banded: bool):
        # A kernel that may be absent is superposed given that it is there; its operation knows how probable that is.
        self.conditional = conditional and all(axis.layout == "window" and axis.size.min == 0 for axis in axes)
        counts: dict[Row, int] = {}
        for axis in axes:
            for row in axis.size.rows:
                counts[row] = counts.get(row, 0) + 1
        self.shared = [row for row, count in counts.items() if count > 1]
        self.private = [[row for row in axis.size.rows if counts[row] == 1] for axis in axes]
        # One (shared combinations, private combinations, length) table per axis.
        self.tables = [
            torch.tensor(
                [[axis.used({**given, **own}) for own in combinations(private)] for given in combinations(self.shared)]
            )
            for axis, private in zip(axes, self.private, strict=True)
        ]
        self.rows = [*self.shared, *(row for private in self.private for row in private)]
        self.bands: tuple[int, ...] | None = None
        self.windows: tuple[int, ...] | None = None
        if all(axis.layout == "window" for axis in axes):
            self.windows = tuple(sorted({int(size) for size in axes[0].size.values if size}))
        if banded:
            self.tables[0], self.bands = _in_bands(self.tables[0])
        self.signature = (
            self.conditional,
            self.bands,
            tuple(len(row.options) for row in self.shared),
            tuple(tuple(len(row.options) for row in private) for private in self.private),
            tuple((tuple(table.shape), table.numpy().tobytes()) for table in self.tables),
        )


class _Batch:
    """Covers with equal tables and different rows, whose masks are computed in one go."""

    def __init__(self, covers: Sequence[_Cover]):
        self.cover = covers[0]
        self._slots = torch.tensor([[row.slot for row in cover.rows] for cover in covers]).reshape(len(covers), -1)
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, list[Tensor]]] = {}

    def masks(self, mixture: Mixture) -> tuple[Tensor, ...]:
        """One mask per cover, with one dimension per axis."""
        like = next(iter(mixture.stacks.values()))
        if (like.dtype, like.device) not in self._cast:
            self._cast[like.dtype, like.device] = (
                self._slots.to(like.device),
                [table.to(like) for table in self.cover.tables],
            )
        slots, tables = self._cast[like.dtype, like.device]
        start = len(self.cover.shared)
        operands: list[Any] = [mixture.joint(self.cover.shared, slots[:, :start]), [0, 1]]
        for axis, (table, private) in enumerate(zip(tables, self.cover.private, strict=True)):
            if private:
                weights = mixture.joint(private, slots[:, start : start + len(private)])
                # (instances, shared, length): the axis' coverage given the shared options.
                operands += [torch.einsum("lp,spn->lsn", weights, table), [0, 1, 2 + axis]]
            else:
                operands += [table[:, 0], [1, 2 + axis]]
            start += len(private)
        mask: Tensor = torch.einsum(*operands, [0, *range(2, 2 + len(tables))])
        if self.cover.conditional:
            # Every kernel covers the centre: the mask there is the probability that there is one.
            centre = mask
            for length in mask.shape[1:]:
                centre = centre[:, length // 2]
            mask = mask / centre.clamp_min(1e-12).view(-1, *[1] * len(tables))
        return mask.unbind(0)


def _in_bands(table: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A table `(shared, private, length)` with one column for each run of equal ones, and the lengths of the runs."""
    _, counts = torch.unique_consecutive(table.flatten(0, 1), return_counts=True, dim=1)
    starts = counts.cumsum(0) - counts
    return table[..., starts], tuple(counts.tolist())


_Place = tuple[tuple[int, ...], int, tuple[int, ...] | None, tuple[int, ...] | None]
"""The positions of a cover's axes, its index among all, and what a `Factor` says of its form."""


class Superposition:
    """What the next forward of a space computes: the largest network, a mixture, or one architecture.

    The elastic layers of a space share one. They register the axes of their parameters at construction and ask
    for masks (soft path) or slices (hard path) as they run.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.relaxation = "exact"
        self.mixture: Mixture | None = None
        self.assignment: Assignment | None = None
        self.channel_divisor = 1  # the share of channels that a `PartialSize` uses is one of so many
        self._axes: dict[tuple[Axis, ...], None] = {}
        # For each relaxation: batches of covers, and for each tuple of axes the places of its covers.
        self._plans: dict[str, tuple[list[_Batch], dict[tuple[Axis, ...], list[_Place]]]] = {}
        self._masks: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # For copies of a space: what a mixture made hangs on an autograd graph, which cannot be copied.
        mixture = None if self.mixture is None else self.mixture.detach()
        return {**vars(self), "mixture": mixture, "_masks": [mask.detach() for mask in self._masks]}

    def add_row(
        self,
        choice: str,
        layer: int | tuple[int, int] | None,
        options: tuple[Any, ...],
        gate: tuple[Size, int] | None,
    ) -> Row:
        slot = sum(len(row.options) == len(options) for row in self.rows)
        self.rows.append(Row(choice, layer, options, slot, self, gate))
        return self.rows[-1]

    def register(self, axes: tuple[Axis, ...]) -> None:
        """Announce that masks for `axes` will be asked for."""
        self._axes.setdefault(axes)
        self._plans.clear()

    def relax(self, mixture: Mixture) -> None:
        """Soft path: compute the masks of all registered axes for the next forwards."""
        batches, _ = self._plan()
        self.mixture, self.assignment = mixture, None
        self._masks = [mask for batch in batches for mask in batch.masks(mixture)]

    def select(self, assignment: Assignment, mixture: Mixture | None = None) -> None:
        """Hard path: slice for the next forwards; a mixture's masks, cut in the same way, multiply what is left."""
        self.release()
        if mixture is not None:
            self.relax(mixture)
        self.assignment = assignment

    def release(self) -> None:
        """The next forwards compute the largest network."""
        self.mixture, self.assignment, self._masks = None, None, []

    def factors(self, axes: tuple[Axis, ...]) -> list[Factor]:
        """The factors of the mask of `axes`."""
        _, covers = self._plan()
        factors = []
        for positions, index, bands, windows in covers[axes]:
            mask = self._masks[index]
            shape = [1] * len(axes)
            for position, length in zip(positions, mask.shape, strict=True):
                shape[position] = length
            factors.append(Factor(mask.view(shape), bands, windows))
        return factors

    def _plan(self) -> tuple[list[_Batch], dict[tuple[Axis, ...], list[_Place]]]:
        if self.relaxation not in COVERED:
            raise unknown("relaxation", self.relaxation, COVERED)
        if self.relaxation not in self._plans:
            self._plans[self.relaxation] = self._make_plan(self.relaxation)
        return self._plans[self.relaxation]

    def _make_plan(self, relaxation: str) -> tuple[list[_Batch], dict[tuple[Axis, ...], list[_Place]]]:
        covers: dict[tuple[Axis, ...], list[tuple[tuple[int, ...], _Cover]]] = {}
        unique: dict[Any, _Cover] = {}  # layers that cover the same rows in the same way share one mask
        for axes in self._axes:
            positions = [i for i, axis in enumerate(axes) if axis.size.rows and axis.role in COVERED[relaxation]]
            covers[axes] = []
            for group in _connected(axes, positions, jointly=relaxation != "gated"):
                banded = group[0] == 0 and len(axes) > 1 and axes[0].layout == "prefix"
                cover = _Cover([axes[i] for i in group], conditional=relaxation != "paper", banded=banded)
                covers[axes].append((group, unique.setdefault((cover.signature, tuple(cover.rows)), cover)))
        batches: dict[Any, list[_Cover]] = {}
        for cover in unique.values():
            batches.setdefault(cover.signature, []).append(cover)
        index = {id(cover): i for i, cover in enumerate(c for batch in batches.values() for c in batch)}
        return [_Batch(batch) for batch in batches.values()], {
            axes: [(group, index[id(cover)], cover.bands, cover.windows) for group, cover in pairs]
            for axes, pairs in covers.items()
        }


def superposition_of(row: Row) -> Superposition:
    """Return the state of the space that a row belongs to."""
    assert isinstance(row.superposition, Superposition)
    return row.superposition


def _connected(axes: Sequence[Axis], positions: Iterable[int], jointly: bool) -> list[tuple[int, ...]]:
    """Positions grouped so that axes sharing rows are together. Without `jointly` only a kernel's two sides are."""
    groups: list[list[int]] = []
    for i in positions:
        near = [
            group
            for group in groups
            if any(
                set(axes[i].size.rows) & set(axes[j].size.rows)
                and (jointly or axes[i].layout == axes[j].layout == "window")
                for j in group
            )
        ]
        groups = [group for group in groups if group not in near]
        groups.append(sorted([i, *(j for group in near for j in group)]))
    return [tuple(group) for group in groups]
