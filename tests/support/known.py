"""Candidates whose worth is known, so that tests can say how well they were searched."""

import torch
from spaces import vit

from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.pareto import final_front, undominated
from tanglenas_engine.runtime import timer
from tanglenas_engine.runtime.progress import SilentProgress
from tanglenas_engine.spaces.objective import Objective
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
    """Known candidates that note what was measured. A part of the samples is easier than all, by a loss of `ease`."""

    def __init__(self, space, worth, samples=8, ease=0.0, **options):
        super().__init__(space, worth, samples=samples, **options)
        self.count, self.ease, self.measurements = samples, ease, []

    def measured(self, architecture, samples):
        self.measurements.append((architecture.digest, len(samples)))
        found = super().measured(architecture, samples)
        return found._replace(loss=found.loss - self.ease * (len(samples) < self.count))


def seconds_of(method, seconds, monkeypatch):
    """Return the seconds that a method takes in which it is given some, where a sample takes 1/256 of one."""
    spent = [0.0]
    monkeypatch.setattr(timer.time, "process_time", lambda: spent[0])

    class Slow(Known):
        def measured(self, architecture, samples):
            spent[0] += len(samples) / 256
            return super().measured(architecture, samples)

    space = vit(depth=(1, 2, 3))
    with Slow(space, additive(space, 0), samples=256, batch_size=16, limit=space.size) as candidates:
        candidates.limit_by_seconds(timer.Timer(seconds, "processor", torch.device("cpu"), "discretize", "candidates"))
        method(candidates, None)
        final_front(candidates)
    return spent[0]


def additive(space, seed):
    """A worth to which every row in use adds a random number for its option."""
    generator = torch.Generator().manual_seed(seed)
    values = {row: torch.rand(len(row.options), generator=generator).tolist() for row in space.rows}

    def worth(architecture):
        picks = space.assignment_of(architecture)
        used = [values[row][pick] for row, pick in picks.items() if row.active(picks)]
        return 100 * sum(used) / len(used)

    return worth


class Spared(Objective):
    """The parameters that an architecture has less than the largest: what is cheap by it is large, and one is free."""

    name = "spared"

    def measure(self, architecture):
        return float(self.space.cost(self.space.largest()).params - self.space.cost(architecture).params)


class Notes(SilentProgress):
    """Keeps what a person is told."""

    def __init__(self):
        self.lines = []

    def note(self, sentence):
        self.lines.append(sentence)


def volume(rows, cost, most):
    """The area that a front dominates, of that between a loss of 100 and the largest cost."""
    area, points = 0.0, undominated(rows, cost)
    for point, following in zip(points, [*points[1:], {cost: most}], strict=True):
        area += (100 - point["loss"]) * (following[cost] - point[cost])
    return area
