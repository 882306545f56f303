"""Evolution on a trained supernet (Guo et al., 2020, arXiv:1904.00420, section 3.3, as AutoFormer has it).

Crossovers and mutations of the best candidates so far make up every generation. With `tournament` and `lifetime` it is
regularised evolution (Real et al., 2019, arXiv:1802.01548): each parent is the best of a few, and old ones retire.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.errors import TangleNASError, at_least, within
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.superposition.size import Row


def evolution(
    candidates: Candidates,
    mixture: Mixture | None,
    *,
    population: int = 20,
    parents: int = 5,
    crossovers: int = 10,
    mutations: int = 10,
    mutation_probability: float = 0.2,
    single_probability: float = 0.4,
    generations: int | None = None,
    tournament: int = 1,
    lifetime: int | None = None,
) -> None:
    """Judge generations of candidates, each bred from the best of the generations before.

    The paper's settings for AutoFormer are population 50, parents 10, crossovers 25, mutations 25 and 20 generations,
    which is 1,050 candidates. For GPT it uses 50 generations. The default probabilities are the paper's.

    Args:
        population: The number of new candidates per generation. All of the first generation are drawn. Random ones
            complete a later generation that has fewer crossovers and mutations, or in which these give nothing new.
        parents: The number of the best candidates so far from which the next generation is bred.
        crossovers: The number of candidates per generation that take each decision from one of two parents.
        mutations: The number of candidates per generation that differ from a parent by random changes, at least one.
        mutation_probability: The probability of a change to each row of a choice that is made per layer.
        single_probability: The probability of a change to each choice that is made once, such as a depth.
        generations: The number of generations after the first one; None goes on until the candidates are used up.
        tournament: The number of candidates, drawn from the best so far, whose best one is a parent; 1 takes any.
        lifetime: The number of generations for which a candidate can be a parent; None sets no limit.

    Raises:
        TangleNASError: An option is out of its range, there are more parents than the population has, or crossovers and
            mutations together are more than that.
    """
    least = {"population": 1, "parents": 1, "crossovers": 0, "mutations": 0, "tournament": 1}
    numbers = dict(zip(least, (population, parents, crossovers, mutations, tournament), strict=True))
    for name, value in numbers.items():
        at_least(f"evolution.{name}", value, least[name])
    for name, optional in (("generations", generations), ("lifetime", lifetime)):
        if optional is not None:
            at_least(f"evolution.{name}", optional, 1)
    if parents > population:
        raise TangleNASError(
            f"evolution.parents is {parents}, more than the {population} of a population: lower it, or raise "
            "evolution.population"
        )
    if crossovers + mutations > population:
        raise TangleNASError(
            f"evolution.crossovers and evolution.mutations are {crossovers} and {mutations}, together more than the "
            f"{population} of a population: lower them, or raise evolution.population"
        )
    candidates.in_generations(population)
    generator = candidates.generator
    variation = Variation(candidates.space, generator, "evolution", mutation_probability, single_probability)
    pool: list[Architecture] = []  # best first

    def parent() -> Architecture:
        return pool[int(torch.randint(len(pool), (tournament,), generator=generator).min())]

    total = candidates.limit if generations is None else min(candidates.limit, population * (generations + 1))
    number, generation = 0, candidates.first(population)
    while generation:
        candidates.judge(generation, total)
        if number == generations:
            break
        number += 1
        best = candidates.best(parents, since=0 if lifetime is None else number - lifetime)
        pool = [row["architecture"] for row in best]
        generation = candidates.fresh(crossovers, lambda: variation.crossed(parent(), parent()))
        generation += candidates.fresh(mutations, lambda: variation.mutated(parent()))
        generation += candidates.fresh(population - len(generation))


class Variation:
    """A source of new architectures that are made of others, by the moves that the space allows.

    Args:
        generator: The source of all random numbers.
        name: The name of the method in error messages.
        mutation_probability: The probability of a move of each row of a choice that is made per layer.
        single_probability: The probability of a move of each choice that is made once.

    Raises:
        TangleNASError: A probability is not a share from 0 to 1.
    """

    def __init__(
        self,
        space: SearchSpace,
        generator: torch.Generator,
        name: str = "evolution",
        mutation_probability: float = 0.2,
        single_probability: float = 0.4,
    ):
        self.space, self.generator = space, generator
        self._probability = within(f"{name}.mutation_probability", mutation_probability, 0, 1)
        self._single = within(f"{name}.single_probability", single_probability, 0, 1)
        self._groups = [list(alternatives[0]) for alternatives in space.decisions()]

    def crossed(self, one: Architecture, other: Architecture) -> Architecture:
        """Return a child that takes each decision from one of two parents at random.

        If that parent does not use the rows of a decision, the child takes it from the other one. A space that does not
        tell which rows are decided together may not have the child: then `one` is returned.
        """
        pair = [self.space.assignment_of(one), self.space.assignment_of(other)]
        picks: dict[Row, int] = {}
        for rows, first in zip(self._groups, self._integers(2, len(self._groups)), strict=True):
            picks.update((row, pair[first if row.active(pair[first]) else 1 - first][row]) for row in rows)
        child = self.space.architecture_of(picks)
        try:
            self.space.assignment_of(child)
        except TangleNASError:
            return one
        return child

    def mutated(self, architecture: Architecture) -> Architecture:
        """Return the architecture after random moves of some rows, at least of one."""
        picks = self.space.assignment_of(architecture)
        for row in self.space.rows:
            if not row.active(picks):  # layers that a larger depth adds have random options
                (picks[row],) = self._integers(len(row.options), 1)

        def move(rows: Sequence[Row]) -> bool:
            """Make a random move of one of these rows, and return whether there was any."""
            moves = [change for change in self.space.moves(picks) if not change.keys().isdisjoint(rows)]
            if moves:
                picks.update(moves[self._integers(len(moves), 1)[0]])
            return bool(moves)

        chances, moved = torch.rand(len(self.space.rows), generator=self.generator).tolist(), False
        for row, chance in zip(self.space.rows, chances, strict=True):
            if chance < (self._single if row.layer is None else self._probability) and row.active(picks):
                moved |= move([row])
        if not moved:
            move([row for row in self.space.rows if row.active(picks)])
        return self.space.architecture_of(picks)

    def _integers(self, high: int, count: int) -> list[int]:
        numbers: list[int] = torch.randint(high, (count,), generator=self.generator).tolist()
        return numbers
