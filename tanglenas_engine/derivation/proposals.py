"""Proposals: new architectures within a budget, drawn from the space, from a mixture, or by a method of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import Budget, Projection
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture

PROPOSALS_PER_CANDIDATE = 20
"""Proposals per new candidate after which a space counts as exhausted."""


class Proposals:
    """A source of architectures within a budget, each of which is drawn once. All randomness follows from the seed.

    Args:
        budget: The limits that every candidate keeps; None for no limits.
        fill: The share of the tightest limit that candidates use at least, from 0 to 1. Random ones, and those of a
            mixture, are drawn from this band; others grow, where moves lead there. When all of these were drawn,
            candidates are as small as they were proposed.
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

    def sample(self, mixture: Mixture | None = None, share: float = 0.0) -> Architecture:
        """Return a random architecture within the budget. It uses a share of the limit, where moves lead there.

        Args:
            mixture: The mixture to draw from; None draws all options of a row with equal probability.
            share: The share of the tightest limit: `fill` or 0.
        """
        scores = None if mixture is None else self.space.scores(mixture)
        if self._band and share:
            return self._band.sample(self.generator, scores)
        return self.budget.grow(self.space.sample(self.generator, scores), self.generator, share)

    def first(self, count: int, fill: bool = True, mixture: Mixture | None = None) -> list[Architecture]:
        """Return the first new candidates: those of the mixture, by default of the prior, and then those of `fresh`.

        The most probable architecture of the mixture comes first, brought into the budget. As many architectures are
        drawn from the mixture as half of the others. A decided mixture draws the same ones again, so it gives fewer.
        """
        mixture = self.prior if mixture is None else mixture
        found: list[Architecture] = []
        count = min(count, self.limit - len(self.drawn))
        if mixture is not None:
            self.projection = self.budget.project(mixture)
            found += self._new(self.projection.architecture)
            for _ in range((count - len(found)) // 2):
                found += self._new(self.sample(mixture, self.fill if fill else 0.0))
        return found + self.fresh(count - len(found), fill=fill)

    def fresh(
        self, count: int, propose: Callable[[], Architecture] | None = None, fill: bool = True
    ) -> list[Architecture]:
        """Return up to `count` architectures within the budget that were never drawn before.

        There are fewer where the space has no more.

        Args:
            propose: Returns architectures, which are then brought into the budget; by default the prior is sampled.
            fill: False leaves candidates that are within the budget as small as they were proposed.
        """
        found: list[Architecture] = []
        count = min(count, self.limit - len(self.drawn))
        # Few architectures fill a budget where costs have few values. When they are used up, smaller ones follow.
        for share in dict.fromkeys((self.fill if fill else 0.0, 0.0)):
            for _ in range(PROPOSALS_PER_CANDIDATE * (count - len(found))):
                if len(found) == count:
                    break
                if propose is None:
                    found += self._new(self.sample(self.prior, share))
                else:
                    found += self._new(self.budget.grow(propose(), self.generator, share))
        return found

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
            band = Band(self.budget, fill)
        except TangleNASError:  # costs with few values may have none there
            return None
        return band if band.exact else None
