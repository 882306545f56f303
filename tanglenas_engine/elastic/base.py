"""How a parameter is superposed, sliced and extracted: by the axes that its layer declares for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.mixture import Factor, Superposition, superposition_of
from tanglenas_engine.superposition.size import Assignment, Axis, Number, Size

Dimension = Axis | Size | Number

_WHOLE = Axis(Size.of(1), role="fixed")
"""A dimension that never varies."""


class Elastic(nn.Module):
    """A module with elastic parameters.

    It declares the axes of its parameters and buffers once; then `self.current("weight")` is the parameter
    as the next architecture or mixture has it: full, masked or sliced.
    """

    _axes: dict[str, tuple[Axis, ...]]
    _superposition: Superposition | None = None

    def declare(self, role: str = "write", **dimensions: Sequence[Dimension | None]) -> None:
        """State the axes of parameters or buffers by name, one dimension each; None for one that never varies.

        A name that is no parameter stands for a mask alone, which `covered` applies to an activation.
        """
        if "_axes" not in self.__dict__:
            self._axes = {}
        for name, sizes in dimensions.items():
            axes = tuple(_WHOLE if size is None else Axis.of(size, role) for size in sizes)
            self._axes[name] = axes
            for row in (row for axis in axes for row in axis.size.rows):
                if self._superposition not in (None, superposition := superposition_of(row)):
                    raise TangleNASError(f"{type(self).__name__} mixes choices of two search spaces")
                self._superposition = superposition
            if self._superposition is not None:
                self._superposition.register(axes)

    @property
    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """The declared axes by name."""
        axes: dict[str, tuple[Axis, ...]] = self.__dict__.get("_axes", {})
        return axes

    @property
    def assignment(self) -> Assignment | None:
        """The architecture of the hard path, or None on the soft path and in the largest network."""
        return self._superposition.assignment if self._superposition else None

    def current(self, name: str) -> Tensor | None:
        """The parameter or buffer `name` as the next architecture (a slice) or mixture (masked) has it."""
        tensor, factors = self.unmasked(name)
        for factor in factors:
            tensor = tensor * factor.whole()  # type: ignore[operator]
        return tensor

    def unmasked(self, name: str) -> tuple[Tensor | None, list[Factor]]:
        """`current(name)` before the last step: the parameter, and the factors of the mask to multiply it with."""
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            return None, []
        if self.assignment is not None:
            tensor = self.sliced(name, self.assignment)
        for dim, axis in enumerate(self.axes.get(name, ())):
            if axis.size.used < axis.size.max:
                tensor = tensor.narrow(dim, 0, axis.size.used)
        return tensor, self.factors(name)

    def covered(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` times the mask declared as `name` under the current mixture; `tensor` itself without one."""
        for mask in self.masks(name):
            tensor = tensor * mask
        return tensor

    def masks(self, name: str) -> list[Tensor]:
        """The factors of the mask declared as `name` as tensors that broadcast; none without a mixture."""
        return [factor.whole() for factor in self.factors(name)]

    def factors(self, name: str) -> list[Factor]:
        """The factors of the mask declared as `name`; none without a mixture.

        On the hard path with a mixture each is the part that the architecture has: ones, whose gradient alpha gets.
        """
        if self._superposition is None or self._superposition.mixture is None:
            return []
        axes, assignment = self._axes[name], self._superposition.assignment
        factors = self._superposition.factors(axes)
        return factors if assignment is None else [_cut_factor(factor, axes, assignment) for factor in factors]

    def sliced(self, name: str, assignment: Assignment) -> Tensor:
        """The part of the parameter or buffer `name` that an architecture uses: a view where memory allows."""
        return _cut(getattr(self, name), self._axes[name], assignment)

    def plain(self, assignment: Assignment) -> nn.Module:
        """The torch module that this one is under an architecture, newly initialised where it is a torch layer."""
        return copied(self, assignment)

    def gate(self, child: str) -> Size | None:
        """1 or 0: whether an architecture has the child of that name; None for one that it always has."""
        return None

    def macs(self, output: Any) -> list[tuple[int, tuple[Size, ...]]]:
        """Multiply-accumulates of one forward that gave `output`, as products (constant, sizes)."""
        return []


def _cut(tensor: Tensor, axes: Sequence[Axis], assignment: Assignment) -> Tensor:
    """The part of `tensor` that an architecture uses; a dimension of length 1 broadcasts, and stays."""
    for dim, axis in enumerate(axes):
        size, full = axis.size.value(assignment), axis.size.max
        if axis.role == "fixed" or tensor.shape[dim] == 1:
            continue
        if axis.layout == "value":
            tensor = tensor.narrow(dim, axis.used(assignment).index(True), 1)
        elif axis.blocks > 1 and size < full:
            parts = tensor.unflatten(dim, (axis.blocks, full)).narrow(dim + 1, 0, size)  # type: ignore[no-untyped-call]
            tensor = parts.flatten(dim, dim + 1)
        elif size < full:
            tensor = tensor.narrow(dim, (full - size) // 2 if axis.layout == "window" else 0, size)
    return tensor


def _cut_factor(factor: Factor, axes: Sequence[Axis], assignment: Assignment) -> Factor:
    """The part of a factor that an architecture uses."""
    mask, bands, windows = factor
    if windows is not None:
        size = max(axis.size.value(assignment) for axis in axes if axis.layout == "window")
        windows = tuple(window for window in windows if window <= size)
    if bands is None:
        return Factor(_cut(mask, axes, assignment), None, windows)
    used = torch.split(torch.tensor(axes[0].used(assignment)), list(bands))
    counts = [int(band.sum()) for band in used]
    rows = torch.cat([row for row, count in zip(torch.split(mask, 1), counts, strict=True) if count])
    return Factor(_cut(rows, (_WHOLE, *axes[1:]), assignment), tuple(count for count in counts if count))


def sliced_state(module: nn.Module, assignment: Assignment) -> dict[str, Tensor]:
    """Copies of a module's own parameters and buffers (not its children's) as an architecture has them."""
    own = {**module._parameters, **module._buffers}
    elastic = module.axes if isinstance(module, Elastic) else {}
    return {
        name: (module.sliced(name, assignment) if name in elastic else tensor)  # type: ignore[operator]
        .detach()
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in own.items()
        if tensor is not None
    }


def tied(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that is shared (tied weights), in the order of the modules.

    Raises:
        TangleNASError: Two layers share a parameter, but an architecture cuts different slices from it.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    groups = [group for group in names.values() if len(group) > 1]
    for first, *others in groups:
        for name in others:
            if _slicing(module, name) != _slicing(module, first):
                raise TangleNASError(
                    f"{first} and {name} are one parameter, but sliced in different ways: tie layers whose "
                    "dimensions follow the same choices"
                )
    return groups


def _slicing(module: nn.Module, name: str) -> list[tuple[Any, ...]]:
    """How a parameter's dimensions follow the choices; those that never vary are left out."""
    owner, _, key = name.rpartition(".")
    holder = module.get_submodule(owner)
    axes = holder.axes.get(key, ()) if isinstance(holder, Elastic) else ()
    return [(i, a.size.rows, a.size.values, a.layout, a.blocks) for i, a in enumerate(axes) if a.size.rows]


def plain(module: nn.Module, assignment: Assignment) -> nn.Module:
    """`module` as an architecture has it: elastic layers become torch layers, whatever holds them is copied."""
    return module.plain(assignment) if isinstance(module, Elastic) else copied(module, assignment)


def copied(module: nn.Module, assignment: Assignment) -> nn.Module:
    """A copy of `module`, its own parameters sliced and newly initialised, its children made plain.

    Raises:
        TangleNASError: The module has parameters of its own and no `reset_parameters` to initialise them.
    """
    clone = copy.copy(module)
    clone.__dict__ = {
        # Hooks and settings of its own, and nothing that leads back to the choices.
        k: copy.copy(v) if isinstance(v, dict | set | list) else v
        for k, v in vars(module).items()
        if k not in ("_axes", "_superposition") and not isinstance(v, Size)
    }
    state = sliced_state(module, assignment)
    clone._parameters = {
        name: None if value is None else nn.Parameter(state[name]) for name, value in module._parameters.items()
    }
    clone._buffers = {name: None if value is None else state[name] for name, value in module._buffers.items()}
    clone._modules = {
        name: None if child is None else plain(child, assignment) for name, child in module._modules.items()
    }
    if callable(reset := getattr(clone, "reset_parameters", None)):
        reset()
    elif any(parameter is not None for parameter in clone._parameters.values()):
        raise TangleNASError(
            f"{type(module).__name__} has parameters of its own ({', '.join(clone._parameters)}): give it a method "
            "reset_parameters(), as torch layers have, so that a network of its own can be initialised"
        )
    return clone
