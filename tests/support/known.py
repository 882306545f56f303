"""Candidates whose worth is known, so that tests can say how well they were searched."""

import random

import torch

from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.testing import random_data
from tanglenas_engine.training.measure import Measured


class Known(Candidates):
    """Judges by a function of an architecture, in %, instead of the supernet; what is missing to 100 is the loss."""

    def __init__(self, space, worth, samples=8, **options):
        data = random_data(space, ("weights", "architecture"), samples=samples)
        super().__init__(space, data.weights, data.architecture, device=torch.device("cpu"), **options)
        self._worth = worth

    def measured(self, architecture, samples):
        worth = self._worth(architecture)
        return Measured(worth, 100 - worth)


class Raced(Known):
    """Known candidates, whose scores have noise on a part of the samples, and that note what was measured."""

    def __init__(self, space, worth, noise=0.0, **options):
        super().__init__(space, worth, **options)
        self.noise, self.measurements = noise, []

    def measured(self, architecture, samples):
        self.measurements.append((architecture.digest, len(samples)))
        found = super().measured(architecture, samples)
        noise = self.noise * random.Random(f"{architecture.digest}{len(samples)}").gauss(0, 1)
        return found._replace(loss=found.loss + noise * (len(samples) < self.samples))


def additive(space, seed):
    """A worth to which every row in use adds a random number for its option."""
    generator = torch.Generator().manual_seed(seed)
    values = {row: torch.rand(len(row.options), generator=generator).tolist() for row in space.rows}

    def worth(architecture):
        picks = space.assignment_of(architecture)
        used = [values[row][pick] for row, pick in picks.items() if row.active(picks)]
        return 100 * sum(used) / len(used)

    return worth
