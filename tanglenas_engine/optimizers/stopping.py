"""Early stopping: rules that end a search before its last epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tanglenas_engine.errors import TangleNASError, at_least, positive
from tanglenas_engine.optimizers.optimizer import Optimizer
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace


class Stop(Protocol):
    """A rule that ends a search after an epoch."""

    def check(self, space: SearchSpace, optimizer: Optimizer) -> None:
        """Check that the rule applies to this space and optimizer.

        Raises:
            TangleNASError: The rule does not apply.
        """

    def __call__(self, current: Architecture | None, record: Mapping[str, Any]) -> str | None:
        """Return the reason to stop after an epoch with this architecture and record, or None.

        The architecture is None for an optimizer without architecture parameters.
        """


class EarlyStopping:
    """A rule that stops a search if it has collapsed or decided.

    Args:
        max_skips: The largest number of `skip_options` in one choice of the current architecture, such as a cell's
            operations. A larger number is the usual sign of a collapse (Liang et al., 2019, arXiv:1909.06035). The
            search then ends with that architecture.
        skip_options: The names of options that count as skip connections.
        min_entropy: The entropy of the mixture, from 1 (undecided) to 0 (decided), below which the search ends.

    Raises:
        TangleNASError: Both `max_skips` and `min_entropy` are None, or one of them is out of its range.
    """

    def __init__(
        self,
        max_skips: int | None = None,
        skip_options: Sequence[str] = ("skip_connect",),
        min_entropy: float | None = None,
    ):
        if max_skips is None and min_entropy is None:
            raise TangleNASError("EarlyStopping stops for nothing: give min_entropy, max_skips or both")
        if isinstance(skip_options, str):
            raise TangleNASError(f"EarlyStopping.skip_options is {skip_options!r}, expected a list of names")
        if max_skips is not None:
            at_least("EarlyStopping.max_skips", max_skips, 0)
        if min_entropy is not None and not 0 < positive("EarlyStopping.min_entropy", min_entropy) < 1:
            raise TangleNASError(f"EarlyStopping.min_entropy is {min_entropy!r}, expected a number between 0 and 1")
        self.max_skips, self.skips, self.min_entropy = max_skips, set(skip_options), min_entropy

    def check(self, space: SearchSpace, optimizer: Optimizer) -> None:
        """Check that alpha exists, and that the space has an option that counts as a skip connection.

        Raises:
            TangleNASError: The optimizer has no alpha, or no option of the space is a skip connection.
        """
        if not optimizer.learns_architecture:
            given = "min_entropy" if self.max_skips is None else "max_skips"
            raise TangleNASError(
                f"EarlyStopping.{given} is about what alpha says, and {optimizer.label} has no architecture "
                "parameters: leave it out"
            )
        options = {option for choice in space.choices.values() for option in choice.options}
        if self.max_skips is not None and not self.skips & options:
            raise TangleNASError(
                f"EarlyStopping.max_skips is {self.max_skips}, but no choice of {space.label} has an option among "
                f"skip_options, {', '.join(sorted(self.skips)) or '(none)'}: name those that skip"
            )

    def __call__(self, current: Architecture | None, record: Mapping[str, Any]) -> str | None:
        if self.max_skips is not None and current is not None:
            for name, chosen in current.choices.items():
                count = sum(option in self.skips for option in (chosen if isinstance(chosen, tuple) else (chosen,)))
                if count > self.max_skips:
                    return f"{name} has {count} of {', '.join(sorted(self.skips))}, more than {self.max_skips}"
        if self.min_entropy is not None and record["entropy"] < self.min_entropy:
            return f"the mixture's entropy is {record['entropy']:.3g}, below {self.min_entropy:g}"
        return None
