"""The execution of forwards: their precision, and their compilation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tanglenas_engine.errors import TangleNASError, unknown
from tanglenas_engine.spaces.space import SearchSpace

Forward = Callable[..., Tensor]

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The data type of autocast by name; None switches it off."""


class Precision:
    """The precision of matrix products. Parameters, alphas, masks and losses stay float32.

    Args:
        name: "float32", "bfloat16" or "float16". The last needs a GPU, and scales gradients into its range.
        device: The device of the network.

    Raises:
        TangleNASError: The precision is unknown, or not available on this device.
    """

    def __init__(self, name: str, device: torch.device):
        if name not in PRECISIONS:
            raise unknown("precision", name, PRECISIONS)
        if name == "float16" and device.type != "cuda":
            raise TangleNASError(
                f"precision 'float16' needs a GPU, and the device is {device.type!r}: use 'bfloat16' or 'float32'"
            )
        dtype = PRECISIONS[name]
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
        # A disabled scaler returns its inputs unchanged.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def forward(self, forward: Forward, *inputs: Tensor) -> Tensor:
        """Return the outputs of a forward in float32."""
        if not self.autocast._enabled:
            return forward(*inputs)
        with self.autocast:
            outputs = forward(*inputs)
        return outputs.float()


class Compiled:
    """The forwards of a space, compiled with `torch.compile` on the soft path.

    The hard path computes another network at each step, so it is not compiled. The tracer treats tensors such as masks
    as inputs. So a search has two graphs for any alpha: one for the weight step and one for the architecture step.

    Args:
        space: The supernet.
        backend: The backend of `torch.compile`.
    """

    def __init__(self, space: SearchSpace, backend: str = "inductor"):
        # Masks depend on alpha. torch's tracer reads all attributes of a tensor, and reading `.grad` of a mask warns.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        self._state = space.superposition
        self._compiled = torch.compile(space.forward, dynamic=False, backend=backend)

    def forward(self, forward: Forward, *inputs: Tensor) -> Tensor:
        """Return the outputs of a forward."""
        soft = self._state.mixture is not None and self._state.assignment is None
        if not soft or not torch.is_grad_enabled():
            return forward(*inputs)
        outputs: Tensor = self._compiled(*inputs)
        return outputs


def backend_of(compile: bool | str) -> str | None:
    """Return the backend for an option `compile`: torch's default for True, None for False, or the one of that name.

    Raises:
        TangleNASError: torch has no backend of that name.
    """
    if isinstance(compile, bool):
        return "inductor" if compile else None
    known = torch.compiler.list_backends(())
    if compile not in known:
        raise unknown("backend of torch.compile", compile, known)
    return compile


@contextmanager
def executing(space: SearchSpace, *ways: Callable[..., Tensor]) -> Iterator[None]:
    """Wrap the forwards of a space in these functions inside the block. The first function is the outermost."""

    def execute(forward: Forward, *inputs: Tensor, ways: Sequence[Callable[..., Tensor]] = ways) -> Tensor:
        if not ways:
            return forward(*inputs)
        return ways[0](lambda *given: execute(forward, *given, ways=ways[1:]), *inputs)

    space.execute = execute if ways else None
    try:
        yield
    finally:
        space.execute = None
