"""Training with several processes: each rank computes a part of every batch, and all ranks hold the same state.

    TANGLENAS_NPROC=4 dvc repro                                     one machine
    torchrun --nproc-per-node 4 -m pipelines.search FILE.gin ...    the same by hand; docs/distributed.md has more

Search, retrain and evaluate share their work if a process group exists. In a single process, every function here does
nothing or returns its argument.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.devices import own_device

T = TypeVar("T")
S = TypeVar("S")

WAIT = timedelta(days=7)
"""How long a rank waits for a value of another one, which may train a network of a race, or download the data.

A dead rank is noticed before: its connections close, and torchrun ends the others. The exchanges of tensors in a step
keep the shorter limit of torch, after which NCCL's watchdog ends ranks that hang.
"""

STOPPING = 3600
"""The seconds that processes have to stop after a signal, if TORCH_ELASTIC_SHUTDOWN_TIMEOUT does not say them.

They finish a step, or the validation of an epoch, and save a checkpoint. torchrun kills them after 30 s otherwise.
"""

_apart = False  # inside the block of `apart`
_values: Any = None  # the group that exchanges values; None is the default group


class LostError(TangleNASError):
    """The error on a rank after another rank failed or disappeared."""


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _joined() else 1


def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's part of a list: every `world_size()`th item."""
    return items[rank() :: world_size()]


def map_over_ranks(function: Callable[[T], S], items: Sequence[T]) -> list[S]:
    """Return the results of a function for all items, in order and on all ranks. The ranks share the work.

    The results must be of a type that `gather` accepts.
    """
    shares = gather([function(item) for item in shard(items)])
    return [shares[number % world_size()][number // world_size()] for number in range(len(items))]


@contextmanager
def apart() -> Iterator[None]:
    """Act as a single process inside the block: no function here talks to other ranks."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


# --- starting and ending ---------------------------------------------------------------------------------------


def relaunch(module: str, arguments: Sequence[str]) -> None:
    """Start the running program, `python -m MODULE ...`, as TANGLENAS_NPROC processes; exit when they have finished.

    The function does nothing if the variable is unset or 1, if torchrun started this process, or if the running program
    is not `module`.

    Raises:
        TangleNASError: TANGLENAS_NPROC is not a whole number of at least 1.
        SystemExit: The processes finished. The status is that of the first one that failed, 130 after an interruption,
            or 0.
    """
    count = os.environ.get("TANGLENAS_NPROC") or "1"
    if not count.isdecimal() or int(count) < 1:
        raise TangleNASError(f"TANGLENAS_NPROC is {count!r}, expected a whole number of at least 1: how many processes")
    running = getattr(sys.modules["__main__"], "__spec__", None)
    if int(count) == 1 or "RANK" in os.environ or running is None or running.name != module:
        return
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOPPING))
    try:
        main(["--standalone", f"--nproc-per-node={count}", "-m", module, *arguments])
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        status = failure.exitcode
        if status < 0:  # a killed process says nothing itself
            print(_ended(module, failure.local_rank, int(count), -status), file=sys.stderr)
        raise SystemExit(status if status > 0 else 1) from None
    except SignalException:
        raise SystemExit(130) from None
    raise SystemExit


def _ended(module: str, rank: int, count: int, number: int) -> str:
    """Return what to do after a process was killed by a signal."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    memory = ", as the system does where memory is short" if name == "SIGKILL" else ""
    return (
        f"{module.rpartition('.')[2]}: process {rank} of {count} was ended by {name}{memory}. Run the same "
        "command again to go on from the last checkpoint"
    )


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group that torchrun started, inside the block."""
    global _values
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _joined():
        yield
        return
    if torch.cuda.is_available() and os.environ.get("TANGLENAS_DEVICE") != "cpu":
        torch.cuda.set_device(own_device())
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        _values = dist.new_group(backend="gloo", timeout=WAIT)  # values such as decisions are exchanged between CPUs
        yield
    finally:
        _values = None
        dist.destroy_process_group()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Let rank 0 pass the block before the other ranks enter it.

    Raises:
        LostError: Rank 0 failed in the block. The other ranks raise this with the message of its error.
    """
    if rank() > 0 and (problem := broadcast(None)) is not None:
        raise LostError(problem)
    try:
        yield
    except BaseException as error:
        if rank() == 0:
            broadcast(str(error) or type(error).__name__)
        raise
    if rank() == 0:
        broadcast(None)


def seed_ranks_apart() -> None:
    """Give every rank except rank 0 its own random numbers, so that dropout differs between the parts of a batch."""
    if rank() > 0:
        torch.manual_seed((torch.initial_seed() + rank() * 0x9E3779B97F4A7C15) % 2**63)


# --- tensors ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def average(tensors: Iterable[Tensor | None]) -> None:
    """Set tensors in place to their means over the ranks. There is one exchange per data type and device.

    All ranks must call this with equally many tensors of the same shapes. None entries are skipped.
    """
    if not _joined():
        return
    for group, flat in _flattened(tensors):
        with _talking():
            dist.all_reduce(flat)
        _spread(flat / world_size(), group)


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the means of tensors over the ranks, as constants.

    An optimizer calls this if it uses a gradient before the search does. The search itself averages the gradients in
    `grad`.
    """
    constants = [tensor.detach() for tensor in tensors]
    if _joined():
        constants = [tensor.clone() for tensor in constants]
        average(constants)
    return constants


@torch.no_grad()
def synchronize(tensors: Iterable[Tensor]) -> None:
    """Set tensors in place to their values on rank 0."""
    if not _joined():
        return
    for group, flat in _flattened(tensors):
        with _talking():
            dist.broadcast(flat, 0)
        _spread(flat, group)


def check_equal(tensors: Iterable[Tensor]) -> None:
    """Check that all ranks hold the same values.

    Raises:
        TangleNASError: The ranks hold different values, so each would find its own architecture.
    """
    if not _joined():
        return
    sums = [tensor.detach().double().abs().sum().cpu() for tensor in tensors]
    if any(not torch.equal(torch.stack(sums), torch.stack(other)) for other in gather(sums)):
        raise TangleNASError(
            f"the {world_size()} processes no longer hold the same weights: something in the space or the optimizer "
            "draws random numbers of its own. What is sampled has to be a function of the seed and the step"
        )


# --- values ----------------------------------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks, on every rank.

    Args:
        value: Tensors, numbers, strings, and lists, tuples and dicts of them. They are unpickled with
            `weights_only=True`.
    """
    if not _joined():
        return [value]
    packed = _packed(value)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world_size())]
    with _talking():
        dist.all_gather(sizes, torch.tensor([len(packed)]), group=_values)
        length = max(int(size) for size in sizes)
        padded = [torch.zeros(length, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(padded, torch.nn.functional.pad(packed, (0, length - len(packed))), group=_values)
    return [_unpacked(one[: int(size)]) for one, size in zip(padded, sizes, strict=True)]


def broadcast(value: T) -> T:
    """Return rank 0's value on every rank. The value must be of a type that `gather` accepts."""
    if not _joined():
        return value
    packed = _packed(value if rank() == 0 else None)
    size = torch.tensor([len(packed)])
    with _talking():
        dist.broadcast(size, 0, group=_values)
        packed = packed if rank() == 0 else torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(packed, 0, group=_values)
    return value if rank() == 0 else _unpacked(packed)


def sum_over_ranks(numbers: Sequence[float]) -> list[float]:
    """Return the sums of numbers over the ranks."""
    if not _joined():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    with _talking():
        dist.all_reduce(sums, group=_values)
    return sums.tolist()


def any_rank(flag: bool) -> bool:
    """Return True if the flag is set on any rank."""
    return flag if not _joined() else sum_over_ranks([float(flag)])[0] > 0


# --- inside ----------------------------------------------------------------------------------------------------


def _joined() -> bool:
    return not _apart and dist.is_available() and dist.is_initialized()


def _flattened(tensors: Iterable[Tensor | None]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield the tensors of each data type and device with a 1d copy of all their values, which is exchanged."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor is not None:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        yield group, torch.cat([tensor.reshape(-1) for tensor in group])


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _packed(value: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Any:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        _lost(error)


def _lost(error: RuntimeError) -> NoReturn:
    reason = re.sub(r"^\[[^]]*\] ", "", str(error)).splitlines()[0].split(". ")[0]
    raise LostError(
        f"process {rank()} of {world_size()} has lost another ({reason}). Run the same command again to go on from the "
        "last checkpoint"
    ) from error
