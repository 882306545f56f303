"""Seconds and memory of the steps of a search, against training the largest network of its space.

    python -m benchmarks.search_step --space gpt --json
    python -m benchmarks.search_step --space autoformer_t --relaxation gated --rounds 15 --threads 2

All kinds of step take turns, round after round, so that a machine that slows down slows them all. A timed step does
what the stages do: forward, backward, clipping and the step of the optimizer, in the precision of the stages' option
and compiled by their code. "tf32" is float32 with products rounded as TF32 does it, on a GPU that has it.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences torch's profiler, which counts memory

import torch
from torch import nn

from benchmarks.pad_and_sum import pad_and_sum
from tanglenas_engine import Optimizer, SearchSpace, create_optimizer, create_space
from tanglenas_engine.optimizers.optimizer import Batch, Step
from tanglenas_engine.runtime.devices import channels_last
from tanglenas_engine.superposition.mixture import COVERED
from tanglenas_engine.training.bytes import peak_bytes, saved_bytes
from tanglenas_engine.training.execution import PRECISIONS, Compiled, Graphed, executing, uncached
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.optim import call_factory, parameter_groups
from tanglenas_engine.training.options import Computation


@dataclass(frozen=True)
class Preset:
    """The batch and the options at which a space is measured by default."""

    batch: int
    options: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    # A batch has 1,024 tokens, which are characters.
    "gpt": Preset(
        4,
        {
            "layers": (4, 5, 6), "embed_dim": (192, 288, 384), "num_heads": (2, 4, 6), "mlp_ratio": (2, 3, 4),
            "vocab_size": 66, "block_size": 256,
        },
    ),
    "autoformer_t": Preset(16, {"image_size": 112}),
    "mobilenetv3": Preset(16, {"image_size": 128}),
    "toy_conv_macro": Preset(64),
}  # fmt: skip

TF32 = "tf32"
"""The name of float32 with products in TF32. The stages have no option for it: it is a setting of the process."""

KINDS = ("plain", "weight", "arch")

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass
class Bench:
    """A space and its largest standalone network, ready to take steps.

    Args:
        space: The space, on the device of the steps.
        batch: The number of inputs in a batch.
        method: A search method that learns the architecture.
        naive: True measures pad-and-sum too, which is never compiled.
        sampled: True measures a step of spos against the sampled network's.
        clock: A key of `CLOCKS`.
        computation: The precision, and whether plain and search steps are compiled.
        graphs: True replays plain and search steps as CUDA graphs, on a GPU. The kind "eager" is then a plain step
            without one.
        repeat: The number of steps that are timed as one, but for `naive`. On a GPU the next step is enqueued while
            one is computed.

    Attributes:
        steps: Functions that take one step, by kind; their argument is the number of the round.
        prepare: Functions that run before a step is timed, by kind of step.
        enqueued: The seconds until a step was enqueued, by kind of step, as `seconds` last found them. On a CPU they
            are those of the step.
    """

    space: SearchSpace
    batch: int
    method: str = "drnas"
    naive: bool = True
    sampled: bool = True
    clock: str = "wall"
    computation: Computation = Computation()
    repeat: int = 1
    graphs: bool = False

    def __post_init__(self) -> None:
        space, backend = self.space.train(), self.computation.backend
        self.device = next(space.parameters()).device
        self.precision = self.computation.precise(self.device)
        self.scaler = self.precision.scaler
        self.ways = [self.precision.forward, *([] if backend is None else [Compiled(space, backend).forward])]
        if self.graphs:
            self.ways.insert(1, Graphed(space).forward)
        self.enqueued: dict[str, list[float]] = {}
        self.plain = space.standalone(space.largest()).to(self.device).train()
        plain = self.plain if backend is None else torch.compile(self.plain, dynamic=False, backend=backend)
        self.optimizer = create_optimizer(self.method)
        self.optimizer.bind(space, seed=0)
        adam = partial(torch.optim.Adam, lr=3e-4, betas=(0.5, 0.999))
        self.alpha_optimizer = call_factory("Adam", adam, self.optimizer.parameters())
        self.weight_optimizer = _adamw(space)
        self.batches = [_batch(space, self.batch) for _ in range(2)]
        self.steps: dict[str, Callable[[int], None]] = {
            "plain": partial(self._train, plain, _adamw(self.plain), self.batches[0]),
            "weight": self._weight,
            "arch": self._arch,
        }
        self.prepare: dict[str, Callable[[int], None]] = {}
        if self.graphs:
            eager = copy.deepcopy(self.plain)
            with self.precision.autocast, uncached(self.device.type):
                torch.cuda.make_graphed_callables(self.plain, (self.batches[0][0],))
            self.steps["eager"] = partial(self._train, eager, _adamw(eager), self.batches[0])
        if self.naive:
            self.steps |= {"naive_weight": partial(self._naive, "weight")}
            self.steps |= {"naive_arch": partial(self._naive, "architecture")}
        if self.sampled:
            self.spos = create_optimizer("spos")
            self.spos.bind(space, seed=0)
            self.prepare["standalone"] = self._extract
            self.steps |= {"spos": partial(self._weight, optimizer=self.spos), "standalone": self._standalone}

    def _step(self, index: int) -> Step:
        scale = self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else 1.0
        return Step(index, self.space, cross_entropy, *self.batches, self.weight_optimizer, scale=scale)

    def _weight(self, index: int, optimizer: Optimizer | None = None) -> None:
        self.weight_optimizer.zero_grad()
        with executing(self.space, *self.ways):
            for loss in (optimizer or self.optimizer).weight_losses(self._step(index)):
                torch.autograd.backward(self.scaler.scale(loss))
        self._move(self.weight_optimizer, self.space)

    def _arch(self, index: int) -> None:
        with executing(self.space, *self.ways):
            self.optimizer.architecture_backward(self._step(index))
        self._move(self.alpha_optimizer)

    def _train(self, network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, _: int) -> None:
        optimizer.zero_grad()
        with self.precision.autocast:
            loss = cross_entropy(network(batch[0]), batch[1])
        torch.autograd.backward(self.scaler.scale(loss))
        self._move(optimizer, network)

    def _move(self, optimizer: torch.optim.Optimizer, clipped: nn.Module | None = None) -> None:
        self.scaler.unscale_(optimizer)
        if clipped is not None:
            nn.utils.clip_grad_norm_(clipped.parameters(), 5.0)
        self.scaler.step(optimizer)
        self.scaler.update()

    def _naive(self, stream: str, index: int) -> None:
        """Take a step as published: pad and sum, with gradients for weights and alpha in both kinds of step."""
        relaxation = self.space.relaxation
        if relaxation == "gated":  # Algorithm 1 has no gates
            self.space.relaxation = "exact"
        optimizer = self.weight_optimizer if stream == "weight" else self.alpha_optimizer
        self.weight_optimizer.zero_grad()
        self.alpha_optimizer.zero_grad()
        with pad_and_sum(), executing(self.space, self.precision.forward):
            self.space.relax(self.optimizer.sample(index, stream))
            loss = cross_entropy(self.space(self.batches[0][0]), self.batches[0][1])
            torch.autograd.backward(self.scaler.scale(loss))
        self._move(optimizer, self.space if stream == "weight" else None)
        if self.space.relaxation != relaxation:
            self.space.relaxation = relaxation

    def _extract(self, index: int) -> None:
        self.network = self.space.extract(self.spos.sample(index, "weight"))
        self.network_optimizer = _adamw(self.network)
        self._standalone(index)  # the optimizer makes its state in this step

    def _standalone(self, index: int) -> None:
        self._train(self.network, self.network_optimizer, self.batches[0], index)

    def seconds(self, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
        """Return the seconds of every kind of step in each round."""
        taken: dict[str, list[float]] = {name: [] for name in self.steps}
        self.enqueued = {name: [] for name in self.steps}
        now = CLOCKS[self.clock]
        for index in range(warmup + rounds):
            for name, step in self.steps.items():
                self.prepare.get(name, lambda _: None)(index)
                repeat = 1 if name.startswith("naive") else self.repeat
                synchronize(self.device)
                start = now()
                for number in range(repeat):
                    step(index * repeat + number)
                enqueued = now()
                synchronize(self.device)
                if index >= warmup:
                    taken[name].append((now() - start) / repeat)
                    self.enqueued[name].append((enqueued - start) / repeat)
            gc.collect()
        return taken

    def saved(self) -> dict[str, int]:
        """Return the bytes that one step of each kind keeps for its backward pass."""
        return {name: saved_bytes(partial(self.steps[name], 0), self._parameters()) for name in KINDS}

    def peaks(self) -> dict[str, int]:
        """Return the most bytes that one step of each kind allocates, beyond those that live between steps."""
        peaks = {}
        for name in KINDS:
            # Gradients of the step before would count as bytes that live between steps, and a step drops them.
            self.plain.zero_grad()
            self.space.zero_grad()
            peaks[name] = peak_bytes(partial(self.steps[name], 0), self.device)
        return peaks

    def _parameters(self) -> set[int]:
        tensors = [
            *self.space.parameters(),
            *self.plain.parameters(),
            *self.optimizer.alphas.values(),
            *self.batches[0],
        ]
        return {t.untyped_storage().data_ptr() for t in [*tensors, *self.batches[1]]}


def _adamw(network: nn.Module) -> torch.optim.Optimizer:
    return call_factory("AdamW", partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.05), parameter_groups(network))


def _batch(space: SearchSpace, size: int) -> Batch:
    device = next(space.parameters()).device
    inputs = channels_last(space.example_input(size).to(device))
    with torch.no_grad():
        outputs = space.release()(inputs)
    return inputs, torch.randint(outputs.shape[-1], outputs.shape[:-1], device=device)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished what was enqueued. A CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(space: SearchSpace, batch: int, rounds: int, memory: bool = True, **options: Any) -> dict[str, Any]:
    """Return what `figures` does, of a new bench."""
    return figures(Bench(space, batch, **options), rounds, memory)


def figures(bench: Bench, rounds: int, memory: bool = True) -> dict[str, Any]:
    """Return medians in seconds, their ratios, and the bytes saved and allocated."""
    taken = bench.seconds(rounds)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    search = seconds["weight"] + seconds["arch"]
    found: dict[str, Any] = {name: seconds[name] for name in KINDS}
    if bench.device.type == "cuda":
        found |= {f"enqueue_{name}": statistics.median(bench.enqueued[name]) for name in KINDS}
    found["search_over_plain"] = search / seconds["plain"]
    if bench.graphs:
        found |= {"eager": seconds["eager"], "search_over_eager": search / seconds["eager"]}
        found["reserved"] = torch.cuda.max_memory_reserved(bench.device)
    if bench.naive:
        found["naive"] = seconds["naive_weight"] + seconds["naive_arch"]
        found["naive_over_search"] = found["naive"] / search
    if bench.sampled:
        found |= {"spos": seconds["spos"], "standalone": seconds["standalone"]}
        # Every round samples another network, so the times of one round are compared.
        pairs = zip(taken["spos"], taken["standalone"], strict=True)
        found["spos_over_standalone"] = statistics.median(one / other for one, other in pairs)
    memory = memory and not bench.graphs  # a graph has memory of its own, which nothing allocates in a step
    if memory and bench.computation.backend is None:  # what compiled code keeps is not told to hooks
        saved = bench.saved()
        found |= {f"saved_{name}": count for name, count in saved.items()}
        found["saved_over_plain"] = max(saved["weight"], saved["arch"]) / saved["plain"]
    if memory:
        peaks = bench.peaks()
        found |= {f"peak_{name}": count for name, count in peaks.items()}
        found["peak_memory_over_plain"] = max(peaks["weight"], peaks["arch"]) / peaks["plain"]
    return found


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--space", default="gpt", help="Name of a search space.")
@click.option("--relaxation", type=click.Choice(list(COVERED)), default="exact")
@click.option("--optimizer", "method", default="drnas", help="A search method that learns the architecture.")
@click.option("--batch", type=int, help="Inputs in a batch; by default what PRESETS has for the space, or 8.")
@click.option("--image-size", type=int, help="Pixels; by default what PRESETS has for the space.")
@click.option("--rounds", type=click.IntRange(1), default=11, help="Steps of each kind that are timed.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch; by default its own choice.")
@click.option(
    "--clock",
    type=click.Choice(list(CLOCKS)),
    default="wall",
    help="What is measured: with one thread of a machine that is shared, the processor's time says more.",
)
@click.option("--device", default="cpu")
@click.option("--precision", type=click.Choice([TF32, *PRECISIONS]), default="float32")
@click.option("--compile", "compiled", is_flag=True, help="Compile plain and search steps with torch.compile.")
@click.option("--repeat", type=click.IntRange(1), default=1, help="Steps of a kind that are timed as one, on a GPU 3.")
@click.option("--naive/--no-naive", default=True, help="Measure pad-and-sum too.")
@click.option("--sampled/--no-sampled", default=True, help="Measure a step of spos against the sampled network's.")
@click.option("--memory/--no-memory", default=True, help="Count bytes saved and allocated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    space: str,
    relaxation: str,
    method: str,
    batch: int | None,
    image_size: int | None,
    rounds: int,
    threads: int | None,
    clock: str,
    device: str,
    precision: str,
    compiled: bool,
    repeat: int,
    naive: bool,
    sampled: bool,
    memory: bool,
    as_json: bool,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    preset = PRESETS.get(space, Preset(8))
    options = preset.options | ({} if image_size is None else {"image_size": image_size})
    made = create_space(space, **options, relaxation=relaxation).to(device)
    found: dict[str, Any] = {
        "space": space,
        "relaxation": relaxation,
        "optimizer": method,
        "options": options,
        "batch": batch or preset.batch,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "clock": clock,
        "device": device,
        "precision": precision,
        "compile": compiled,
        "torch": torch.__version__,
    }
    found |= measure(
        made,
        found["batch"],
        rounds,
        memory,
        method=method,
        naive=naive,
        sampled=sampled,
        clock=clock,
        computation=computation(precision, compiled),
        repeat=repeat,
    )
    show(found, as_json)


def computation(precision: str, compiled: bool | str) -> Computation:
    """Return the options of the stages for a precision or "tf32", and set how this process multiplies float32."""
    torch.set_float32_matmul_precision("high" if precision == TF32 else "highest")
    return Computation("float32" if precision == TF32 else precision, compiled or False)


def show(found: Mapping[str, Any], as_json: bool) -> None:
    """Print figures by name, one in a line or all as one JSON object."""
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    main()
