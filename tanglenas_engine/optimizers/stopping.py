"""Early stopping of a search."""

from __future__ import annotations

from collections.abc import Sequence

from tanglenas_engine.errors import TangleNASError, at_least, positive
from tanglenas_engine.optimizers.optimizer import Optimizer
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace


class _Stops:
    """When to stop before the last epoch.

    Raises:
        TangleNASError: An option cannot be, or the space or the optimizer has nothing that it could be about.
    """

    def __init__(
        self,
        space: SearchSpace,
        optimizer: Optimizer,
        max_skips: int | None,
        skip_options: Sequence[str],
        min_entropy: float | None,
    ):
        self.max_skips, self.skips, self.min_entropy = max_skips, set(skip_options), min_entropy
        given = [name for name, value in (("max_skips", max_skips), ("min_entropy", min_entropy)) if value is not None]
        if given and not optimizer.learns_architecture:
            raise TangleNASError(
                f"search.{given[0]} is about what alpha says, and {optimizer.name or type(optimizer).__name__} has no "
                "architecture parameters: leave it out"
            )
        if max_skips is not None:
            at_least("search.max_skips", max_skips, 0)
            options = {option for choice in space.choices.values() for option in choice.options}
            if not self.skips & options:
                raise TangleNASError(
                    f"search.max_skips is {max_skips}, but no choice of {space.label} has an option among "
                    f"search.skip_options, {', '.join(sorted(self.skips)) or '(none)'}: name those that skip"
                )
        if min_entropy is not None and not 0 < positive("search.min_entropy", min_entropy) < 1:
            raise TangleNASError(f"search.min_entropy is {min_entropy!r}, expected a number between 0 and 1")

    def reason(self, current: Architecture, entropy: float) -> str | None:
        """Why to stop now, or None."""
        if self.max_skips is not None:
            for name, chosen in current.choices.items():
                count = sum(option in self.skips for option in (chosen if isinstance(chosen, tuple) else (chosen,)))
                if count > self.max_skips:
                    return f"{name} has {count} of {', '.join(sorted(self.skips))}, more than {self.max_skips}"
        if self.min_entropy is not None and entropy < self.min_entropy:
            return f"the mixture's entropy is {entropy:.3g}, below {self.min_entropy:g}"
        return None
