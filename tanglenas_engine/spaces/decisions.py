"""Expectations over architectures whose rows are decided together, such as the two edges into a node of `darts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tanglenas_engine.spaces.cost import Additive
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.superposition.size import Row

LEAST = 1e-20
"""The least weight whose logarithm is taken: a corner is exact in float64, and gradients by weights fit float32."""


class Decision:
    """A decision as tensors: for each row, its option in every alternative, and the options that have a score.

    Args:
        alternatives: The options of the same rows in each alternative.
        has_score: `Architectures.has_score`.
    """

    def __init__(self, alternatives: Sequence[Mapping[Row, int]], has_score: Callable[[Row, int], bool]):
        self.picks = {row: torch.tensor([one[row] for one in alternatives]) for row in alternatives[0]}
        self.scored = {row: torch.tensor([has_score(row, i) for i in range(len(row.options))]) for row in self.picks}

    @property
    def is_independent(self) -> bool:
        """True if the alternatives are the options of a single row, whose weights are their probabilities."""
        return len(self.picks) == 1 and all(
            sorted(picks.tolist()) == list(range(len(row.options))) and bool(self.scored[row].all())
            for row, picks in self.picks.items()
        )

    def probabilities(self, stacks: Mapping[int, Tensor], edges: Mapping[Row, Tensor]) -> Tensor:
        """Return the probability of each alternative, `(alternatives,)`, with which architectures are drawn.

        Args:
            stacks: The weights of a mixture, in float64 on the CPU.
            edges: Its weights of edges.
        """
        total = torch.zeros((), dtype=torch.float64)
        for row, picks in self.picks.items():
            scores = stacks[len(row.options)][row.slot].clamp_min(LEAST).log()
            if row in edges:
                scores = scores + edges[row].clamp_min(LEAST).log()
            total = total + scores.where(self.scored[row], 0.0)[picks]
        return total.softmax(0)


def expected(terms: Additive, decisions: Mapping[Row, Decision], mixture: Mixture) -> Tensor:
    """Return the expectation of a sum of tables over independent decisions, a differentiable float64 scalar.

    Each table is contracted with the probabilities of one decision after another.

    Args:
        terms: The tables.
        decisions: The decision that each row belongs to.
        mixture: The weights of the rows' options.
    """
    place = next(iter(mixture.stacks.values())).device
    stacks = {count: stack.cpu().double() for count, stack in mixture.stacks.items()}  # many small operations
    edges = {row: weight.cpu().double() for row, weight in mixture.edges.items()}
    probabilities = {one: one.probabilities(stacks, edges) for one in dict.fromkeys(decisions.values())}
    total = torch.zeros((), dtype=torch.float64)
    for rows, values in terms.tables.items():
        left = list(rows)
        table = torch.tensor(values, dtype=torch.float64).view([len(row.options) for row in rows])
        while left:
            decision = decisions[left[0]]
            own = [row for row in left if decisions[row] is decision]
            table = table.movedim([left.index(row) for row in own], list(range(len(own))))
            picked = tuple(decision.picks[row] for row in own)
            table = table[picked]  # (alternatives, options of the rows that are left)
            table = torch.tensordot(probabilities[decision], table, 1)
            left = [row for row in left if row not in own]
        total = total + table
    return total.to(place)
