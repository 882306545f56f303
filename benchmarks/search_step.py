"""Seconds and memory of the steps of a search, against training the largest network of its space.

    python -m benchmarks.search_step --space gpt --json
    python -m benchmarks.search_step --space autoformer_t --relaxation gated --rounds 15 --threads 2

All kinds of step take turns, round after round, so that a machine that slows down slows them all. A timed step does
what the stages do: forward, backward, clipping and the step of the optimizer.
"""

from __future__ import annotations

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
from torch import Tensor, nn

from benchmarks.pad_and_sum import pad_and_sum
from tanglenas_engine import Optimizer, SearchSpace, create_optimizer, create_space
from tanglenas_engine.optimizers.optimizer import Batch, Step
from tanglenas_engine.runtime.devices import channels_last
from tanglenas_engine.superposition.mixture import COVERED
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.optim import call_factory, parameter_groups


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

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass
class Bench:
    """A space and its largest standalone network, ready to take steps.

    Attributes:
        steps: Functions that take one step, by kind; their argument is the number of the round.
        prepare: Functions that run before a step is timed, by kind of step.
    """

    space: SearchSpace
    batch: int
    method: str = "drnas"
    naive: bool = True
    sampled: bool = True
    clock: str = "wall"

    def __post_init__(self) -> None:
        space = self.space.train()
        self.plain = space.standalone(space.largest()).train()
        self.optimizer = create_optimizer(self.method)
        self.optimizer.bind(space, seed=0)
        adam = partial(torch.optim.Adam, lr=3e-4, betas=(0.5, 0.999))
        self.alpha_optimizer = call_factory("Adam", adam, self.optimizer.parameters())
        self.weight_optimizer = _adamw(space)
        self.batches = [_batch(space, self.batch) for _ in range(2)]
        self.steps: dict[str, Callable[[int], None]] = {
            "plain": partial(_train, self.plain, _adamw(self.plain), self.batches[0]),
            "weight": self._weight,
            "arch": self._arch,
        }
        self.prepare: dict[str, Callable[[int], None]] = {}
        if self.naive:
            self.steps |= {"naive_weight": partial(self._naive, "weight")}
            self.steps |= {"naive_arch": partial(self._naive, "architecture")}
        if self.sampled:
            self.spos = create_optimizer("spos")
            self.spos.bind(space, seed=0)
            self.prepare["standalone"] = self._extract
            self.steps |= {"spos": partial(self._weight, optimizer=self.spos), "standalone": self._standalone}

    def _step(self, index: int) -> Step:
        return Step(index, self.space, cross_entropy, *self.batches, self.weight_optimizer)

    def _weight(self, index: int, optimizer: Optimizer | None = None) -> None:
        self.weight_optimizer.zero_grad()
        for loss in (optimizer or self.optimizer).weight_losses(self._step(index)):
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.space.parameters(), 5.0)
        self.weight_optimizer.step()

    def _arch(self, index: int) -> None:
        self.optimizer.architecture_backward(self._step(index))
        self.alpha_optimizer.step()

    def _naive(self, stream: str, index: int) -> None:
        """Take a step as published: pad and sum, with gradients for weights and alpha in both kinds of step."""
        relaxation = self.space.relaxation
        if relaxation == "gated":  # Algorithm 1 has no gates
            self.space.relaxation = "exact"
        optimizer = self.weight_optimizer if stream == "weight" else self.alpha_optimizer
        with pad_and_sum():
            self.space.relax(self.optimizer.sample(index, stream))
            loss = cross_entropy(self.space(self.batches[0][0]), self.batches[0][1])
            self.weight_optimizer.zero_grad()
            self.alpha_optimizer.zero_grad()
            torch.autograd.backward(loss)
        if stream == "weight":
            nn.utils.clip_grad_norm_(self.space.parameters(), 5.0)
        optimizer.step()
        if self.space.relaxation != relaxation:
            self.space.relaxation = relaxation

    def _extract(self, index: int) -> None:
        self.network = self.space.extract(self.spos.sample(index, "weight"))
        self.network_optimizer = _adamw(self.network)
        self._standalone(index)  # the optimizer makes its state in this step

    def _standalone(self, index: int) -> None:
        _train(self.network, self.network_optimizer, self.batches[0], index)

    def seconds(self, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
        """Return the seconds of every kind of step in each round."""
        taken: dict[str, list[float]] = {name: [] for name in self.steps}
        now = CLOCKS[self.clock]
        for index in range(warmup + rounds):
            for name, step in self.steps.items():
                self.prepare.get(name, lambda _: None)(index)
                _synchronize()
                start = now()
                step(index)
                _synchronize()
                if index >= warmup:
                    taken[name].append(now() - start)
            gc.collect()
        return taken

    def saved(self) -> dict[str, int]:
        """Return the bytes that one step of each kind keeps for its backward pass."""
        return {name: saved_bytes(self.steps[name], self._parameters()) for name in ("plain", "weight", "arch")}

    def peaks(self) -> dict[str, int]:
        """Return the most bytes that one step of each kind allocates, beyond those that live between steps."""
        return {name: peak_bytes(self.steps[name]) for name in ("plain", "weight", "arch")}

    def _parameters(self) -> set[int]:
        tensors = [
            *self.space.parameters(),
            *self.plain.parameters(),
            *self.optimizer.alphas.values(),
            *self.batches[0],
        ]
        return {t.untyped_storage().data_ptr() for t in [*tensors, *self.batches[1]]}


def saved_bytes(step: Callable[[int], None], known: set[int]) -> int:
    """Return the bytes that a step saves for backward: each storage once, without those at the addresses `known`."""
    # The storages are kept until the end, because a freed address would be used again.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(0)
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(step: Callable[[int], None]) -> int:
    """Return the most bytes that the allocator gives out during a step, beyond those before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(0)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(0)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _train(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, _: int) -> None:
    loss = cross_entropy(network(batch[0]), batch[1])
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimizer.step()


def _adamw(network: nn.Module) -> torch.optim.Optimizer:
    return call_factory("AdamW", partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.05), parameter_groups(network))


def _batch(space: SearchSpace, size: int) -> Batch:
    device = next(space.parameters()).device
    inputs = channels_last(space.example_input(size).to(device))
    with torch.no_grad():
        outputs = space.release()(inputs)
    return inputs, torch.randint(outputs.shape[-1], outputs.shape[:-1], device=device)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(space: SearchSpace, batch: int, rounds: int, memory: bool = True, **options: Any) -> dict[str, Any]:
    """Return medians in seconds, their ratios, and the bytes saved and allocated."""
    bench = Bench(space, batch, **options)
    taken = bench.seconds(rounds)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    search = seconds["weight"] + seconds["arch"]
    found: dict[str, Any] = {name: seconds[name] for name in ("plain", "weight", "arch")}
    found["search_over_plain"] = search / seconds["plain"]
    if bench.naive:
        found["naive"] = seconds["naive_weight"] + seconds["naive_arch"]
        found["naive_over_search"] = found["naive"] / search
    if bench.sampled:
        found |= {"spos": seconds["spos"], "standalone": seconds["standalone"]}
        # Every round samples another network, so the times of one round are compared.
        pairs = zip(taken["spos"], taken["standalone"], strict=True)
        found["spos_over_standalone"] = statistics.median(one / other for one, other in pairs)
    if memory:
        saved, peaks = bench.saved(), bench.peaks()
        found |= {f"saved_{name}": count for name, count in saved.items()}
        found["saved_over_plain"] = max(saved["weight"], saved["arch"]) / saved["plain"]
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
        "torch": torch.__version__,
    }
    found |= measure(made, found["batch"], rounds, memory, method=method, naive=naive, sampled=sampled, clock=clock)
    show(found, as_json)


def show(found: Mapping[str, Any], as_json: bool) -> None:
    """Print figures by name, one in a line or all as one JSON object."""
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    main()
