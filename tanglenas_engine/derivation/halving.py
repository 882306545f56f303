"""Successive halving of judged candidates: how many samples its rungs have, and how many candidates a time allows.

All candidates of a generation are judged on a batch, and the best quarter of them on about four times as many samples,
up to all (Jamieson and Talwalkar, 2016, arXiv:1502.07943).
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

RUNG = 4
"""Factor between the rungs of a race: a quarter of the candidates goes on, to about four times as many samples."""

TRIED = 8
"""Candidates of the trial that estimates how many fit into the given seconds."""
TRIED_LONG = 2
"""Candidates of the trial that are also timed on more samples."""
MOST = 10**6
"""An upper limit on the number of candidates that a trial may plan."""


def promoted(candidates: int) -> int:
    """Return how many of the candidates of a rung go on to the next one."""
    return math.ceil(candidates / RUNG)


def rungs(candidates: int, samples: int, batch_size: int) -> list[int]:
    """Return the numbers of samples of a race: from a batch to all, in steps of a factor of 2 to 8, best 4.

    Few candidates need few steps. Their first rung has more than a batch.
    """
    needed = 0
    while candidates > 1:
        candidates, needed = promoted(candidates), needed + 1
    batches = max(1.0, samples / batch_size)
    steps = math.ceil(math.log(batches, RUNG) - 0.5)
    taken = min(steps, needed)
    return [round(samples * batches ** (-step / steps)) for step in range(taken, 0, -1)] + [samples]


class Trial(NamedTuple):
    """The costs of some candidates.

    Attributes:
        drawing: The seconds to draw one.
        few, short: A number of samples, and the seconds to judge a candidate on them where the ranks share the judging.
        many, long: The same for more samples.
        left: The seconds that are left for others.
    """

    drawing: float
    few: int
    short: float
    many: int
    long: float
    left: float


@dataclass(frozen=True)
class Derivation:
    """The seconds that a derivation takes, as a function of its number of candidates.

    Each generation runs a race of its own, which ends on all samples. So small generations take longer.

    Attributes:
        trial: The costs of a candidate.
        samples: The number of samples to judge candidates on.
        batch_size: The number of samples in a batch.
        race: False if all candidates are judged on all samples.
        generation: The number of candidates of a generation; None for one of all candidates.
        single: The number of candidates that follow one by one, each judged on all samples and on the first rung.
    """

    trial: Trial
    samples: int
    batch_size: int
    race: bool = True
    generation: int | None = None
    single: int = 0

    def seconds(self, candidates: int) -> float:
        """Return the seconds that so many candidates need after the trial."""
        together = max(candidates - self.single, 1)
        size = self.generation or together
        whole, rest = divmod(together, size)
        # At the end the result is measured, and the front that a race dropped: of n random points about log n.
        last = 1 + (math.log(candidates) if self.race else 0.0)
        judged = whole * self._generation(size) + self._generation(rest)
        judged += (candidates - together) * (self._generation(1) + self._judging(self._race(together)[0]))
        first = self._rungs(size)[0]
        if first == self.trial.few:  # the candidates of the trial are drawn again, and their scores are known
            judged -= min(candidates, TRIED) * self._judging(first)
        return candidates * self.trial.drawing + judged + last * self._judging(self.samples)

    def affordable(self, most: int) -> int:
        """Return the largest number of candidates, up to `most`, that the seconds which the trial left allow."""

        def least(candidates: int) -> float:
            """Return the least seconds that so many candidates or more need.

            Races of more candidates begin with fewer samples, and so may take less, from a power of `RUNG` on. Between
            these numbers, and from the end of one generation to the next, more candidates take more.
            """
            size = self.generation
            begun = max(candidates - self.single, 0) // size * size if size else 0
            powers = itertools.takewhile(lambda power: power < (size or most), (RUNG**k for k in itertools.count()))
            turns = (self.single + begun + turn for turn in (*(power + 1 for power in powers), size or most))
            return min(self.seconds(number) for number in (candidates, *turns) if candidates <= number <= most)

        return bisect.bisect_right(range(1, most + 1), self.trial.left, key=least)

    def _judging(self, count: int) -> float:
        """Return the seconds to judge one candidate on so many samples."""
        few, short, many, long = self.trial[1:5]
        each = (long - short) / (many - few) if many > few else 0.0
        return short + each * (count - few)

    def _generation(self, candidates: int) -> float:
        """Return the seconds to judge a generation."""
        total, left = 0.0, candidates
        for number, count in enumerate(self._rungs(candidates) if candidates else ()):
            left = promoted(left) if number else left
            total += left * self._judging(count)
        return total

    def _rungs(self, candidates: int) -> list[int]:
        return self._race(candidates) if self.race else [self.samples]

    def _race(self, candidates: int) -> list[int]:
        return rungs(candidates, self.samples, self.batch_size)
