"""Superposition: masks that are the expectation over architectures.

A mixture gives every row of choices a distribution over its options. The expected zero-padded slice of a weight `W` is
`W * M`. Each entry of the mask `M` is the probability that an architecture uses this entry of `W`. The paper's
Algorithm 1 adds up the padded slices one by one. Its result equals `W * M` for any number of choices.

Two dimensions that share no row of choices are independent. Each has its own *coverage* `P(size > i)`, and `M` is the
outer product of the coverages. Two dimensions that share rows are covered jointly. They are independent once the shared
options `e` are given, so `M = sum_e p(e) * outer(coverage given e, ...)`. This is one small matrix product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tanglenas_engine.errors import unknown
from tanglenas_engine.superposition.size import Assignment, Axis, Row, Size, combinations

COVERED: dict[str, frozenset[str]] = {
    # Algorithm 1 on every weight. Heads are covered once, where they are read. LayerNorm uses the covered width.
    "exact": frozenset({"read", "write", "statistics", "value", "group"}),
    # Each width is covered where it is read and nowhere else, independently of other widths.
    "gated": frozenset({"read", "statistics", "value", "group"}),
    # The authors' semantics: Algorithm 1 at every read and write. Heads are covered three times. LayerNorm uses the
    # full width.
    "paper": frozenset({"read", "write", "unit", "again", "value"}),
}
"""The roles of dimensions that a mixture covers, for each relaxation. No other code decides this."""

EDGES = "edges"
"""The name of the edge weights in a file of mixing weights. The tensor has one number per edge."""


class Factor(NamedTuple):
    """A factor of a parameter's mask. It broadcasts against the parameter.

    A band is a run of consecutive rows of the weight. An architecture uses all rows of a band or none of them. `mask`
    has one row per band: row i stands for the next `bands[i]` rows of the weight. If `bands` is None, `mask` has all
    rows.
    """

    mask: Tensor
    bands: tuple[int, ...] | None = None
    windows: tuple[int, ...] | None = None
    """The kernel sizes in ascending order, for a factor over the kernel dimensions only; otherwise None.

    The factor is constant on the entries that each kernel size adds to the previous one.
    """

    def whole(self) -> Tensor:
        """Return the mask with all rows."""
        return self.mask if self.bands is None else expanded(self.mask, self.bands)


def expanded(mask: Tensor, bands: Sequence[int]) -> Tensor:
    """Return `mask` with row i repeated `bands[i]` times."""
    if len(bands) == 1:
        return mask.expand(bands[0], *mask.shape[1:])
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return mask.index_select(0, _band_of_rows(tuple(bands), mask.device))  # one operation in place of one per band
    return torch.cat([row.expand(n, *row.shape[1:]) for row, n in zip(torch.split(mask, 1), bands, strict=True)])


@lru_cache(maxsize=1024)
def _band_of_rows(bands: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.arange(len(bands)).repeat_interleave(torch.tensor(bands)).to(device)


class Mixture(Mapping[str, Tensor]):
    """Weights on the simplex for every choice: `(options,)`, or `(layers, options)` for a choice per layer.

    All rows with K options are stored in one `(rows, K)` tensor. So the number of operations for sampling and masking
    does not grow with the number of choices.

    Args:
        rows: The rows of each choice.
        stacks: The weights `(rows, K)` of all rows with K options, for each K.

    Attributes:
        edges: The scalar that multiplies an edge's output, by the edge's row. Only cell spaces have it (edge
            normalization).
        kept: The positions of the remaining options of each pruned row. The other options have weight 0. An operation
            is not computed if all of its options are pruned.
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
        """The state of the space that the choices belong to."""
        return superposition_of(next(iter(self._rows.values()))[0])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save: the weights by choice, and the edge weights if there are any."""
        return {**self, **({EDGES: torch.stack(list(self.edges.values()))} if self.edges else {})}

    def detach(self) -> Mixture:
        """Return the same mixture with its weights as constants."""
        mixture = Mixture(self._rows, {count: stack.detach() for count, stack in self.stacks.items()})
        mixture.edges, mixture.kept = {row: weight.detach() for row, weight in self.edges.items()}, self.kept
        return mixture

    def replaced(self, weights: Sequence[Tensor]) -> Mixture:
        """Return a mixture with these stacks of weights, and then edge weights, in the order of this one's."""
        mixture = Mixture(self._rows, dict(zip(self.stacks, weights, strict=False)))
        mixture.edges, mixture.kept = dict(zip(self.edges, weights[len(self.stacks) :], strict=True)), self.kept
        return mixture

    def in_use(self) -> dict[Row, float]:
        """Return for each row the probability that it matters: that the depth, if any, reaches the row's layer."""
        used: dict[Row, float] = {}
        for row in itertools.chain(*self._rows.values()):  # depths come before the rows of their layers
            used[row] = 1.0
            if row.gate is not None:
                depth, layer = row.gate
                (outer,) = depth.rows
                rank = row.superposition.rank(depth, layer)
                weights = self.stacks[len(outer.options)][outer.slot].tolist()
                deeper = (weight for weight, value in zip(weights, depth.values, strict=True) if int(value) > rank)
                used[row] = used[outer] * sum(deeper)
        return used

    def entropy(self) -> float:
        """Return the entropy of an architecture of the mixture, from 1 (undecided) to 0 (one architecture is left).

        It is `sum_r P(r) H(r) / sum_r P(r) log K(r)` over the rows r: P(r) is the probability that the row is in use,
        H(r) is the entropy of its weights, and K(r) is the number of its options. Options of weight 0, such as those
        that shrinking dropped, do not count, and neither do weights of edges.
        """
        stacks = {count: stack.tolist() for count, stack in self.stacks.items()}
        found = most = 0.0
        for row, probability in self.in_use().items():
            if len(row.options) > 1:
                left = [weight for weight in stacks[len(row.options)][row.slot] if weight != 0]
                found -= probability * sum(weight * math.log(weight) for weight in left)
                most += probability * math.log(max(len(left), 2))  # a single one that is left is a decision
        return min(found / most, 1.0) if most else 0.0  # rounding may exceed 1

    def joint(self, rows: Sequence[Row], slots: Tensor) -> Tensor:
        """Return the probabilities `(instances, combinations)` of all option combinations of `rows`.

        Args:
            rows: The rows of one instance. Those of the other instances have the same numbers of options.
            slots: The slots of each instance's rows, `(instances, rows)`.
        """
        weights: Tensor | None = None
        for position, row in enumerate(rows):
            one = self.stacks[len(row.options)][slots[:, position]]  # (instances, K)
            weights = one if weights is None else (weights[:, :, None] * one[:, None, :]).flatten(1)
        return next(iter(self.stacks.values())).new_ones(len(slots), 1) if weights is None else weights


class _Cover:
    """The tables from which a mixture computes the mask of a few axes that share rows."""

    def __init__(self, axes: Sequence[Axis], conditional: bool, banded: bool):
        # The mask of a kernel that may be absent is conditional on its presence: the operation multiplies its output
        # by the probability of presence.
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
    """A batch of covers with equal tables and different rows. Their masks are computed together."""

    def __init__(self, covers: Sequence[_Cover]):
        self.cover = covers[0]
        self._slots = torch.tensor([[row.slot for row in cover.rows] for cover in covers]).reshape(len(covers), -1)
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, list[Tensor]]] = {}

    def masks(self, mixture: Mixture) -> tuple[Tensor, ...]:
        """Return one mask per cover, with one dimension per axis."""
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
                # The coverage of the axis given the shared options: (instances, shared, length).
                operands += [torch.einsum("lp,spn->lsn", weights, table), [0, 1, 2 + axis]]
            else:
                operands += [table[:, 0], [1, 2 + axis]]
            start += len(private)
        mask: Tensor = torch.einsum(*operands, [0, *range(2, 2 + len(tables))])
        if self.cover.conditional:
            # Every kernel covers the centre. So the mask at the centre is the probability that a kernel is present.
            centre = mask
            for length in mask.shape[1:]:
                centre = centre[:, length // 2]
            mask = mask / centre.clamp_min(1e-12).view(-1, *[1] * len(tables))
        return mask.unbind(0)


def _in_bands(table: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Merge each run of equal columns of a `(shared, private, length)` table, and return the runs' lengths too."""
    _, counts = torch.unique_consecutive(table.flatten(0, 1), return_counts=True, dim=1)
    starts = counts.cumsum(0) - counts
    return table[..., starts], tuple(counts.tolist())


_Place = tuple[int, tuple[int, ...] | None, tuple[int, ...] | None, tuple[int, ...] | None]
"""The index of a cover's mask, the shape of its `Factor` where it differs, and the factor's `bands` and `windows`."""


class Superposition:
    """The state that decides what the next forward computes: the largest network, a mixture, or one architecture.

    All elastic layers of a space share it. They register the axes of their parameters when they are constructed. When
    they run, they ask for masks (soft path) or slices (hard path).

    Attributes:
        rows: The rows of all choices, in order of declaration.
        relaxation: A key of `COVERED`.
        mixture: The mixture of the soft path, or None.
        assignment: The architecture of the hard path, or None.
        channel_divisor: A `PartialSize` of C channels uses `C // channel_divisor` of them in the next forwards.
        trained_divisor: The `channel_divisor` with which the weights learned last. Networks that inherit them are
            judged with it, because the other channels are untrained.
        deferred: True leaves the masks of a mixture to `cover`, for a caller that computes them elsewhere.
        ranks: The rank of each layer, by the row and the values of its depth, where layers were put in order. A depth
            keeps the layers of the lowest ranks.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.relaxation = "exact"
        self.mixture: Mixture | None = None
        self.assignment: Assignment | None = None
        self.channel_divisor = 1
        self.trained_divisor = 1
        self.deferred = False
        self.ranks: dict[tuple[Row, tuple[Any, ...]], tuple[int, ...]] = {}
        self._axes: dict[tuple[Axis, ...], None] = {}
        # The batches of covers and the places of each tuple of axes, by relaxation.
        self._plans: dict[str, tuple[list[_Batch], dict[tuple[Axis, ...], list[_Place]]]] = {}
        self._masks: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a space call this. A mixture and its masks belong to an autograd graph, which cannot be copied.
        mixture = None if self.mixture is None else self.mixture.detach()
        return {**vars(self), "mixture": mixture, "_masks": [mask.detach() for mask in self._masks]}

    def add_row(
        self,
        choice: str,
        layer: int | tuple[int, int] | None,
        options: tuple[Any, ...],
        gate: tuple[Size, int] | None,
    ) -> Row:
        """Add a row of choices and return it. Its slot is the number of earlier rows with equally many options."""
        slot = sum(len(row.options) == len(options) for row in self.rows)
        self.rows.append(Row(choice, layer, options, slot, self, gate))
        return self.rows[-1]

    def rank(self, depth: Size, layer: int) -> int:
        """Return the number of layers that a depth keeps before this one: by default the layer's own number."""
        ranks = self.ranks.get((depth.rows[0], depth.values)) if self.ranks and depth.rows else None
        return layer if ranks is None else ranks[layer]

    def register(self, axes: tuple[Axis, ...]) -> None:
        """Announce that a layer will ask for the mask of `axes`."""
        self._axes.setdefault(axes)
        self._plans.clear()

    def relax(self, mixture: Mixture) -> None:
        """Take the soft path: compute the masks of all registered axes for the next forwards."""
        self._plan()
        self.mixture, self.assignment, self._masks = mixture, None, []
        if not self.deferred:
            self.cover()

    def cover(self) -> None:
        """Compute the masks of the mixture."""
        assert self.mixture is not None
        self._masks = [mask for batch in self._plan()[0] for mask in batch.masks(self.mixture)]

    def select(self, assignment: Assignment, mixture: Mixture | None = None) -> None:
        """Take the hard path: make the next forwards compute slices.

        Args:
            assignment: The architecture.
            mixture: A mixture whose masks are sliced too and multiply the sliced weights.
        """
        self.release()
        if mixture is not None:
            self.relax(mixture)
        self.assignment = assignment

    def release(self) -> None:
        """Make the next forwards compute the largest network."""
        self.mixture, self.assignment, self._masks = None, None, []

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the path back at the end of the block, whatever the block takes."""
        before = self.mixture, self.assignment, self._masks
        try:
            yield
        finally:
            self.mixture, self.assignment, self._masks = before

    def factors(self, axes: tuple[Axis, ...]) -> list[Factor]:
        """Return the factors of the mask of `axes`."""
        _, covers = self._plan()
        factors = []
        for index, shape, bands, windows in covers[axes]:
            mask = self._masks[index]
            factors.append(Factor(mask if shape is None else mask.view(shape), bands, windows))
        return factors

    def _plan(self) -> tuple[list[_Batch], dict[tuple[Axis, ...], list[_Place]]]:
        if self.relaxation not in COVERED:
            raise unknown("relaxation", self.relaxation, COVERED)
        if self.relaxation not in self._plans:
            self._plans[self.relaxation] = self._make_plan(self.relaxation)
        return self._plans[self.relaxation]

    def _make_plan(self, relaxation: str) -> tuple[list[_Batch], dict[tuple[Axis, ...], list[_Place]]]:
        covers: dict[tuple[Axis, ...], list[tuple[tuple[int, ...], _Cover]]] = {}
        unique: dict[Any, _Cover] = {}  # layers with the same rows and tables share one mask
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
            axes: [(index[id(cover)], _shape(axes, group, cover), cover.bands, cover.windows) for group, cover in pairs]
            for axes, pairs in covers.items()
        }


def _shape(axes: Sequence[Axis], group: Sequence[int], cover: _Cover) -> tuple[int, ...] | None:
    """Return the shape in which a mask broadcasts against a tensor of `axes`, or None if it has that shape."""
    if len(group) == len(axes):
        return None
    lengths = dict(zip(group, (table.shape[-1] for table in cover.tables), strict=True))
    return tuple(lengths.get(position, 1) for position in range(len(axes)))


def superposition_of(row: Row) -> Superposition:
    """Return the state of the space that a row belongs to."""
    assert isinstance(row.superposition, Superposition)
    return row.superposition


def _connected(axes: Sequence[Axis], positions: Iterable[int], jointly: bool) -> list[tuple[int, ...]]:
    """Group positions so that axes with common rows are together.

    Without `jointly`, only the two sides of a kernel are grouped.
    """
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
