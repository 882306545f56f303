"""Multiply-accumulates of a network's modules, counted while a forward runs on the meta device.

The formulas are those of torch's `FlopCounterMode`, which sees every product whatever module computes it. Formulas for
the products that torch's counter leaves out stand here. A module's own products are those that it computes itself,
outside of the modules that it calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tanglenas_engine.elastic.parts import call_with, reference

aten = torch.ops.aten


def _vector_products(vector: Any, other: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    """Return the FLOPs of `mv` and `dot`: each number of the first operand is multiplied once."""
    return 2 * int(vector.numel())


def _added_vector_products(added: Any, matrix: Any, vector: Any, *rest: Any, **options: Any) -> int:
    return 2 * int(matrix.numel())


def _trilinear(left: Any, weight: Any, right: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    """Return the FLOPs of `nn.Bilinear`: `x1 W_k` for each output k, and its product with `x2`."""
    samples, outputs = left.numel() // left.shape[-1], weight.numel() // (left.shape[-1] * right.shape[-1])
    return int(2 * samples * outputs * (left.shape[-1] * right.shape[-1] + right.shape[-1]))


FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mv: _vector_products,
    aten.dot: _vector_products,
    aten.vdot: _vector_products,
    aten.addmv: _added_vector_products,
    aten._trilinear: _trilinear,
}
"""FLOPs, two per multiply-accumulate, of operations that `FlopCounterMode` counts as 0."""

Run = Callable[[nn.Module, Tensor], None]
"""A function that runs a network on an example."""

Counted = TypeVar("Counted")

OWN_NAMESPACES = ("aten", "prim", "prims", "profiler", "inductor")
"""The namespaces of torch's own operations. Those of others may multiply, and nothing tells how much."""


class ProductCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A count of the products that each running module computes itself.

    Attributes:
        own: The multiply-accumulates of each module so far.
        unknown: The operations of other libraries that each module called, which have no formula.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own: Counter[nn.Module] = Counter()
        self.unknown: dict[nn.Module, set[str]] = {}
        self._running: list[nn.Module] = []
        from torch.utils.flop_counter import flop_registry  # takes a quarter of a second

        self._formulas = {**FORMULAS, **flop_registry}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = getattr(func, "overloadpacket", func)
        formula = self._formulas.get(packet)
        out = func(*args, **kwargs)
        if self._running:
            if formula is not None:
                self.own[self._running[-1]] += int(formula(*args, **kwargs, out_val=out)) // 2
            elif getattr(func, "namespace", "") not in OWN_NAMESPACES:
                self.unknown.setdefault(self._running[-1], set()).add(str(packet))
        return out

    def enter(self, module: nn.Module) -> int:
        """Note that a module starts to run, and return its count so far."""
        self._running.append(module)
        return self.own[module]

    def leave(self) -> None:
        self._running.pop()


def run_on_meta(network: nn.Module, example: Tensor) -> None:
    """Run a network's forward on the meta device, where only shapes are computed, in the network's floating type.

    Tensors that the forward makes without a device are there, too.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    example = example.to("meta", reference(network).dtype if example.is_floating_point() else None)
    with torch.no_grad(), torch.device("meta"), _autocast_on_meta():
        call_with(network, {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}, example)


def run_with_numbers(network: nn.Module, example: Tensor) -> None:
    """Run a network's forward where its parameters are, in their floating type."""
    place = reference(network)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        network(example.to(place) if example.is_floating_point() else example.to(place.device))


def counted(count: Callable[[Run], Counted]) -> Counted:
    """Return what `count` counts in a run on the meta device, or in one with numbers where the forward needs these."""
    try:
        return count(run_on_meta)
    except Exception:  # NumPy and Python have errors of their own for a tensor without numbers
        return count(run_with_numbers)


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """Let modules turn autocast on or off for the meta device inside the block. Torch knows none there and refuses."""
    original = torch.autocast.__init__

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = original  # type: ignore[method-assign]


@contextmanager
def in_plain_products() -> Iterator[None]:
    """Compute attention by matrix products inside the block: counters see these, but not all fused forms."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def count_products(network: nn.Module, example: Tensor) -> int:
    """Return the multiply-accumulates of a network's forward by torch's `FlopCounterMode`.

    The network must be in evaluation mode.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes a quarter of a second

    def count(run: Run) -> int:
        counter = FlopCounterMode(display=False, custom_mapping={op: _raw(formula) for op, formula in FORMULAS.items()})
        with in_plain_products(), counter:
            run(network, example)
        return int(counter.get_total_flops()) // 2

    return counted(count)


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Mark a formula as one that takes tensors, not shapes."""

    def raw(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    raw._get_raw = True  # type: ignore[attr-defined]
    return raw
