"""The time of a search step by kind of operator, for masks ("after") and for Algorithm 1 to the letter ("before").

    python -m benchmarks.profile --space gpt
    python -m benchmarks.profile --space autoformer_t --relaxation gated --top 8

Every operator that torch's profiler sees belongs to one of a few kinds. Its own time is counted, without that of the
operators that it calls. The rest of a step is Python's and the profiler's. Kinds of step take turns. Their milliseconds
are shares of the processor time that a step takes without the profiler.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import click

import benchmarks.pad_and_sum
from benchmarks.search_step import PRESETS, Bench, Preset  # sets a variable that torch's profiler reads on import

import torch  # isort: skip
from torch import Tensor, nn

from tanglenas_engine import SearchSpace, create_space, elastic
from tanglenas_engine.elastic import Elastic
from tanglenas_engine.superposition.mixture import COVERED, Superposition

FORWARD, INPUTS, WEIGHTS, BOTH = "products forward", "input gradients", "weight gradients", "gradients of convolutions"
ATTENTION, NORMS, MASKS, REST = "attention", "norms", "masks", "activations, sums, copies"
OPTIMIZER, PYTHON = "clipping, optimizer", "Python, profiler"
KINDS = (FORWARD, INPUTS, WEIGHTS, BOTH, ATTENTION, NORMS, MASKS, REST, OPTIMIZER, PYTHON)

BACKWARD = "autograd::engine::evaluate_function: "
NAMES = {
    "scaled_dot_product": ATTENTION,
    "LayerNorm": NORMS,
    "layer_norm": NORMS,
    "batch_norm": NORMS,
    "_Masked": MASKS,
    "Optimizer.": OPTIMIZER,
}
"""Kinds by a part of an operator's name. Other operators take the kind of the part of the program they run in."""


@contextmanager
def labelled() -> Iterator[None]:
    """Tell the profiler, within the block, which parts of the program run."""
    parts: list[tuple[Any, str, str]] = [
        (Superposition, "relax", MASKS),
        (Elastic, "current", MASKS),
        (Elastic, "covered", MASKS),
        (benchmarks.pad_and_sum, "_current", MASKS),
        (elastic.Attention, "forward", ATTENTION),
        (nn.utils, "clip_grad_norm_", OPTIMIZER),
    ]
    with ExitStack() as stack:
        for owner, name, kind in parts:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, _recorded(getattr(owner, name), kind))
        yield


def _recorded(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @wraps(function)
    def recorded(*arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(kind):
            return function(*arguments, **options)

    return recorded


def profiled(step: Callable[[], None], positions: int) -> tuple[Counter[str], Counter[str]]:
    """Return the microseconds of a step by kind, and by kind and operator.

    Args:
        positions: The positions (tokens) in the whole batch, over which the gradient of a weight sums.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        with torch.profiler.record_function(PYTHON):
            step()
    events: list[Any] = list(profile.events() or ())
    # A backward node is the gradient of the operator with its number; the innermost of these comes last.
    forwards = {event.sequence_nr: event for event in events if event.sequence_nr >= 0 and not _node(event)}
    kinds: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for event in events:
        python = "::" not in event.name or event.name.startswith(BACKWARD)  # not an operator of torch
        kind = PYTHON if python else _kind(event, forwards, positions)
        kinds[kind] += event.self_cpu_time_total
        if not python:
            operators[f"{kind}: {event.name.removeprefix('aten::')}"] += event.self_cpu_time_total
    return kinds, operators


def _kind(event: Any, forwards: Mapping[int, Any], positions: int) -> str:
    for one in _outwards(event):
        if one.name in ("aten::mm", "aten::addmm"):
            left, right = [shape for shape in one.input_shapes if len(shape) == 2][-2:]
            if not _node(one):
                return FORWARD
            return WEIGHTS if positions == left[1] == right[0] else INPUTS
        if one.name == "aten::convolution_backward":
            return {(True, False): INPUTS, (False, True): WEIGHTS}.get(tuple(one.concrete_inputs[-1][:2]), BOTH)
        if one.name == "aten::convolution":
            return FORWARD
        for part, kind in NAMES.items():
            if part in one.name:
                return kind
        if one.name in KINDS:
            return REST if one.name == PYTHON else str(one.name)
        if one.name.startswith(BACKWARD) and one.sequence_nr in forwards:
            kind = _kind(forwards[one.sequence_nr], {}, positions)
            return REST if kind == FORWARD else kind  # the shapes have told products apart above
    return REST


def _node(event: Any) -> Any:
    """Return the node of the backward pass that an operator belongs to, or None."""
    return next((one for one in _outwards(event) if one.name.startswith(BACKWARD)), None)


def _outwards(event: Any) -> Iterator[Any]:
    """Yield an operator, its caller, the caller of that, and so on."""
    while event is not None:
        yield event
        event = event.cpu_parent


def measure(space: SearchSpace, batch: int, rounds: int, naive: bool = True) -> tuple[Any, Any]:
    """Return the milliseconds of each kind of step, `{step: {kind: ms}}`, and the same by kind and operator."""
    bench = Bench(space, batch, naive=naive, sampled=False, clock="processor")
    positions = _positions(space, bench.batches[0][0])
    kinds: dict[str, Counter[str]] = {name: Counter() for name in bench.steps}
    operators: dict[str, Counter[str]] = {name: Counter() for name in bench.steps}
    seconds = {name: statistics.median(times) for name, times in bench.seconds(rounds, warmup=1).items()}
    with labelled():
        for index in range(rounds):
            for name, step in bench.steps.items():
                for total, one in zip(
                    (kinds[name], operators[name]), profiled(partial(step, index), positions), strict=True
                ):
                    total.update(one)
    for name, total in kinds.items():
        scale = 1e3 * seconds[name] / total.total()
        kinds[name] = Counter({kind: count * scale for kind, count in total.items()})
        operators[name] = Counter({operator: count * scale for operator, count in operators[name].items()})
    return kinds, operators


def _positions(space: SearchSpace, inputs: Tensor) -> int:
    """Return the number of rows that most matrix products multiply: the tokens of the batch."""
    rows: Counter[int] = Counter()
    hooks = [
        module.register_forward_hook(lambda _, given, __: rows.update([given[0].numel() // given[0].shape[-1]]))
        for module in space.modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        space.release()(inputs)
    for hook in hooks:
        hook.remove()
    return rows.most_common(1)[0][0] if rows else 0


def _print(found: Mapping[str, Counter[str]], rows: Sequence[str]) -> None:
    width = max(map(len, rows))
    click.echo(f"| {'ms':{width}} | " + " | ".join(f"{name:>12}" for name in found) + " |")
    click.echo(f"| {'-' * width} | " + " | ".join("-" * 11 + ":" for _ in found) + " |")
    for row in rows:
        click.echo(f"| {row:{width}} | " + " | ".join(f"{total[row]:12.1f}" for total in found.values()) + " |")
    whole = " | ".join(f"{total.total():12.1f}" for total in found.values())
    click.echo(f"| {'all':{width}} | {whole} |\n")


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--space", default="gpt", help="Name of a search space; the presets are those of search_step.")
@click.option("--relaxation", type=click.Choice(list(COVERED)), default="exact")
@click.option("--batch", type=int, help="Inputs in a batch; by default the preset's, or 8.")
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--naive/--no-naive", default=True, help="Profile pad-and-sum too.")
@click.option("--top", default=0, help="List so many operators too: those that take most in any kind of step.")
def main(space: str, relaxation: str, batch: int | None, rounds: int, naive: bool, top: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    preset = PRESETS.get(space, Preset(8))
    made = create_space(space, **preset.options, relaxation=relaxation)
    kinds, operators = measure(made, batch or preset.batch, rounds, naive)
    _print(kinds, [kind for kind in KINDS if any(total[kind] for total in kinds.values())])
    plain = kinds["plain"]
    constant = plain.total() - plain[WEIGHTS] - plain[OPTIMIZER]
    if not plain[BOTH]:  # the two gradients of a convolution come together
        click.echo(f"forward and input gradients alone: {constant / plain.total():.2f} of a plain step")
    if top:
        most = Counter(
            {name: max(total[name] for total in operators.values()) for total in operators.values() for name in total}
        )
        click.echo()
        _print(operators, [name for name, _ in most.most_common(top)])


if __name__ == "__main__":
    main()
