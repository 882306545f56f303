"""The execution of forwards: their precision, and their compilation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.masked import without_autocast
from tanglenas_engine.errors import TangleNASError, unknown
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture, Superposition

Forward = Callable[..., Tensor]

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The data type of autocast by name; None switches it off."""


@contextmanager
def batch_norms_named() -> Iterator[None]:
    """Name the cause where a batch norm in training mode gets one value per channel.

    Raises:
        TangleNASError: It got one, whose deviation is 0.
    """
    try:
        yield
    except ValueError as problem:
        if not str(problem).startswith("Expected more than 1 value per channel"):  # torch has no type for it
            raise
        raise TangleNASError(
            f"a batch norm in training mode got one value per channel ({problem}), whose deviation is 0. Raise the "
            "batch size, or lower accumulate, to 2 or more samples at a time, or raise the size of the images"
        ) from problem


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

    def forward(self, forward: Callable[..., Any], *inputs: Tensor) -> Any:
        """Return the outputs of a forward, a tensor or several, in float32.

        Raises:
            TangleNASError: A batch norm got one value per channel.
        """
        with batch_norms_named():
            if not self.autocast._enabled:
                return forward(*inputs)
            with self.autocast:
                outputs = forward(*inputs)
        return outputs.float() if isinstance(outputs, Tensor) else tuple(output.float() for output in outputs)


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


class Graphed:
    """The forwards and backwards of a space, each replayed as one CUDA graph on the soft path.

    The host enqueues a step of a large supernet in hundreds of launches, which can take longer than the device needs
    for them. A CUDA graph is one launch. It computes the same kernels, the masks included, from copies of its inputs.

    A graph writes its outputs and gradients into the same memory each time. So all forwards that these rules exclude
    run as they are: the hard path, forwards without gradients or in eval mode, and those that add to gradients of an
    earlier backward pass. A backward pass must come before the next forward, and what it gave is gone after it. Second
    derivatives raise an error.

    Args:
        space: The supernet, on a GPU.
    """

    def __init__(self, space: SearchSpace):
        self._space, self._state = space, space.superposition
        self._state.deferred = True
        self._parameters = list(space.parameters())
        self._graphs: dict[Hashable, Forward] = {}
        self._pool: Any = None  # weight and architecture steps take turns, so they can share their memory

    def forward(self, forward: Forward, *inputs: Tensor) -> Tensor:
        """Return the outputs of a forward."""
        mixture = self._state.mixture
        soft = mixture is not None and self._state.assignment is None
        adds = any(weight.requires_grad and weight.grad is not None for weight in self._parameters)
        if not soft or adds or not self._space.training or not torch.is_grad_enabled():
            _cover(self._state)
            return forward(*inputs)
        assert mixture is not None
        arguments = (*inputs, *mixture.stacks.values(), *mixture.edges.values())
        key = (
            self._state.relaxation,
            self._state.channel_divisor,
            frozenset(mixture.kept.items()),
            tuple(weight.requires_grad for weight in self._parameters),
            tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in arguments),
        )
        if key not in self._graphs:
            step = _SoftForward(self._space, forward, mixture, len(inputs))
            self._graphs[key] = self._captured(step, arguments)
            self._state.relax(mixture)
        return self._graphs[key](*arguments)

    def _captured(self, step: nn.Module, arguments: Sequence[Tensor]) -> Forward:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        samples = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in arguments)
        buffers = [(buffer, buffer.clone()) for buffer in self._space.buffers()]
        device = arguments[0].device
        # The forwards that warm up must not count for running statistics and random numbers.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), uncached(device.type):
            graph = torch.cuda.make_graphed_callables(step, samples, allow_unused_input=True, pool=self._pool)
        for buffer, before in buffers:
            buffer.copy_(before)
        return cast(Forward, graph)


class _SoftForward(nn.Module):
    """The forward of a space as a function of inputs and mixing weights, with the space's parameters."""

    def __init__(self, space: SearchSpace, forward: Forward, mixture: Mixture, inputs: int):
        super().__init__()
        self.space, self._forward, self._mixture, self._inputs = space, forward, mixture, inputs

    def forward(self, *arguments: Tensor) -> Tensor:
        inputs, weights = arguments[: self._inputs], arguments[self._inputs :]
        state = self.space.superposition
        state.relax(self._mixture.replaced(weights))
        _cover(state)
        return self._forward(*inputs)


def _cover(state: Superposition) -> None:
    """Compute the masks of the mixture, if there is one, in float32."""
    if state.mixture is not None:
        with without_autocast(next(iter(state.mixture.stacks.values())).device.type):
            state.cover()


def uncached(device_type: str) -> AbstractContextManager[object]:
    """Return the surrounding autocast without its cache, which would outlive a graph that is captured."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


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
