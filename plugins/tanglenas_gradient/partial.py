"""Partial channels, edge normalization and progressive shrinking (Xu et al. 2020, arXiv:1907.05737; Chen et al. 2021).

In a cell space, the operations of an edge see a share of the channels; the other channels bypass them. The outputs
of the edges into a node are weighed against each other. In every space, the rows of choices are pruned between the
stages of the search, to the most probable options, and the operations left see more channels. These channels belong
to the same weights, so no weight has to be widened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine import Mixture, Optimizer, SearchSpace, TangleNASError, cells
from tanglenas_gradient.darts import DARTS
from tanglenas_gradient.drnas import DrNAS


class Progressive(Optimizer):
    """A base of the two methods below: a search in stages of equal length.

    Args:
        channels: For each stage, the reciprocal of the share of channels that operations see; 1 means all channels.
        keep: For each stage, the share of every row's options that is left, at least two options, so that nothing is
            decided before the end; the first share is 1.
        edge_normalization: Weigh the edges into a node by a softmax over parameters of their own. The weights then also
            count when a space derives which edges to keep.
    """

    def __init__(
        self,
        channels: Sequence[int],
        keep: Sequence[float],
        edge_normalization: bool,
        **options: Any,
    ):
        super().__init__(**options)
        if not isinstance(channels, Sequence) or not isinstance(keep, Sequence):
            raise TangleNASError(
                f"channels {channels!r} and keep {keep!r}: give a tuple of each, with a number for every stage"
            )
        self.channels, self.keep = tuple(channels), tuple(keep)
        if not self.channels or len(self.channels) != len(self.keep):
            raise TangleNASError(
                f"channels {self.channels} and keep {self.keep} have {len(self.channels)} and {len(self.keep)} stages: "
                "give one of each for every stage"
            )
        if any(type(parts) is not int or parts < 1 for parts in self.channels):
            raise TangleNASError(f"channels are {self.channels}, expected whole numbers of at least 1, such as (6, 4)")
        if (
            self.keep[0] != 1
            or any(not 0 < share <= 1 for share in self.keep)
            or list(self.keep) != sorted(self.keep)[::-1]
        ):
            raise TangleNASError(f"keep is {self.keep}, expected shares that start at 1 and fall, such as (1, 0.5)")
        self.final_divisor = self.channels[-1]
        self.edge_normalization = edge_normalization
        self.stage = 0
        self.edges = nn.Parameter(torch.empty(0))
        self._kept: dict[int, Tensor] = {}

    def bind(self, space: SearchSpace, seed: int) -> None:
        super().bind(space, seed)
        is_cells = isinstance(space, cells.CellSpace)
        self._nodes = space.nodes() if is_cells and self.edge_normalization else []
        count = sum(map(len, self._nodes))
        noise = torch.randn(count, generator=torch.Generator().manual_seed(self.derive_seed(-1, "edges")))
        self.edges = nn.Parameter((1e-3 * noise).to(next(space.parameters())))
        partial = space.partial_channels if is_cells else []
        for widths in partial:
            for parts in self.channels:
                if widths % parts:
                    raise TangleNASError(
                        f"{widths} channels of {space.label} do not divide into {parts} parts: choose other channels "
                        "of the space or of the optimizer"
                    )
        self._is_partial = bool(partial)
        self._kept = {count: torch.ones_like(alpha, dtype=torch.bool) for count, alpha in self.alphas.items()}
        self._enter(0)

    def parameters(self) -> list[nn.Parameter]:
        return [*super().parameters(), self.edges] if self._nodes else super().parameters()

    def set_progress(self, fraction: float) -> None:
        super().set_progress(fraction)
        stage = min(len(self.channels) - 1, int(fraction * len(self.channels) + 1e-9))
        while self.stage < stage:
            self._enter(self.stage + 1)
            self._prune(self.keep[self.stage])
        self._enter(self.stage)

    def schedules(self) -> dict[str, float]:
        parts = {"channel_parts": self.channels[self.stage]} if self._is_partial else {}
        return {**super().schedules(), **parts, "options_kept": self.keep[self.stage]}

    def sample(self, step: int, stream: str) -> Mixture:
        return self._shrunk(super().sample(step, stream))

    def expected(self) -> Mixture:
        return self._shrunk(super().expected())

    def state_dict(self) -> dict[str, Any]:
        own = {"stage": self.stage, "edges": self.edges.detach().clone(), "kept": dict(self._kept)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not 0 <= state["stage"] < len(self.channels):
            raise TangleNASError(f"the stage is {state['stage']}, expected 0 to {len(self.channels) - 1}")
        super().load_state_dict(state)
        with torch.no_grad():
            self.edges.copy_(state["edges"])
        self._kept = {count: kept.to(self.alphas[count].device) for count, kept in state["kept"].items()}
        self._enter(state["stage"])

    def _enter(self, stage: int) -> None:
        """Go on in a stage, with its share of the channels where the space has channels in parts."""
        self.stage = stage
        self.space.superposition.channel_divisor = self.channels[stage] if self._is_partial else 1

    def _prune(self, share: float) -> None:
        """Keep the most probable options of every row."""
        for count, weights in self.expected().detach().stacks.items():
            best = weights.topk(max(min(2, count), math.ceil(share * count)), dim=1).indices
            self._kept[count] = torch.zeros_like(self._kept[count]).scatter_(1, best, True)

    def _shrunk(self, mixture: Mixture) -> Mixture:
        """Return the mixture conditioned on the options left, with the weights of edges."""
        stacks = {count: weights * self._kept[count] for count, weights in mixture.stacks.items()}
        found = self.space.mixture({count: w / w.sum(1, keepdim=True) for count, w in stacks.items()})
        if self.keep[self.stage] < 1:
            kept = {count: stack.tolist() for count, stack in self._kept.items()}
            found.kept = {
                row: frozenset(i for i, there in enumerate(kept[len(row.options)][row.slot]) if there)
                for row in self.space.rows
            }
        for rows, logits in zip(self._nodes, self.edges.split(list(map(len, self._nodes))), strict=True):
            found.edges.update(zip(rows, logits.softmax(0), strict=True))
        return found


class PartialDARTS(Progressive, DARTS):
    """An optimizer with softmax mixtures over a quarter of the channels: PC-DARTS.

    The options are those of `Progressive` and `darts`. The paper searches for 50 epochs and trains alpha
    in the last 35, as `search.warmup_epochs = 15` does.
    """

    def __init__(
        self,
        channels: Sequence[int] = (4,),
        keep: Sequence[float] = (1.0,),
        edge_normalization: bool = True,
        weight_decay: float = 0.0,
        temperature: float = 1.0,
        final_temperature: float | None = None,
    ):
        own = {"temperature": temperature, "final_temperature": final_temperature}
        super().__init__(channels, keep, edge_normalization, weight_decay=weight_decay, **own)


class PartialDrNAS(Progressive, DrNAS):
    """An optimizer that is DrNAS with partial channels and progressive shrinking.

    The options are those of `Progressive` and `drnas`. The paper's cells have 36 channels; its two stages of 25 epochs
    see 1/6 and 1/4 of them. The second stage keeps 4 of 8 operations.

    Differs from the paper in two points. There, alpha rests in the first 10 epochs of each stage; here, it rests in
    `search.warmup_epochs` of the first stage only. And optimizer and learning rate continue from stage to stage.
    """

    def __init__(
        self,
        channels: Sequence[int] = (4, 2),
        keep: Sequence[float] = (1.0, 0.5),
        edge_normalization: bool = True,
        regularizer: str = "none",
        scale: float = 1e-3,
        temperature: float = 1.0,
        final_temperature: float | None = None,
    ):
        own = {"scale": scale, "temperature": temperature, "final_temperature": final_temperature}
        super().__init__(channels, keep, edge_normalization, regularizer=regularizer, **own)
