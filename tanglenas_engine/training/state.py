"""The schema of a checkpoint: what it holds is compared with the training that takes it, before anything is loaded.

A checkpoint's sha256 tells damage and not forgery. Fused optimizer steps trust the shapes and strides of their state,
so a forged state could read and write memory that is not its own.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tanglenas_engine.errors import TangleNASError, shown
from tanglenas_engine.runtime.checkpoint import native

MERSENNE_WORDS = 624
"""The number of 32-bit words in the state of NumPy's MT19937."""
SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
"""Optimizer state whose values are squares, so that none is negative."""


class Stateful(Protocol):
    """An object that a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class UnfitError(TangleNASError):
    """The error for a checkpoint that cannot be a state of the training that reads it."""


def check_part(name: str, part: Stateful, given: Any, position: int) -> None:
    """Check a part of a checkpoint against the object that takes it.

    Args:
        name: The name of the part in messages.
        part: The object at the start of its training.
        given: The state in the checkpoint.
        position: The number of steps that the part has taken.

    Raises:
        UnfitError: `given` is no state of `part`. The message says where.
    """
    if isinstance(part, torch.optim.Optimizer):
        _check_optimizer(name, part, given, position)
        return
    # A schedule's numbers may turn into fractions, as a rate of 1 does.
    check_like(name, native(part.state_dict()), given, whole=not hasattr(part, "step"))
    if type(part) is LambdaLR:
        _check_rates(name, part, given, position)
    elif isinstance(part, torch.amp.GradScaler):
        _number(f"{name}.scale", given["scale"], least=2.0**-126)


def check_like(where: str, own: Any, given: Any, whole: bool = True) -> None:
    """Check that a value has the structure of another: types, names, lengths, and shapes and dtypes of tensors.

    A number is finite where that of this training is, and NaN only where that is. A floating-point tensor is finite. A
    value for None may be a number.

    Args:
        where: The name of the value in messages.
        own: The value of this training.
        given: The value in the checkpoint.
        whole: True if whole numbers stay so.

    Raises:
        UnfitError: The structures differ. The message says where.
    """
    if isinstance(own, Tensor):
        _check_tensor(where, given, own.shape, own.dtype)
    elif isinstance(own, Mapping):
        _keys(where, own, given)
        for key, value in own.items():
            check_like(f"{where}.{key}", value, given[key], whole)
    elif isinstance(own, list | tuple):
        if type(given) is not type(own) or len(given) != len(own):
            _unfit(where, given, f"a {type(own).__name__} of {len(own)}")
        for number, (value, other) in enumerate(zip(own, given, strict=True)):
            check_like(f"{where}[{number}]", value, other, whole)
    elif own is None:
        if given is not None:
            _number(where, given)
    elif isinstance(own, int | float) and not isinstance(own, bool):
        if whole and isinstance(own, int) and not isinstance(given, int):
            _unfit(where, given, "a whole number")
        if not math.isnan(own) or not isinstance(given, float):
            _number(where, given, infinite=math.isinf(own))
    elif type(given) is not type(own):
        _unfit(where, given, f"a {type(own).__name__}")


def options_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return the options in the groups of an optimizer as plain values that no step moves."""
    return [{key: _plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.generic):
        return _plain(value.tolist()) if value.ndim == 0 else type(value).__name__
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)  # a rate of 1 is one of 1.0
    return value if value is None or isinstance(value, bool | str) else type(value).__name__


def check_start(own: Mapping[str, list[dict[str, Any]]], given: Any) -> None:
    """Check that the optimizers of a checkpoint began with the options that those of this training begin with.

    Args:
        own: The options in the groups of each optimizer, by its name.
        given: Those in the checkpoint.

    Raises:
        UnfitError: An option differs. The message says which.
    """
    _keys("start", own, given)
    for name, groups in own.items():
        if not isinstance(given[name], list) or len(given[name]) != len(groups):
            _unfit(f"start.{name}", given[name], f"{len(groups)} groups")
        for number, (group, other) in enumerate(zip(groups, given[name], strict=True)):
            where = f"start.{name}[{number}]"
            _keys(where, group, other)
            for key, value in group.items():
                if repr(other[key]) != repr(value):
                    _unfit(f"{where}.{key}", other[key], shown(value, 60))


def check_history(history: Any, like: Mapping[str, Any] | None, epochs: int) -> None:
    """Check the records of the epochs that a training has finished.

    Args:
        history: The records in the checkpoint.
        like: What a record holds, or None for anything. "stopped" is there if a training can end early. NaN stands for
            a number that need not be finite.
        epochs: The number of finished epochs.

    Raises:
        UnfitError: A record is missing, or cannot be one of this training.
    """
    if not isinstance(history, list) or len(history) != epochs:
        _unfit("history", history, f"the records of {epochs} epochs")
    for number, record in enumerate(history, 1):
        where = f"history[{number}]"
        if not isinstance(record, dict) or not all(isinstance(name, str) for name in record):
            _unfit(where, record, "a record")
        if type(record.get("epoch")) is not int or record["epoch"] != number:
            _unfit(f"{where}.epoch", record.get("epoch"), str(number))
        if "stopped" in record:
            may = number == epochs and (like is None or "stopped" in like)
            if not may or not isinstance(record["stopped"], str):
                _unfit(f"{where}.stopped", record["stopped"], "a training that goes on")
        if like is None:
            continue
        for name, value in like.items():
            if name != "stopped":
                if name not in record:
                    _unfit(where, sorted(record), f"a record with {name}")
                check_like(f"{where}.{name}", value, record[name])
                if name.endswith("accuracy") and not 0 <= record[name] <= 100:
                    _unfit(f"{where}.{name}", record[name], "0 to 100 %")
        for name, value in record.items():
            if name not in like and (isinstance(value, bool) or not isinstance(value, int | float)):
                _unfit(f"{where}.{name}", value, "a number")


def check_ranks(ranks: Any, between_epochs: bool) -> None:
    """Check the sums of the epoch and the random generators that each rank saved.

    Args:
        ranks: The list in the checkpoint.
        between_epochs: True if no step of the current epoch was taken.

    Raises:
        UnfitError: A sum is not a finite scalar, or a generator's state is none. NumPy does not check the position in
            its own generator's state, and would read beside it.
    """
    if not isinstance(ranks, list) or not ranks:
        _unfit("ranks", ranks, "the states of one process or more")
    for number, rank in enumerate(ranks):
        where = f"ranks[{number}]"
        _keys(where, {"sums": 0, "rng": 0}, rank)
        if not isinstance(rank["sums"], dict) or bool(rank["sums"]) == between_epochs:
            _unfit(f"{where}.sums", rank["sums"], "the sums of the steps of this epoch")
        if rank["sums"].keys() != ranks[0]["sums"].keys():
            _unfit(f"{where}.sums", sorted(map(str, rank["sums"])), "the sums that the first process has")
        for name, value in rank["sums"].items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                _unfit(f"{where}.sums.{name}", value, "a floating-point tensor")
            _check_tensor(f"{where}.sums.{name}", value, torch.Size(), value.dtype)
        _check_generators(f"{where}.rng", rank["rng"])


def _check_generators(where: str, given: Any) -> None:
    _keys(where, {"torch": 0, "python": 0, "numpy": 0}, given, more=("cuda",))
    for name in ("torch", "cuda"):
        if name in given:
            own = torch.get_rng_state() if name == "torch" else given[name]
            if not isinstance(given[name], Tensor) or given[name].dim() != 1:
                _unfit(f"{where}.{name}", given[name], "the state of a generator")
            _check_tensor(f"{where}.{name}", given[name], own.shape, torch.uint8)
    try:
        random.Random().setstate(given["python"])
        torch.Generator().set_state(given["torch"])
    except Exception:
        _unfit(where, "another state", "states of the generators of Python and torch")
    numpy = given["numpy"]
    own_numpy = {**np.random.get_state(legacy=False)}
    _keys(f"{where}.numpy", own_numpy, numpy)
    _keys(f"{where}.numpy.state", {"key": 0, "pos": 0}, numpy["state"])
    if numpy["bit_generator"] != own_numpy["bit_generator"]:
        _unfit(f"{where}.numpy.bit_generator", numpy["bit_generator"], str(own_numpy["bit_generator"]))
    key, pos = numpy["state"]["key"], numpy["state"]["pos"]
    words = isinstance(key, list) and len(key) == MERSENNE_WORDS
    if not words or any(type(word) is not int or not 0 <= word < 2**32 for word in key):
        _unfit(f"{where}.numpy.state.key", key, f"{MERSENNE_WORDS} words of 32 bits")
    if type(pos) is not int or not 0 <= pos <= MERSENNE_WORDS:
        _unfit(f"{where}.numpy.state.pos", pos, f"0 to {MERSENNE_WORDS}")
    if numpy["has_gauss"] not in (0, 1):
        _unfit(f"{where}.numpy.has_gauss", numpy["has_gauss"], "0 or 1")
    _number(f"{where}.numpy.gauss", numpy["gauss"])


# --- optimizers and schedules -------------------------------------------------------------------------------------


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, given: Any, position: int) -> None:
    own = native(optimizer.state_dict())
    _keys(name, own, given)
    exact = type(optimizer).__module__.startswith("torch.optim.")
    groups = given["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        _unfit(f"{name}.param_groups", groups, f"{len(own['param_groups'])} groups")
    for number, (group, mine) in enumerate(zip(groups, own["param_groups"], strict=True)):
        _check_group(f"{name}.param_groups[{number}]", mine, group, exact)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(given["state"], dict):
        _unfit(f"{name}.state", given["state"], "a dict")
    fused = any(group.get("fused") for group in optimizer.param_groups)
    stepped = _state_after_a_step(optimizer)
    storages: set[int] = set()
    for number, entry in given["state"].items():
        where = f"{name}.state[{shown(number, 40)}]"
        if type(number) is not int or not 0 <= number < len(parameters):
            _unfit(where, number, f"one of {len(parameters)} parameters")
        like = stepped.get(number) if stepped is not None else None
        if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            _unfit(where, entry, "a dict")
        if like is not None:
            _keys(where, like, entry, more=() if exact else tuple(entry))
        for key, value in entry.items():
            _check_entry(f"{where}.{key}", (like or {}).get(key), value, fused)
            if key == "step" and not 0 <= float(value) <= max(position, 1) * (1 if exact else 2**31):
                _unfit(f"{where}.{key}", float(value), f"at most the {position} steps that were taken")
            if key in SQUARES and isinstance(value, Tensor) and bool((value < 0).any()):
                _unfit(f"{where}.{key}", "negative values", "squares")
            if exact and isinstance(value, Tensor) and value.numel():
                storage = value.untyped_storage().data_ptr()
                if storage in storages:
                    _unfit(f"{where}.{key}", "memory that another tensor has", "memory of its own")
                storages.add(storage)


def _check_group(where: str, own: Mapping[str, Any], given: Any, exact: bool) -> None:
    """Check the options of a group, of which a schedule or the optimizer may have moved the numbers, and added others.

    All else is as it was, such as the parameters, or the flags that choose how a step is computed. An optimizer that is
    none of torch's (`exact` is false) may also have put a number in the place of None.
    """
    for key, value in own.items():
        if not isinstance(given, Mapping) or key not in given:
            _unfit(where, given, f"a dict with {key}")
        if key == "params" or isinstance(value, bool | str) or (exact and value is None):
            if type(given[key]) is not type(value) or given[key] != value:
                _unfit(f"{where}.{key}", given[key], shown(value, 60))
        else:
            check_like(f"{where}.{key}", value, given[key], whole=False)


def _check_entry(where: str, like: Any, given: Any, fused: bool) -> None:
    if isinstance(like, Tensor):
        _check_tensor(where, given, like.shape, like.dtype)
        # A fused step goes through a parameter and its state in the order in which they lie in memory.
        if fused and _steps(given) != _steps(like):
            _unfit(where, f"strides {given.stride()}", f"strides {like.stride()}")
    elif like is not None:
        check_like(where, like, given)
    elif isinstance(given, Tensor):
        _check_tensor(where, given, given.shape, given.dtype)


def _steps(tensor: Tensor) -> list[int]:
    """Return the strides of a tensor, without those of dimensions of size 1, which are arbitrary."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _state_after_a_step(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]] | None:
    """Return the state that the optimizer has after its first step, or None for one whose step cannot be tried.

    A copy takes the step, with zero gradients, on copies of the parameters that lie in memory as these do.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    twins: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("cpu", copy=True)) for p in parameters}
    for twin in twins.values():
        twin.grad = torch.zeros_like(twin)
    try:
        trial = copy.deepcopy(optimizer, dict(twins))
        trial.step()
        state: dict[int, dict[str, Any]] = trial.state_dict()["state"]
    except Exception:  # its step takes more than gradients, such as a closure
        return None
    return state


def _check_rates(name: str, schedule: LambdaLR, given: Any, position: int) -> None:
    """Check a schedule by a function of the step, such as `cosine`: all that it has follows from the step."""
    wanted = {"last_epoch": position, "base_lrs": schedule.base_lrs}
    if all(isinstance(rule, FunctionType) for rule in schedule.lr_lambdas):  # an object may have a state of its own
        rates = [base * rule(position) for base, rule in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        wanted["_last_lr"] = rates
    for key, value in wanted.items():
        if given[key] != value:
            _unfit(f"{name}.{key}", given[key], shown(value, 60))


# --- inside -------------------------------------------------------------------------------------------------------


def _check_tensor(where: str, given: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    expected = f"a tensor of shape {tuple(shape)} and {dtype}"
    if not isinstance(given, Tensor):
        _unfit(where, given, expected)
    plain = given.layout == torch.strided and not given.is_meta and not given.is_quantized
    if not plain or given.requires_grad or given.is_neg() or given.is_conj():
        _unfit(where, f"a tensor that is not plain ({given.layout})", expected)
    if given.shape != shape or given.dtype != dtype:
        _unfit(where, f"a tensor of shape {tuple(given.shape)} and {given.dtype}", expected)
    if given.is_floating_point() and not bool(given.isfinite().all()):
        _unfit(where, "values that are not finite", "finite values")


def _number(where: str, given: Any, least: float = -math.inf, infinite: bool = False) -> None:
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or math.isnan(given) or (math.isinf(given) and not infinite) or given < least:
        expected = "a number" if infinite else "a finite number"
        _unfit(where, given, expected + f" of at least {least:g}" * (least > -math.inf))


def _keys(where: str, own: Mapping[Any, Any], given: Any, more: Sequence[str] = ()) -> None:
    if not isinstance(given, Mapping):
        _unfit(where, given, "a dict")
    missing = [key for key in own if key not in given]
    foreign = [key for key in given if key not in own and key not in more]
    if missing or foreign:
        what = f"without {shown(missing[0], 60)}" if missing else f"with {shown(foreign[0], 60)}"
        _unfit(where, f"a dict {what}", f"{len(own)} entries of this training's names")


def _unfit(where: str, given: Any, expected: str) -> NoReturn:
    kind = given if isinstance(given, str) else f"{type(given).__name__} {shown(given, 60)}"
    raise UnfitError(f"{shown(where, 120)} holds {shown(kind, 120)}, expected {expected}")
