"""The base class of elastic layers. The axes that a layer declares decide how its parameters are masked and sliced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.parts import part
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.mixture import Factor, Superposition, superposition_of
from tanglenas_engine.superposition.size import Assignment, Axis, Number, Size

Dimension = Axis | Size | Number
"""One dimension of a parameter, as a layer declares it."""

_WHOLE = Axis(Size.of(1), role="fixed")
"""The axis of a dimension that never varies."""


class Elastic(nn.Module):
    """A module with elastic parameters.

    It declares the axes of its parameters and buffers once. Then `self.current("weight")` is the parameter for the next
    forward: full (largest network), masked (mixture) or sliced (architecture).
    """

    _axes: dict[str, tuple[Axis, ...]]
    _superposition: Superposition | None = None

    def declare(self, role: str = "write", **dimensions: Sequence[Dimension | None]) -> None:
        """Declare the axes of parameters or buffers by name, one dimension each; None stands for a fixed dimension.

        A name without a parameter declares only a mask, which `covered` applies to an activation.

        Args:
            role: The role of the dimensions, which decides with the relaxation whether a mixture covers them (see
                `COVERED`).
            dimensions: For each name, the dimensions in the order of the tensor's.

        Raises:
            TangleNASError: The dimensions depend on choices of two spaces.
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
        """The architecture of the hard path; None on the soft path and in the largest network."""
        return self._superposition.assignment if self._superposition else None

    def current(self, name: str) -> Tensor | None:
        """Return the parameter or buffer `name` for the next forward: full, masked or sliced."""
        tensor, factors = self.unmasked(name)
        for factor in factors:
            tensor = tensor * factor.whole()  # type: ignore[operator]
        return tensor

    def unmasked(self, name: str) -> tuple[Tensor | None, list[Factor]]:
        """Return `current(name)` in two parts: the unmasked parameter, and the factors of its mask."""
        tensor: Tensor | None = part(self, name)
        if tensor is None:
            return None, []
        if self.assignment is not None:
            tensor = self.sliced(name, self.assignment)
        for dim, axis in enumerate(self.axes.get(name, ())):
            if axis.size.used < axis.size.max:
                tensor = tensor.narrow(dim, 0, axis.size.used)
        return tensor, self.factors(name)

    def covered(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor` times the mask declared as `name`, or `tensor` itself if there is no mixture."""
        for factor in self.factors(name):
            tensor = tensor * factor.whole()
        return tensor

    def factors(self, name: str) -> list[Factor]:
        """Return the factors of the mask declared as `name`; an empty list if there is no mixture.

        On the hard path with a mixture, each factor is sliced as the architecture is. Its values are ones, through
        which alpha gets a gradient.
        """
        if self._superposition is None or self._superposition.mixture is None:
            return []
        axes, assignment = self._axes[name], self._superposition.assignment
        factors = self._superposition.factors(axes)
        return factors if assignment is None else [_cut_factor(factor, axes, assignment) for factor in factors]

    def sliced(self, name: str, assignment: Assignment) -> Tensor:
        """Return the part of the parameter or buffer `name` that an architecture uses, as a view if possible."""
        return _cut(part(self, name), self._axes[name], assignment)

    def write_back(self, name: str, value: Tensor | None) -> None:
        """Store what a forward wrote into a buffer that `current` returned: of an axis in blocks that is a copy."""
        assignment = self.assignment
        if value is None or assignment is None:
            return
        if all(axis.blocks == 1 or axis.size.value(assignment) == axis.size.max for axis in self.axes[name]):
            return
        whole: Tensor = part(self, name)
        places = torch.arange(whole.numel(), device=whole.device).view_as(whole)
        whole.view(-1)[_cut(places, self.axes[name], assignment).flatten()] = value.flatten()

    def plain(self, assignment: Assignment) -> nn.Module:
        """Return this module's plain torch form for an architecture. Torch layers are newly initialised."""
        return copied(self, assignment)

    def gate(self, child: str) -> Size | None:
        """Return a Size that is 1 if an architecture has the child of that name, else 0; or None for a fixed child."""
        return None

    def macs(self, output: Any) -> list[tuple[int, tuple[Size, ...]]]:
        """Return the multiply-accumulates of the forward that gave `output`, as products (constant, sizes).

        A layer that multiplies overrides this. It counts what the layer computes for the whole batch, as a sum of
        products: a linear layer returns `[(tokens, (outputs, inputs))]`. Elastic layers in it, and torch's, count by
        themselves; other modules in it do not.
        """
        return []


def _cut(tensor: Tensor, axes: Sequence[Axis], assignment: Assignment) -> Tensor:
    """Return the part of `tensor` that an architecture uses. A dimension of length 1 broadcasts, so it is not cut."""
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
    """Return the part of a factor that an architecture uses."""
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
    """Return copies of a module's own parameters and buffers, sliced for an architecture. Children are not included."""
    own = {**module._parameters, **module._buffers}
    elastic = module.axes if isinstance(module, Elastic) else {}
    return {
        name: (module.sliced(name, assignment) if name in elastic else tensor)  # type: ignore[operator]
        .detach()
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in own.items()
        if tensor is not None
    }


def shared(module: nn.Module) -> list[list[str]]:
    """Return the names of each shared parameter (tied weights), in the order of the modules."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [group for group in names.values() if len(group) > 1]


def tied(module: nn.Module) -> list[list[str]]:
    """Return what `shared` returns, for a module whose architectures keep ties.

    Raises:
        TangleNASError: Two layers share a parameter, but an architecture cuts different slices from it.
    """
    groups = shared(module)
    for first, *others in groups:
        for name in others:
            if _slicing(module, name) != _slicing(module, first):
                raise TangleNASError(
                    f"{first} and {name} are one parameter, but sliced in different ways: tie layers whose "
                    "dimensions follow the same choices"
                )
    return groups


def _slicing(module: nn.Module, name: str) -> list[tuple[Any, ...]]:
    """Return how a parameter's dimensions depend on the choices. Fixed dimensions are left out."""
    owner, _, key = name.rpartition(".")
    holder = part(module, owner)
    axes = holder.axes.get(key, ()) if isinstance(holder, Elastic) else ()
    return [(i, a.size.rows, a.size.values, a.layout, a.blocks) for i, a in enumerate(axes) if a.size.rows]


def plain(module: nn.Module, assignment: Assignment) -> nn.Module:
    """Return an architecture's form of `module`: elastic layers become torch layers, other modules are copied.

    Parameters that need no gradient need none in it.
    """
    made = module.plain(assignment) if isinstance(module, Elastic) else copied(module, assignment)
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.requires_grad and (own := made._parameters.get(name)) is not None:
            own.requires_grad_(False)
    return made


def copied(module: nn.Module, assignment: Assignment) -> nn.Module:
    """Return a copy of `module` for an architecture: parameters sliced and newly initialised, children made plain.

    Raises:
        TangleNASError: The module has parameters of its own and no `reset_parameters` to initialise them.
    """
    clone = copy.copy(module)
    clone.__dict__ = {
        # Containers such as hooks are copied. Attributes that refer to choices are left out.
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
    if isinstance(clone, nn.RNNBase):
        clone._init_flat_weights()  # its forward reads the weights from a list, which still holds the supernet's
    # torch's MultiheadAttention and Transformer have the method with an underscore.
    reset = getattr(clone, "reset_parameters", None) or getattr(clone, "_reset_parameters", None)
    if callable(reset):
        reset()
    elif any(parameter is not None for parameter in clone._parameters.values()):
        raise TangleNASError(
            f"{type(module).__name__} has parameters of its own ({', '.join(clone._parameters)}): give it a method "
            "reset_parameters(), as torch layers have, so that a network of its own can be initialised"
        )
    return clone
