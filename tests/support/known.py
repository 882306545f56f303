"""Candidates whose worth is known, so that tests can say how well they were searched."""

import torch

from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.testing import random_data


class Known(Candidates):
    """Judges by a function of an architecture instead of the supernet."""

    def __init__(self, space, worth, **options):
        data = random_data(space, ("weights", "architecture"), samples=8)
        super().__init__(space, data.weights, data.architecture, device=torch.device("cpu"), **options)
        self._worth = worth

    def measured(self, architecture, samples):
        return self._worth(architecture)


def additive(space, seed):
    """A worth to which every row in use adds a random number for its option."""
    generator = torch.Generator().manual_seed(seed)
    values = {row: torch.rand(len(row.options), generator=generator).tolist() for row in space.rows}

    def worth(architecture):
        picks = space.assignment_of(architecture)
        used = [values[row][pick] for row, pick in picks.items() if row.active(picks)]
        return 100 * sum(used) / len(used)

    return worth
