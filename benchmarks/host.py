"""What the host does in a step of the search stage: waits for the device, launches, and Python.

    python -m benchmarks.device --parts host

On a GPU the host enqueues the operations of a step, and a step costs no more than its operations while the host is
ahead of the device. It falls behind where it waits for a value, or where a network has many short operations.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.search_step import synchronize
from tanglenas_engine import SearchSpace, create_optimizer
from tanglenas_engine.stages.search import Search
from tanglenas_engine.testing import random_data
from tanglenas_engine.training.loop import Summand
from tanglenas_engine.training.losses import cross_entropy
from tanglenas_engine.training.optim import cosine
from tanglenas_engine.training.options import Computation, Session

READS = ("aten::_local_scalar_dense", "aten::nonzero")
"""Operators that read a tensor's values, for which the host waits."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")

WARMUP = 4


class Watched(Search):
    """A search that measures its steps: first with the clock, then for waits, by torch's profiler and by Python's."""

    def __init__(self, space: SearchSpace, batch: int, device: str, method: str, computation: Computation, steps: int):
        super().__init__(
            space,
            create_optimizer(method),
            random_data(space, ("weights", "architecture", "validation"), samples=2 * batch),
            epochs=WARMUP + steps,
            seconds=None,
            clock="processor",
            batch_size=batch,
            weight_optimizer=partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.05),
            architecture_optimizer=partial(torch.optim.Adam, lr=3e-4, betas=(0.5, 0.999)),
            scheduler=cosine,
            warmup_epochs=0,
            path_epochs=0,
            targets=(),
            band=None,
            order=None,
            order_layers=False,
            stop=None,
            loss=cross_entropy,
            recalibration_batches=0,
            seed=0,
            table=None,
            computation=computation,
            session=Session(device=device),
        )
        self.timed = range(WARMUP, WARMUP + steps)
        self.enqueued: list[float] = []
        self.taken: list[float] = []
        self.found: dict[str, Any] = {}

    def step(self, position: int) -> dict[str, Summand]:
        step = partial(super().step, position)
        after = position - self.timed.stop
        if position in self.timed:
            return self._timed(step)
        if after in (0, 1):
            return self._waits(step)
        if after == 2:
            return self._profiled(step)
        if after == 3:
            return self._python(step)
        return step()

    def _timed(self, step: Any) -> Any:
        synchronize(self.device)
        began = time.perf_counter()
        measured = step()
        self.enqueued.append(time.perf_counter() - began)
        synchronize(self.device)
        self.taken.append(time.perf_counter() - began)
        return measured

    def _waits(self, step: Any) -> Any:
        """Note where a step waits for the device."""
        cuda = self.device.type == "cuda"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                measured = step()
            finally:
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{_short(w.filename)}:{w.lineno}" for w in caught if "synchroniz" in str(w.message).lower())
        self.found |= {"waits": sum(places.values()), "waits_by_line": dict(places)}
        return measured

    def _profiled(self, step: Any) -> Any:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            measured = step()
        # The profiler waits for the device at its end, which is no part of the step.
        averages = {event.key: event for event in profile.key_averages()}
        counts = {name: event.count for name, event in averages.items()}
        operators = sorted(averages.values(), key=lambda event: -event.self_cpu_time_total)
        kernels = sorted(averages.values(), key=lambda event: -event.self_device_time_total)
        # On a CPU a fused optimizer reads its count of steps; on a GPU it does not.
        reads = [e for e in profile.events() or () if e.name in READS and not _within_optimizer(e)]
        self.found |= {
            "reads": len(reads),
            "profiler_waits": {name: counts[name] for name in WAITS if name in counts},
            "launches": sum(counts.get(name, 0) for name in LAUNCHES),
            "operators": sum(count for name, count in counts.items() if name.startswith("aten::")),
            "copies_to_host": sum(count for name, count in counts.items() if name.startswith("Memcpy DtoH")),
            "device_seconds": 1e-6 * sum(event.self_device_time_total for event in averages.values()),
            "by_operator": [[e.key[:80], e.count, round(1e-3 * e.self_cpu_time_total, 3)] for e in operators[:25]],
            "by_kernel": [
                [e.key[:80], e.count, round(1e-3 * e.self_device_time_total, 3)]
                for e in kernels[:25]
                if e.self_device_time_total
            ],
        }
        return measured

    def _python(self, step: Any) -> Any:
        profile = cProfile.Profile()
        measured = profile.runcall(step)
        stats: Any = pstats.Stats(profile)
        rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])
        self.found["by_function"] = [
            [f"{_short(file)}:{line} {name}", calls, round(1e3 * own, 3), round(1e3 * whole, 3)]
            for (file, line, name), (_, calls, own, whole, _) in rows[:40]
        ]
        return measured

    def figures(self) -> dict[str, Any]:
        """Return the figures of the steps that were taken."""
        enqueued, taken = statistics.median(self.enqueued), statistics.median(self.taken)
        return {
            "enqueue_seconds": enqueued,
            "step_seconds": taken,
            "host_share": enqueued / taken,
            **self.found,
            "device_share": self.found["device_seconds"] / taken,
        }


def watched(
    space: SearchSpace,
    batch: int,
    device: str,
    steps: int = 10,
    method: str = "drnas",
    computation: Computation = Computation("bfloat16"),
) -> dict[str, Any]:
    """Return the figures of steps of a search: seconds, waits, launches, and milliseconds by operator and function."""
    # Two batches make an epoch, so twice as many steps as epochs are taken: the timed ones and four after them.
    search = Watched(space.to(device), batch, device, method, computation, max(steps, 4))
    search.result()
    return search.figures()


def _within_optimizer(event: Any) -> bool:
    while event is not None and not event.name.startswith("Optimizer."):
        event = event.cpu_parent
    return event is not None


def _short(file: str) -> str:
    parts = Path(file).parts
    return "/".join(parts[-2:])
