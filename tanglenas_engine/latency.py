"""Latency: the building blocks of a space measured on a machine, and the time of whole networks from them.

A block is the largest part of a network that depends on few choices: an attention block, a convolution, an edge of a
cell. Each is measured once for every combination of its options, and blocks that are alike are measured once. The sum
over the blocks of an architecture, put right by a line that is fitted to a few whole networks (what happens between the
blocks is in none of them), is the prediction. As a sum of tables over rows of choices it has an exact expectation under
a mixture, which a search can follow, and budgets can be met in it exactly.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic, plain
from tanglenas_engine.elastic.depth import Depth, walk
from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.runtime.devices import device_of
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.runtime.progress import Line, Progress, SilentProgress
from tanglenas_engine.spaces.cost import Additive
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.size import Assignment, Row, Size, combinations

FORMAT = 1
"""Version of the file format."""

LEAST_SECONDS = 0.01
"""A measurement repeats a call until it takes so long."""

MOST_COMBINATIONS = 36
"""A part of a network with more combinations of options than this is measured by its parts."""


@dataclass(frozen=True)
class Machine:
    """What times depend on, beside the network."""

    processor: str
    threads: int
    torch_version: str

    @classmethod
    def here(cls, device: torch.device, threads: int) -> Self:
        cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if cuda else _processor()
        return cls(name, threads, torch.__version__.split("+")[0])

    def __str__(self) -> str:
        return f"{self.processor}, {self.threads} thread{'s'[: self.threads > 1]}, torch {self.torch_version}"


@dataclass(frozen=True)
class Validation:
    """How predictions compare with networks that had no part in the fit: times in milliseconds."""

    predicted: list[float]
    measured: list[float]

    @property
    def spearman(self) -> float:
        """Rank correlation, from -1 to 1."""
        from scipy.stats import spearmanr  # type: ignore[import-untyped]

        return float(spearmanr(self.predicted, self.measured).statistic)

    @property
    def relative_error(self) -> float:
        """Mean of |predicted - measured| / measured."""
        return statistics.fmean(abs(p - m) / m for p, m in zip(self.predicted, self.measured, strict=True))


@dataclass(frozen=True)
class LatencyTable:
    """Times of a space's blocks in milliseconds for one batch in eval mode, by rows of choices.

    `tables` has, under the names of rows joined by spaces, the sum over blocks of those rows for every combination of
    their options, the last row's varying fastest.
    """

    space: str
    choices: Mapping[str, Sequence[Any]]
    input_shape: tuple[int, ...]
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
            TangleNASError: There is none, or it is of another kind or version.
        """
        try:
            content = json.loads(Path(path).read_text())
            version, _ = content.pop("format"), content.pop("unit")
        except OSError as error:
            raise TangleNASError(
                f"latency table {path}: {error.strerror or error}. Make one with `tanglenas latency build`"
            ) from None
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise TangleNASError(
                f"{path} is no latency table: expected the JSON that `tanglenas latency build` writes"
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
        """The table over the rows of a space.

        Raises:
            TangleNASError: It was measured on another space, or with other options or inputs.
        """
        shape = tuple(space.example_input(1).shape[1:])
        for what, mine, given in (
            ("space", self.space, space.name),
            ("input shape", self.input_shape, shape),
            ("choices", {k: list(v) for k, v in self.choices.items()}, _options(space)),
        ):
            if mine != given:
                raise TangleNASError(
                    f"the latency table was measured for the {what} {mine!r}, but here it is {given!r}: build one for "
                    "this with `tanglenas latency build`"
                )
        rows = {_named(row): row for row in space.rows}
        try:
            tables = {tuple(rows[name] for name in names.split()): values for names, values in self.tables.items()}
        except KeyError as error:
            raise TangleNASError(f"the latency table has the row {error}, which {space.label} has not") from None
        for found, values in tables.items():
            if len(values) != math.prod(len(row.options) for row in found):
                raise TangleNASError(f"the latency table has {len(values)} times for {found}: it is damaged")
        return Additive(tables)


class Latency(Objective):
    """Milliseconds for one batch, predicted from a table that `tanglenas latency build` wrote.

    Args:
        table: The file. It may come from another machine: the one that the network is for.
    """

    unit = "ms"

    def __init__(self, table: str | Path):
        self.table = LatencyTable.load(table)
        self.source = f"batches of {self.table.batch_size} on {self.table.machine}"

    def terms(self, space: SearchSpace) -> Additive:
        return self.table.terms(space)


def measure_latency(
    space: SearchSpace,
    *,
    batch_size: int = 1,
    threads: int | None = None,
    device: str | None = None,
    fitted: int = 8,
    validated: int = 32,
    repeats: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the blocks of a space on this machine, fit the line, and validate on other networks.

    Args:
        batch_size: Inputs a batch; tokens come in blocks.
        threads: That torch uses; None leaves its number.
        fitted: Random networks that the line is fitted to, besides the smallest and the largest one.
        validated: Random networks that predictions are compared with.
        repeats: Measurements of each block and network, spread over the time; their median counts.

    Raises:
        TangleNASError: An option cannot be.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1), ("fitted", fitted, 0), ("validated", validated, 0), ("repeats", repeats, 1),
    ):  # fmt: skip
        at_least(name, value, least)
    target = device_of(device)
    threads = torch.get_num_threads() if threads is None else at_least("threads", threads, 1)
    generator = torch.Generator().manual_seed(seed)
    networks = [space.smallest(), space.largest(), *(space.sample(generator) for _ in range(fitted + validated))]
    example = space.example_input(batch_size)
    whole: Shapes = ((tuple(example.shape), example.dtype),)

    measures, alike = _measurements(space, find_blocks(space), batch_size, target, threads)
    with (progress or SilentProgress()).stage("latency", repeats * (len(measures) + len(networks)), 0) as line:
        times = _medians(measures, repeats, line)
        # One network at a time: together they may be more than memory holds.
        measured = [
            _medians({0: _timed(space.standalone(a).eval(), [whole], target, threads)}, repeats, line)[0]
            for a in networks
        ]

    tables = _tables({place: times[key] for place, key in alike.items()})
    sums = [float(Additive(tables).cost(space.assignment_of(architecture))) for architecture in networks]
    scale, offset = _line(sums[: fitted + 2], measured[: fitted + 2])
    tables = {rows: [scale * value + (0 if rows else offset) for value in values] for rows, values in tables.items()}
    return LatencyTable(
        space=space.name,
        choices=_options(space),
        input_shape=tuple(example.shape[1:]),
        batch_size=batch_size,
        machine=Machine.here(target, threads),
        tables={" ".join(map(_named, rows)): values for rows, values in tables.items()},
        validation=Validation([scale * total + offset for total in sums[fitted + 2 :]], measured[fitted + 2 :]),
    )


Picks = tuple[int, ...]
"""The chosen option of each row of a block."""

Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""Shape and type of each input of a call."""


@dataclass(frozen=True, eq=False)
class Block:
    """A part of a network that is measured as a whole.

    `rows` are those that it follows itself, `all_rows` also those of its `gates`, which decide whether it is there.
    """

    name: str
    module: nn.Module
    rows: tuple[Row, ...]
    all_rows: tuple[Row, ...]
    gates: tuple[Size, ...]

    def there(self, assignment: Assignment) -> bool:
        return all(gate.value(assignment) for gate in self.gates)

    def picks(self, assignment: Assignment) -> Picks:
        return tuple(assignment[row] for row in self.rows)

    def ways(self) -> dict[Picks, list[dict[Row, int]]]:
        """For each combination of `rows` the assignments of `all_rows` in which a network has it."""
        ways: dict[Picks, list[dict[Row, int]]] = {}
        for assignment in combinations(self.all_rows):
            if self.there(assignment):
                ways.setdefault(self.picks(assignment), []).append(assignment)
        return ways


def find_blocks(space: SearchSpace) -> list[Block]:
    """The parts of a space that are called with tensors and depend on few choices, none inside another."""
    gates = {name: there for name, _, there in walk(space)}
    called = _calls(space, dict(space.named_modules()), space.assignment_of(space.largest()), 1)
    found: list[Block] = []

    def descend(name: str, module: nn.Module) -> None:
        rows = tuple(sorted(_rows(module), key=space.rows.index))
        few = math.prod(len(row.options) for row in rows) <= MOST_COMBINATIONS
        if few and called[name] and not isinstance(module, SearchSpace | Depth):
            every = {*rows, *(row for gate in gates[name] for row in gate.rows)}
            found.append(Block(name, module, rows, tuple(sorted(every, key=space.rows.index)), gates[name]))
            return
        for key, child in module.named_children():
            descend(f"{name}.{key}" if name else key, child)

    descend("", space)
    return found


def _rows(module: nn.Module) -> set[Row]:
    """The rows of choices that what is in a module follows."""
    layers = [layer for layer in module.modules() if isinstance(layer, Elastic)]
    return {row for layer in layers for axes in layer.axes.values() for axis in axes for row in axis.size.rows}


Call = tuple[Tensor, ...]


def _calls(
    space: SearchSpace, modules: Mapping[str, nn.Module], assignment: Assignment, batch_size: int
) -> dict[str, list[Call]]:
    """The inputs that modules get in one forward of an architecture: meta tensors, since nothing is computed."""
    seen: dict[str, list[Call]] = {name: [] for name in modules}

    def record(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and all(isinstance(x, Tensor) for x in inputs):
                seen[name].append(inputs)

        return hook

    tensors = {**dict(space.named_parameters()), **dict(space.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    hooks = [module.register_forward_pre_hook(record(name)) for name, module in modules.items()]
    training = space.training
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            example = space.example_input(batch_size).to("meta")
            space.superposition.select(assignment)
            torch.func.functional_call(space.eval(), meta, (example,))
    finally:
        for hook in hooks:
            hook.remove()
        space.release().train(training)
    return seen


def _measurements(
    space: SearchSpace, blocks: Sequence[Block], batch_size: int, device: torch.device, threads: int
) -> tuple[dict[Any, Callable[[], float]], dict[tuple[Block, Picks], Any]]:
    """What to measure, by key, and for each block and combination of its options the key that stands for it."""
    measures: dict[Any, Callable[[], float]] = {}
    alike: dict[tuple[Block, Picks], Any] = {}
    for block, inputs in zip(blocks, _inputs(space, blocks, batch_size), strict=True):
        for picks, calls in inputs.items():
            module = plain(block.module, dict(zip(block.rows, picks, strict=True))).eval()
            shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
            alike[block, picks] = key = (repr(module), shapes, calls)
            if key not in measures:
                measures[key] = _timed(module, calls, device, threads)
    return measures, alike


def _tables(times: Mapping[tuple[Block, Picks], float]) -> dict[tuple[Row, ...], list[float]]:
    """For all rows of blocks, the sum of their times for every combination of options."""
    tables: dict[tuple[Row, ...], list[float]] = {(): [0.0]}
    for block in dict.fromkeys(block for block, _ in times):
        table = tables.setdefault(block.all_rows, [0.0] * math.prod(len(row.options) for row in block.all_rows))
        for index, assignment in enumerate(combinations(block.all_rows)):
            if block.there(assignment):
                table[index] += times[block, block.picks(assignment)]
    return tables


def _inputs(space: SearchSpace, blocks: Sequence[Block], batch_size: int) -> list[dict[Picks, tuple[Shapes, ...]]]:
    """For each block and combination of its options, what it is called with in a forward, call by call.

    A forward shows one combination of every block: each is made of such as are still unknown, as far as they agree.
    """
    modules = {str(number): block.module for number, block in enumerate(blocks)}
    unknown = [block.ways() for block in blocks]
    found: list[dict[Picks, tuple[Shapes, ...]]] = [{} for _ in blocks]
    largest = space.assignment_of(space.largest())
    while any(unknown):
        decided: dict[Row, int] = {}
        for left in unknown:
            ways = (way for ways in left.values() for way in ways)
            agree = (way for way in ways if all(decided.get(row, option) == option for row, option in way.items()))
            decided.update(next(agree, {}))
        assignment = {**largest, **decided}
        calls = _calls(space, modules, assignment, batch_size)
        for number, (block, left) in enumerate(zip(blocks, unknown, strict=True)):
            picks = block.picks(assignment)
            if picks in left and block.there(assignment):
                del left[picks]
                found[number][picks] = tuple(
                    tuple((tuple(x.shape), x.dtype) for x in call) for call in calls[str(number)]
                )
    return found


def _timed(module: nn.Module, calls: Sequence[Shapes], device: torch.device, threads: int) -> Callable[[], float]:
    """Measures the milliseconds of all calls of a module, anew each time that it is called."""
    from torch.utils.benchmark import Timer  # who only reads a table need not load it

    made = [
        # Ones, or token 0.
        tuple(torch.full(shape, dtype.is_floating_point, dtype=dtype, device=device) for shape, dtype in call)
        for call in calls
    ]
    module = module.to(device)
    timer = Timer("for call in calls: module(*call)", globals={"calls": made, "module": module}, num_threads=threads)

    @torch.inference_mode()
    def measure() -> float:
        once = timer.timeit(1).mean
        return float(timer.timeit(max(1, math.ceil(LEAST_SECONDS / max(once, 1e-9)))).mean) * 1e3

    return measure


def _medians(measures: Mapping[Any, Callable[[], float]], repeats: int, line: Line) -> dict[Any, float]:
    """The median of each measurement's repeats, one of all after the other: what disturbs a moment spoils few."""
    found: dict[Any, list[float]] = {key: [] for key in measures}
    for _ in range(repeats):
        for key, measure in measures.items():
            found[key].append(measure())
            line.advance()
    return {key: statistics.median(times) for key, times in found.items()}


def _line(sums: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Scale and offset, neither negative, of least squared relative error."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    weights = [1 / value for value in measured]
    rows = [[total * weight, weight] for total, weight in zip(sums, weights, strict=True)]
    (scale, offset), _ = nnls(rows, [1.0] * len(rows))
    return float(scale), float(offset)


def _named(row: Row) -> str:
    return repr(row).replace(" ", "")


def _options(space: SearchSpace) -> dict[str, list[Any]]:
    """The options of every choice, and behind them the number of layers of one that is made per layer."""
    return {
        name: [*choice.options, len(choice)] if choice.layered else [*choice.options]
        for name, choice in space.choices.items()
    }


def _processor() -> str:
    """The name of the processor, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
