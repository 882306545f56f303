"""Latency, predicted from a table: the times of a space's building blocks on one machine.

A prediction is a sum of tables over rows of choices. Its expectation under a mixture is therefore exact, so that a
search can lower it, and budgets in milliseconds are met exactly. `latency_measurement` makes the tables.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from tanglenas_engine import (
    Additive,
    Objective,
    Row,
    SearchSpace,
    TangleNASError,
    data_path,
    rank_correlations,
    strict_json,
    write_atomic,
)

FORMAT = 2
"""Version of the file format."""


@dataclass(frozen=True)
class Machine:
    """A machine: all that times depend on besides the network."""

    processor: str
    threads: int
    torch_version: str

    @classmethod
    def here(cls, device: torch.device, threads: int) -> Self:
        """Return this machine."""
        cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if cuda else _processor()
        return cls(name, threads, torch.__version__.split("+")[0])

    def __str__(self) -> str:
        return f"{self.processor}, {self.threads} thread{'s'[: self.threads > 1]}, torch {self.torch_version}"


@dataclass(frozen=True)
class Validation:
    """A comparison on networks that had no part in the fit: predicted and measured milliseconds of each."""

    predicted: list[float]
    measured: list[float]

    @property
    def spearman(self) -> float:
        """Spearman's rank correlation, from -1 to 1, or nan if all predictions are equal."""
        return rank_correlations(self.predicted, self.measured)["spearman"]

    @property
    def relative_error(self) -> float:
        """The mean of |predicted - measured| / measured."""
        return statistics.fmean(abs(p - m) / m for p, m in zip(self.predicted, self.measured, strict=True))


@dataclass(frozen=True)
class LatencyTable:
    """A file of the times of a space's blocks, in milliseconds for one batch in eval mode.

    Attributes:
        choices: The options of each choice of the space, as `options_of` gives them.
        input_shape: The shape of one input, without the batch.
        largest: What the largest network costs, in parameters and multiply-accumulates. Options of the space that no
            choice names, such as the number of classes, show in it.
        tables: For each set of rows, their names joined by spaces, the time of the blocks that follow these rows. It
            has one value for every combination of their options, the last row's varying fastest.
        validation: The predictions compared with measurements.
    """

    space: str
    choices: Mapping[str, Sequence[Any]]
    input_shape: tuple[int, ...]
    largest: Mapping[str, int]
    batch_size: int
    machine: Machine
    tables: Mapping[str, Sequence[float]]
    validation: Validation = field(default_factory=lambda: Validation([], []))

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        content = {"format": FORMAT, "unit": "milliseconds", **asdict(self)}
        write_atomic(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table that `save` wrote.

        Raises:
            TangleNASError: The file is missing, damaged, no latency table, or of another version.
        """
        try:
            content = strict_json.loads(Path(path).read_text("utf-8"))
            version, _ = content.pop("format"), content.pop("unit")
        except OSError as error:
            raise TangleNASError(
                f"latency table {path}: {error.strerror or error}. Make one with `tanglenas latency build`"
            ) from None
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            why = f" ({error})" if isinstance(error, ValueError) else ""
            raise TangleNASError(
                f"{path} is no latency table{why}: expected the JSON that `tanglenas latency build` writes"
            ) from None
        if version != FORMAT:
            raise TangleNASError(
                f"{path} is a latency table of format {version!r}, but this version reads {FORMAT}: build it again "
                "with `tanglenas latency build`"
            )
        try:
            tables = {str(names): [float(v) for v in values] for names, values in content.pop("tables").items()}
            if not all(math.isfinite(v) and v >= 0 for values in tables.values() for v in values):
                raise ValueError("a time that is no finite number of at least 0")
            return cls(
                machine=Machine(**content.pop("machine")),
                validation=Validation(**content.pop("validation")),
                input_shape=tuple(content.pop("input_shape")),
                tables=tables,
                **content,
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise TangleNASError(f"{path} is a damaged latency table: {error}. Build it again") from None

    def terms(self, space: SearchSpace) -> Additive:
        """Return the times as a sum over the rows of a space.

        Raises:
            TangleNASError: The table was measured for another space, other options or another input shape.
        """
        shape = tuple(space.example_input(1).shape[1:])
        for what, mine, given in (
            ("space", self.space, space.name),
            ("input shape", self.input_shape, shape),
            ("choices", {k: list(v) for k, v in self.choices.items()}, options_of(space)),
            ("largest network", dict(self.largest), cost_of_largest(space)),
        ):
            if mine != given:
                options = "" if what == "space" else ", with the options that the search has, such as -o num_classes=10"
                raise TangleNASError(
                    f"the latency table was measured for the {what} {mine!r}, but here it is {given!r}: build one for "
                    f"this with `tanglenas latency build`{options}"
                )
        rows = {row_name(row): row for row in space.rows}
        try:
            tables = {tuple(rows[name] for name in names.split()): values for names, values in self.tables.items()}
        except KeyError as error:
            raise TangleNASError(f"the latency table has the row {error}, which {self.space!r} has not") from None
        for found, values in tables.items():
            if len(values) != math.prod(len(row.options) for row in found):
                raise TangleNASError(f"the latency table has {len(values)} times for {found}: it is damaged")
        return Additive(tables)


class Latency(Objective):
    """The milliseconds for one batch, predicted from a table that `tanglenas latency build` wrote.

    Args:
        table: The path of the table. Its machine is the one that the network is for, not necessarily this one.
    """

    unit = "ms"

    def __init__(self, table: str | Path):
        self.table = LatencyTable.load(data_path(table))
        self.source = f"batches of {self.table.batch_size} on {self.table.machine}"

    def terms(self, space: SearchSpace) -> Additive:
        return self.table.terms(space)


def cost_of_largest(space: SearchSpace) -> dict[str, int]:
    """Return the parameters and the multiply-accumulates of the largest network of a space."""
    cost = space.cost(space.largest())
    return {"params": cost.params, "macs": cost.macs}


def row_name(row: Row) -> str:
    """Return the name of a row in a table, without spaces."""
    return repr(row).replace(" ", "")


def options_of(space: SearchSpace) -> dict[str, list[Any]]:
    """Return the options of every choice. The number of layers follows them where a choice is made per layer."""
    return {
        name: [*choice.options, len(choice)] if choice.layered else [*choice.options]
        for name, choice in space.choices.items()
    }


def _processor() -> str:
    """Return the system's name for the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
