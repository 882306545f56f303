"""Proposals: new architectures within a budget, drawn from the space, from a mixture, or by a method of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tanglenas_engine.derivation.band import REJECTIONS, Band
from tanglenas_engine.derivation.budget import Budget, Projection
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture

PROPOSALS_PER_CANDIDATE = 20
"""Proposals per new candidate after which a space counts as exhausted."""
MIXTURE_DRAWS = 10
"""Draws from a mixture that miss the band, after which the band is drawn from evenly."""


class Proposals:
    """A source of architectures within a budget, each of which is drawn once. All randomness follows from the seed.

    Args:
        budget: The limits that every candidate keeps; None for no limits.
        fill: The share of the tightest limit that candidates use at least, from 0 to 1. Random ones are drawn from this
            band; others grow, where moves lead there. When all of these were drawn, candidates are as small as they
            were proposed.
        limit: The largest number of candidates.
        prior: The mixture to draw from; None draws all options of a row with equal probability.

    Attributes:
        drawn: The digests of the architectures that were drawn.
        projection: The most probable architecture of a mixture within the budget, once `first` drew from one.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        budget: Budget | None = None,
        fill: float = 0.0,
        limit: int = 100,
        prior: Mixture | None = None,
        seed: int = 0,
    ):
        self.space, self.prior, self.fill = space, prior, fill
        self.budget = Budget(space, {}) if budget is None else budget
        self.limit = min(limit, space.size)
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: set[str] = set()
        self.projection: Projection | None = None
        self._band = self._filled(fill)

    def first(self, count: int, fill: bool = True, mixture: Mixture | None = None) -> list[Architecture]:
        """Return the first new candidates.

        The most probable architecture of the mixture, by default of the prior, comes first, brought into the budget.
        Half of the others are drawn from a mixture that is given. A decided one draws the same architectures again, so
        it gives fewer. The rest is that of `fresh`.
        """
        found: list[Architecture] = []
        count = min(count, self.limit - len(self.drawn))
        if (likely := self.prior if mixture is None else mixture) is not None:
            self.projection = self.budget.project(likely)
            found += self._new(self.projection.architecture)
        if mixture is not None:
            scores, share = self.space.scores(mixture), self.fill if fill else 0.0
            for _ in range((count - len(found)) // 2):
                drawn = None
                if self._band and share:
                    draw = self._band.sample if self._band.exact else self._band.by_rejection
                    drawn = draw(self.generator, scores, MIXTURE_DRAWS)
                found += self._new(drawn or self._grown(self.space.sample(self.generator, scores), share))
        return found + self.fresh(count - len(found), fill=fill)

    def fresh(
        self, count: int, propose: Callable[[], Architecture] | None = None, fill: bool = True
    ) -> list[Architecture]:
        """Return up to `count` architectures within the budget that were never drawn before.

        There are fewer where the space has no more.

        Args:
            propose: Returns architectures, which are then brought into the budget; by default the prior is sampled, or
                the space.
            fill: False leaves candidates that are within the budget as small as they were proposed.
        """
        found: list[Architecture] = []
        count = min(count, self.limit - len(self.drawn))
        scores = None if self.prior is None else self.space.scores(self.prior)
        band = self._band if fill and propose is None and scores is None else None
        if band and not band.exact:
            found += self._by_rejection(band, count)
        # Few architectures fill a budget where costs have few values. When they are used up, smaller ones follow.
        for share in dict.fromkeys((self.fill if fill else 0.0, 0.0)):
            for _ in range(PROPOSALS_PER_CANDIDATE * (count - len(found))):
                if len(found) == count:
                    break
                if propose is not None:
                    found += self._new(self._grown(propose(), share))
                elif band and band.exact and share:
                    found += self._new(band.sample(self.generator))
                else:
                    found += self._new(self._grown(self.space.sample(self.generator, scores), share))
        return found

    def _by_rejection(self, band: Band, count: int) -> list[Architecture]:
        """Return up to `count` new architectures of a band that cannot be counted."""
        found: list[Architecture] = []
        # The draws of all candidates together are limited, because the band may be used up.
        for _ in range(REJECTIONS * count):
            if len(found) == count:
                break
            if drawn := band.by_rejection(self.generator, draws=1):
                found += self._new(drawn)
        return found

    def _grown(self, architecture: Architecture, share: float) -> Architecture:
        """Return an architecture that was brought into the budget, and uses a share of it where moves lead there."""
        return self.budget.grow(architecture, self.generator, share)

    def _new(self, architecture: Architecture) -> list[Architecture]:
        """Return the architecture if it was not drawn before, and count it as drawn."""
        if architecture.digest in self.drawn:
            return []
        self.drawn.add(architecture.digest)
        return [architecture]

    def _filled(self, fill: float) -> Band | None:
        """Return the architectures that use this share of the tightest limit, or None if there is none to draw."""
        if not (fill and self.budget.limits):
            return None
        try:
            return Band(self.budget, fill)
        except TangleNASError:  # costs with few values may have none there
            return None
