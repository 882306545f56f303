"""The measurement of a space's latency: the times of its blocks, from which those of whole networks are predicted.

A block is the largest part of a network that depends on few choices: an attention block, a convolution, an edge of a
cell. Each block is measured once for every combination of its options. Equal blocks are measured once. The prediction
is `scale * (sum over the blocks of an architecture) + offset`. Both numbers are fitted to a few whole networks, because
blocks leave out what happens between them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine import (
    Additive,
    Assignment,
    Line,
    Progress,
    Row,
    SearchSpace,
    SilentProgress,
    Size,
    at_least,
    call_with,
    combinations,
    device_of,
    elastic,
)
from tanglenas_objectives.latency_table import (
    LatencyTable,
    Machine,
    Validation,
    cost_of_largest,
    options_of,
    row_name,
)

LEAST_SECONDS = 0.01
"""Seconds that a measurement takes at least: it repeats a call."""

MOST_COMBINATIONS = 36
"""The most combinations of options of a block. A larger part of a network is measured by its own parts."""


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
        batch_size: Inputs per batch. One input of a language model is a block of tokens.
        threads: Threads of torch. None leaves their number as it is.
        device: "cpu", "cuda" or "cuda:0". None takes CUDA where there is one.
        fitted: Random networks that the line is fitted to, besides the smallest and the largest one.
        validated: Random networks that predictions are compared with. They have no part in the fit.
        repeats: Measurements of each block and network. Their median counts.

    Raises:
        TangleNASError: A number is below its minimum, or the device does not exist.
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
        choices=options_of(space),
        input_shape=tuple(example.shape[1:]),
        largest=cost_of_largest(space),
        batch_size=batch_size,
        machine=Machine.here(target, threads),
        tables={" ".join(map(row_name, rows)): values for rows, values in tables.items()},
        validation=Validation([scale * total + offset for total in sums[fitted + 2 :]], measured[fitted + 2 :]),
    )


Picks = tuple[int, ...]
"""The index of the chosen option for each row of a block."""

Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""The shape and type of each input of a call."""


@dataclass(frozen=True, eq=False)
class Block:
    """A part of a network that is measured as a whole.

    Attributes:
        rows: The rows of choices that its layers follow.
        all_rows: Its rows and those of its gates.
        gates: Sizes of the layers around it. The network has the block where all are positive.
    """

    name: str
    module: nn.Module
    rows: tuple[Row, ...]
    all_rows: tuple[Row, ...]
    gates: tuple[Size, ...]

    def there(self, assignment: Assignment) -> bool:
        """Return whether a network with these options has the block."""
        return all(gate.value(assignment) for gate in self.gates)

    def picks(self, assignment: Assignment) -> Picks:
        """Return the options that the assignment gives the block's own rows."""
        return tuple(assignment[row] for row in self.rows)

    def ways(self) -> dict[Picks, list[dict[Row, int]]]:
        """Return, for each combination of `rows`, the assignments of `all_rows` that give a network this block."""
        ways: dict[Picks, list[dict[Row, int]]] = {}
        for assignment in combinations(self.all_rows):
            if self.there(assignment):
                ways.setdefault(self.picks(assignment), []).append(assignment)
        return ways


def find_blocks(space: SearchSpace) -> list[Block]:
    """Return the largest parts of a space that are called with tensors and depend on few choices."""
    gates = {name: there for name, _, there in elastic.walk(space)}
    called = _calls(space, dict(space.named_modules()), space.assignment_of(space.largest()), 1)
    found: list[Block] = []

    def descend(name: str, module: nn.Module) -> None:
        rows = tuple(sorted(_rows(module), key=space.rows.index))
        few = math.prod(len(row.options) for row in rows) <= MOST_COMBINATIONS
        if few and called[name] and not isinstance(module, SearchSpace | elastic.Depth):
            every = {*rows, *(row for gate in gates[name] for row in gate.rows)}
            found.append(Block(name, module, rows, tuple(sorted(every, key=space.rows.index)), gates[name]))
            return
        for key, child in module.named_children():
            descend(f"{name}.{key}" if name else key, child)

    descend("", space)
    return found


def _rows(module: nn.Module) -> set[Row]:
    """Return the rows of choices that the layers in a module follow."""
    layers = [layer for layer in module.modules() if isinstance(layer, elastic.Elastic)]
    return {row for layer in layers for axes in layer.axes.values() for axis in axes for row in axis.size.rows}


Call = tuple[Tensor, ...]


def _calls(
    space: SearchSpace, modules: Mapping[str, nn.Module], assignment: Assignment, batch_size: int
) -> dict[str, list[Call]]:
    """Return the inputs of modules in one forward of an architecture, as meta tensors.

    Nothing is computed, unless the forward needs numbers.
    """
    seen: dict[str, list[Call]] = {name: [] for name in modules}

    def record(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and all(isinstance(x, Tensor) for x in inputs):
                seen[name].append(tuple(x.to("meta") for x in inputs))

        return hook

    tensors = {**dict(space.named_parameters()), **dict(space.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    hooks = [module.register_forward_pre_hook(record(name)) for name, module in modules.items()]
    training = space.training
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            example = space.example_input(batch_size)
            space.eval().superposition.select(assignment)
            try:
                with torch.device("meta"):  # for what the forward makes without a device
                    call_with(space, meta, example.to("meta"))
            except Exception:
                for calls in seen.values():
                    calls.clear()
                space(example.to(next(space.parameters(), example).device))
    finally:
        for hook in hooks:
            hook.remove()
        space.release().train(training)
    return seen


def _measurements(
    space: SearchSpace, blocks: Sequence[Block], batch_size: int, device: torch.device, threads: int
) -> tuple[dict[Any, Callable[[], float]], dict[tuple[Block, Picks], Any]]:
    """Return the measurements by key, and the key for each block and combination of its options.

    Blocks have the same key where their layers, shapes and inputs are equal.
    """
    measures: dict[Any, Callable[[], float]] = {}
    alike: dict[tuple[Block, Picks], Any] = {}
    for block, inputs in zip(blocks, _inputs(space, blocks, batch_size), strict=True):
        for picks, calls in inputs.items():
            module = elastic.plain(block.module, dict(zip(block.rows, picks, strict=True))).eval()
            shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
            alike[block, picks] = key = (repr(module), shapes, _plain_attributes(module), calls)
            if key not in measures:
                measures[key] = _timed(module, calls, device, threads)
    return measures, alike


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, str, Any], ...]:
    """Return what a module and its parts hold besides tensors: a number of heads need not show in a shape or a repr."""
    return tuple(
        (name, key, value)
        for name, part in module.named_modules()
        for key, value in sorted(vars(part).items())
        if isinstance(value, bool | int | float | str)
    )


def _tables(times: Mapping[tuple[Block, Picks], float]) -> dict[tuple[Row, ...], list[float]]:
    """Return, for each set of rows, the time of its blocks for every combination of options."""
    tables: dict[tuple[Row, ...], list[float]] = {(): [0.0]}
    for block in dict.fromkeys(block for block, _ in times):
        table = tables.setdefault(block.all_rows, [0.0] * math.prod(len(row.options) for row in block.all_rows))
        for index, assignment in enumerate(combinations(block.all_rows)):
            if block.there(assignment):
                table[index] += times[block, block.picks(assignment)]
    return tables


def _inputs(space: SearchSpace, blocks: Sequence[Block], batch_size: int) -> list[dict[Picks, tuple[Shapes, ...]]]:
    """Return, for each block and combination of its options, the shapes of its inputs, call by call.

    A forward shows one combination of every block. So each forward takes, block by block, a combination that is not yet
    known and does not contradict the blocks before.
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
    """Return a function that measures the milliseconds of all calls of a module."""
    from torch.utils.benchmark import Timer  # slow to import

    made = [
        # Ones for floats, token 0 for integers.
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
    """Return the median of each measurement's repeats.

    Blocks take turns, so that a disturbance hits few repeats of one block.
    """
    found: dict[Any, list[float]] = {key: [] for key in measures}
    for _ in range(repeats):
        for key, measure in measures.items():
            found[key].append(measure())
            line.advance()
    return {key: statistics.median(times) for key, times in found.items()}


def _line(sums: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Return the scale and offset of least squared relative error, both at least 0."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    weights = [1 / value for value in measured]
    rows = [[total * weight, weight] for total, weight in zip(sums, weights, strict=True)]
    (scale, offset), _ = nnls(rows, [1.0] * len(rows))
    return float(scale), float(offset)
