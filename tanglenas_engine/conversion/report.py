"""The report of a conversion: what became a choice, what did not, and why."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """A row of the report: what became a choice, or what did not and why.

    Attributes:
        name: The choice, or the tensor whose dimension stays.
        kind: "hidden", "residual", "heads" or "depth"; "fixed" for a dimension that stays.
        largest: The number in the given model.
        options: The options; for a fixed dimension the number alone.
        reason: The reason for which it stays; empty for a choice.
        tensors: The number of parameters with the dimension.
    """

    name: str
    kind: str
    largest: int
    options: tuple[int, ...]
    reason: str = ""
    tensors: int = 0


@dataclass
class Report:
    """What became a choice, what did not, and why.

    Attributes:
        parts: The rows.
        elastic: The number of parameters in tensors of which at least one dimension varies.
        total: The number of all parameters.
    """

    parts: list[Part] = field(default_factory=list)
    elastic: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        """The share of the parameters that are elastic."""
        return self.elastic / max(1, self.total)

    @property
    def choices(self) -> list[Part]:
        return [part for part in self.parts if not part.reason]

    @property
    def fixed(self) -> list[Part]:
        return [part for part in self.parts if part.reason]

    def __str__(self) -> str:
        rows = [("name", "kind", "options", "why it stays")]
        rows += [(part.name, part.kind, " ".join(map(str, part.options)), "") for part in self.choices]
        for reason in dict.fromkeys(part.reason for part in self.fixed):
            first, *others = [part.name for part in self.fixed if part.reason == reason]
            rows.append((f"{first} and {len(others)} more" if others else first, "fixed", "", reason))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.share:.0%} of {self.total:,} parameters are elastic"])
