"""Batches: an endless training stream that can start at any step, and a single pass for evaluation."""

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from threading import Thread
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.runtime.seeding import seeded

from .dataset import Samples, TensorSamples

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs (B, C, H, W) and targets (B,), or tokens (B, T) and the tokens that follow them (B, T)."""

HELD_BYTES = 2**30
"""The largest split, in bytes, that stays on the device from one pass to the next."""

GRACE = 0.5
"""Seconds in which the loader may end its workers itself. One that is killed between two batches may hold its locks."""


class Stream:
    """An endless stream of training batches. Batch number t depends on (seed, t) only.

    Each epoch is a permutation of its own, cut into full batches; the remaining samples are skipped in this epoch. A
    resumed run starts the stream at its step, so a checkpoint needs no loader state. The number of workers and the
    global generators do not affect the batches, and the stream does not change the global generators.

    Args:
        samples: The samples to draw from.
        batch_size: The number of samples per batch.
        seed: The seed. Streams that run side by side (weights, architecture) need different seeds.
        num_workers: The number of processes that load ahead. 0 loads in this process, which is fastest for data in
            memory.
        part: (number from 0, count): each batch is cut into `count` equal parts, and this stream yields one of them. So
            the ranks of a job share the batches. Each part has its own augmentation.

    Raises:
        TangleNASError: The batch size is no whole number, below 1, above the number of samples, or not a multiple of
            the number of parts, or the number of workers is no whole number or below 0.
    """

    def __init__(
        self, samples: Samples, batch_size: int, *, seed: int, num_workers: int = 0, part: tuple[int, int] = (0, 1)
    ) -> None:
        at_least("batch_size", batch_size, 1)
        at_least("num_workers", num_workers, 0)
        if batch_size > len(samples):
            raise TangleNASError(
                f"batch size {batch_size} is larger than the {len(samples)} samples to draw from. "
                f"Use at most {len(samples)}, or more data."
            )
        if batch_size % part[1]:
            raise TangleNASError(
                f"batch size {batch_size} cannot be shared equally: use a multiple of {part[1]}, the number of "
                "processes times that of accumulated batches."
            )
        self.samples = samples
        self.batch_size = batch_size
        self.part = part
        self.seed = seed
        self.num_workers = num_workers

    @property
    def batches_per_epoch(self) -> int:
        """The number of full batches in an epoch."""
        return len(self.samples) // self.batch_size

    def start(self, step: int = 0) -> Iterator[Batch]:
        """Return an endless iterator over the batches from number `step` on.

        Raises:
            TangleNASError: The step is negative.
        """
        if step < 0:
            raise TangleNASError(f"a stream starts at step 0 or later, not at {step}.")
        return _load(self.samples, self._plan(step), self.num_workers)

    def batch(self, step: int) -> Batch:
        """Return batch number `step` again. It is loaded in this process."""
        return next(_load(self.samples, self._plan(step), 0))

    def _plan(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """Yield for each batch from `step` on the seed of its augmentation, and the indices of this part of it."""
        number, parts = self.part
        size = self.batch_size // parts
        purpose = f"augmentation {number}" if number else "augmentation"
        while True:
            epoch, position = divmod(step, self.batches_per_epoch)
            generator = torch.Generator().manual_seed(_derive(self.seed, "order", epoch))
            order = torch.randperm(len(self.samples), generator=generator)
            for i in range(position, self.batches_per_epoch):
                start = i * self.batch_size + number * size
                yield _derive(self.seed, purpose, step), order[start : start + size]
                step += 1


def batches(
    samples: Samples, batch_size: int, indices: Tensor | None = None, *, num_workers: int = 0
) -> Iterator[Batch]:
    """Yield all samples, or those at `indices` (n,), once and in order. The last batch may be smaller.

    Augmented samples are the same in every call.

    Raises:
        TangleNASError: The batch size is no whole number of at least 1, or the number of workers none of at least 0.
    """
    at_least("batch_size", batch_size, 1)
    at_least("num_workers", num_workers, 0)
    order = torch.arange(len(samples)) if indices is None else indices
    plan = (
        (_derive(0, "sequential", start), order[start : start + batch_size])
        for start in range(0, len(order), batch_size)
    )
    return _load(samples, plan, num_workers)


def held(samples: Samples, batch_size: int, device: torch.device) -> Samples:
    """Return the samples on a device, so that a second pass fetches nothing, or as they are if they are too many."""
    stream = batches(samples, batch_size)
    first = next(stream)
    if sum(tensor.nbytes for tensor in first) / len(first[0]) * len(samples) > HELD_BYTES:
        return samples
    inputs, targets = zip(first, *stream, strict=True)
    return TensorSamples(torch.cat(inputs).to(device), torch.cat(targets).to(device))


def _derive(seed: int, purpose: str, number: int) -> int:
    """Return a seed that differs for each purpose and number. Seeds of the form seed + number would overlap."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=7).digest())


def _load(samples: Samples, plan: Iterator[tuple[int, Tensor]], num_workers: int) -> Iterator[Batch]:
    return _load_ahead(samples, plan, num_workers) if num_workers else (_batch(samples, *planned) for planned in plan)


def _batch(samples: Samples, seed: int, indices: Tensor) -> Batch:
    with seeded(seed, accelerators=False):  # augmentation runs on the CPU
        return samples.batch(indices)


class _Sent(TorchDataset[Batch | str]):
    """A torch dataset of whole batches, each with the seed of its augmentation, or with an error's sentence instead.

    torch would wrap the sentence in a traceback. The error itself may be of a class that cannot be sent.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, planned: tuple[int, list[int]]) -> Batch | str:
        seed, indices = planned
        try:
            return _batch(self.samples, seed, torch.tensor(indices))
        except TangleNASError as error:
            return str(error)


def _load_ahead(samples: Samples, plan: Iterator[tuple[int, Tensor]], num_workers: int) -> Iterator[Batch]:
    """Yield the batches of a plan, which workers load. The workers end with this generator, or with this process."""
    ends, end = multiprocessing.Pipe(duplex=False)
    with ends, end:
        loaded = iter(
            DataLoader(
                _Sent(samples),
                batch_size=None,
                # A slice of a tensor would send the whole permutation to the worker; a list does not.
                sampler=((seed, indices.tolist()) for seed, indices in plan),
                num_workers=num_workers,
                collate_fn=_as_is,
                pin_memory=torch.cuda.is_available(),
                # The loader draws a seed for its workers. A generator of its own leaves the global one unchanged.
                generator=torch.Generator(),
                worker_init_fn=partial(_outlast_signals, ends),
            )
        )
        # The loader waits for its workers, so that they are told before. A reference cycle with the loader calls this
        # first, and so does the end of this process.
        end_workers = Finalize(loaded, end.send_bytes, (b"end",), exitpriority=0)
        try:
            for batch in loaded:
                if isinstance(batch, str):
                    raise TangleNASError(batch)
                yield batch
        finally:
            end_workers()


def _as_is(batch: Any) -> Any:
    return batch


def _outlast_signals(ends: Connection, worker: int) -> None:
    """Make a worker outlast the signals that ask a training to stop, so that the training can finish its step and save.

    Ctrl-C, schedulers and `timeout` send them to all processes of a run. Without signals, a worker ends when there is
    something to read from `ends`, or its parent is gone, also in the middle of a batch.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def end() -> None:
        wait([ends, parent.sentinel])
        time.sleep(GRACE)
        os._exit(0)

    Thread(target=end, daemon=True).start()
