"""How the forwards of a network run: in which precision, and compiled or not."""

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


class Precision:
    """What a matrix product is computed in. Parameters, alphas, masks and losses stay float32.

    Args:
        name: "float32", "bfloat16", or "float16", which needs a GPU: its gradients are scaled to be in its range.

    Raises:
        TangleNASError: There is no such precision, or not on this device.
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
        # Without float16 its methods hand on what they get.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def run(self, forward: Forward, *inputs: Tensor) -> Tensor:
        """The outputs of a forward, in float32."""
        if not self.autocast._enabled:
            return forward(*inputs)
        with self.autocast:
            outputs = forward(*inputs)
        return outputs.float()


class Compiled:
    """The soft path of a space through `torch.compile`; the hard path, which is another network each time, as it is.

    The tracer takes tensors that a forward finds in its surroundings as inputs, masks among them: a search has two
    graphs, one for the step of the weights and one for that of alpha, however alpha moves.

    Args:
        backend: Of `torch.compile`.
    """

    def __init__(self, space: SearchSpace, backend: str = "inductor"):
        # Masks hang on alpha; torch's tracer looks at everything that a tensor has, and warns of looking at that.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        self._state = space.superposition
        self._compiled = torch.compile(space.forward, dynamic=False, backend=backend)

    def run(self, forward: Forward, *inputs: Tensor) -> Tensor:
        """The outputs of a forward."""
        soft = self._state.mixture is not None and self._state.assignment is None
        if not soft or not torch.is_grad_enabled():
            return forward(*inputs)
        outputs: Tensor = self._compiled(*inputs)
        return outputs


def backend_of(compile: bool | str) -> str | None:
    """The backend that an option `compile` asks for: True is torch's own, False none.

    Raises:
        TangleNASError: There is none of that name.
    """
    if isinstance(compile, bool):
        return "inductor" if compile else None
    known = torch.compiler.list_backends(())
    if compile not in known:
        raise unknown("backend of torch.compile", compile, known)
    return compile


@contextmanager
def executing(space: SearchSpace, *ways: Callable[..., Tensor]) -> Iterator[None]:
    """Let the forwards of a space run in these ways, the first outermost, inside the block."""

    def execute(forward: Forward, *inputs: Tensor, ways: Sequence[Callable[..., Tensor]] = ways) -> Tensor:
        if not ways:
            return forward(*inputs)
        return ways[0](lambda *given: execute(forward, *given, ways=ways[1:]), *inputs)

    space.execute = execute if ways else None
    try:
        yield
    finally:
        space.execute = None
