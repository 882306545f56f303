"""The sentence for a size that was given to a layer of torch or timm, which takes numbers only.

These layers end in errors about operands and tensors that do not name the layer. Where the error passed through is
known: its traceback has the layer's constructor, with the size among its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch import nn

from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.size import Size

LIBRARIES = ("torch.nn.", "timm.")


def explained(error: Exception) -> TangleNASError | None:
    """Return the error to raise in place of one that a foreign layer raised because of a Size, else None."""
    outermost, refusal = None, None
    for module, name, library, values in _constructors(error.__traceback__):
        given = {key: value for key, value in values.items() if _holds_size(value)}
        if given and outermost in (None, module):  # a base class may be the one that names the argument
            outermost, refusal = module, _refusal(name, library, given)
    return refusal


def check_foreign(network: nn.Module) -> None:
    """Refuse torch layers that kept a Size as an attribute, such as a pooling with a chosen kernel.

    Raises:
        TangleNASError: Such a layer is in the network.
    """
    for module in network.modules():
        kind = type(module)
        if kind.__module__.startswith("torch.nn.") and not isinstance(module, Elastic):
            if given := {key: value for key, value in vars(module).items() if _holds_size(value)}:
                raise _refusal(kind.__name__, "torch.nn", given)


def _constructors(traceback: TracebackType | None) -> Iterator[tuple[nn.Module, str, str, dict[str, Any]]]:
    """Yield the constructors of foreign modules in a traceback: module, class, library and local variables."""
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        library = frame.f_globals.get("__name__", "")
        values = dict(frame.f_locals)
        module = values.pop("self", None)
        if frame.f_code.co_name == "__init__" and library.startswith(LIBRARIES) and isinstance(module, nn.Module):
            kind = type(module)  # or, of an author's subclass, the class that has the constructor
            own = kind.__name__ if kind.__module__.startswith(LIBRARIES) else frame.f_code.co_qualname.split(".")[-2]
            yield module, own, library, values


def _holds_size(value: object) -> bool:
    return isinstance(value, Size) or (isinstance(value, tuple | list) and any(isinstance(v, Size) for v in value))


def _refusal(name: str, library: str, given: dict[str, Any]) -> TangleNASError:
    argument, value = next(iter(given.items()))
    layer = f"{'nn' if library.startswith('torch') else 'timm'}.{name}"
    if name in ("RNN", "LSTM", "GRU", "RNNBase", "RNNCell", "LSTMCell", "GRUCell", "RNNCellBase"):
        advice = (
            "Recurrent layers have no elastic form: their weights act again at every step, so that a mixture of slices "
            "is not a mixture of networks. Give it a number, or choose between several with elastic.MixedOperation"
        )
    elif form := _forms().get(name.lower()):
        advice = f"Use {form}, whose dimensions may be choices"
    else:
        advice = (
            "It has no elastic form yet. Build it from the layers in `elastic`, or derive a layer from elastic.Elastic "
            "and declare the dimensions of its parameters, as in self.declare(weight=(outputs, inputs))"
        )
    return TangleNASError(f"{layer} takes numbers only, but its {argument.strip('_')} is {value!r}. {advice}")


def _forms() -> dict[str, str]:
    """Return the elastic layers by name in lower case. The engine's own come before an author's of the same name."""
    found: dict[str, str] = {}
    kinds: list[type[Elastic]] = [Elastic]
    while kinds:
        kind = kinds.pop()
        kinds.extend(kind.__subclasses__())
        if kind.__module__.startswith("tanglenas_engine.elastic."):
            found[kind.__name__.lower()] = f"elastic.{kind.__name__}"
        else:
            found.setdefault(kind.__name__.lower(), kind.__name__)
    return found
