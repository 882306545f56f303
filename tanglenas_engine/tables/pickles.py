"""The one place where something is unpickled: benchmark tables, as their authors publish them.

A pickle is a program that can import any name and call it. The reader here is the standard library's way to prevent
that, a `pickle.Unpickler` with its own `find_class` (docs.python.org/3/library/pickle.html#restricting-globals). It is
safe for three reasons:

- `find_class` imports nothing. It knows the names that a pickled NumPy scalar contains, and returns a function of this
  module in place of each. NumPy's own functions take types of any kind, objects included.
- These functions make numbers and the few bytes of one. They refuse all other arguments.
- A scan of the file comes first. It refuses other opcodes, persistent identifiers among them, and whatever could take
  much memory or time.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from tanglenas_engine.errors import TangleNASError

MAX_STEPS = 10_000_000
"""The most opcodes of a pickle, five times those of NAS-Bench-201 with NumPy scalars. One can take 100 bytes."""

NUMBER_TYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}

TUPLES = {"EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"}
PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
OPCODES = TUPLES | PUTS | {
    "PROTO", "FRAME", "STOP", "MARK", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}  # fmt: skip


def read_pickle(data: bytes) -> Any:
    """Return the dicts, lists, strings and numbers of a pickle. NumPy scalars become plain numbers.

    A list or dict can contain itself, or another one many times. So check the types of values before walking down.

    Raises:
        TangleNASError: The pickle is damaged, names anything but a number's type, or needs too much memory.
    """
    try:
        _scan(data)
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # pickle's documentation: damage may raise exceptions of any type
        raise TangleNASError(
            f"pickle refused: {str(error)[:200]}. Nothing was executed. Expected a dict of numbers: download the file "
            "again or, if you trust it, turn its values into plain floats and write it as CSV"
        ) from None


class _Unpickler(pickle.Unpickler):
    """An unpickler that can reach the functions in `ADMITTED` and nothing else; the module's docstring says why."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {f'{module}.{name}'[:80]!r}")
        return ADMITTED[module, name]


def _scan(data: bytes) -> None:
    """Refuse what `find_class` does not see: opcodes that a table has no use for, and those that take too much.

    Sizes beyond the end of the file, for which Python would reserve memory, end the loop with a ValueError.
    """
    file, last = io.BytesIO(data), ""
    for step, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        name, refusal = opcode.name, ""
        if step >= MAX_STEPS:
            refusal = f"it takes more than {MAX_STEPS} steps"
        elif name not in OPCODES:
            refusal = "it is not among the opcodes of a table of numbers"
        elif name in PUTS and argument is not None and argument > step:
            # The memo is an array. Python would make it so long at once.
            refusal = f"it skips to number {argument} of the memo"
        elif isinstance(argument, int) and abs(argument) >= 2**64:
            # Millions of long numbers can share one hash. A dict of them would take hours.
            refusal = "a whole number has more than 64 bits"
        elif last in TUPLES and name not in {"REDUCE", "BUILD", *PUTS}:
            # As a key of a dict, a tuple of tuples is hashed: the recursion overflows, or takes 2 ** depth steps.
            refusal = "a tuple is there that is no argument"
        if refusal:
            raise pickle.UnpicklingError(f"{refusal} ({name} at byte {position})")
        last = last if name in PUTS else name
    if file.tell() != len(data):
        raise pickle.UnpicklingError(f"it ends at byte {file.tell()}, but the file has {len(data)}")


class _Function:
    """A function that stands for a name. A pickle can call it, but has no attribute of it to set."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it gives a function a state")


class _NumberType:
    """A NumPy type of numbers; the pickle sets its byte order afterwards."""

    __slots__ = ("dtype",)

    def __init__(self, code: str):
        self.dtype = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        match state:
            case int(), "<" | ">" | "|" as order, None, None, None, int(), int(), int():
                self.dtype = self.dtype.newbyteorder(order)
            case _:
                raise pickle.UnpicklingError("numpy.dtype gets a state that is no byte order")


def _dtype(*arguments: Any) -> _NumberType:
    match arguments:
        case str(code), int(), int() if code in NUMBER_TYPES:
            return _NumberType(code)
    raise pickle.UnpicklingError("numpy.dtype is given what makes no number")


def _scalar(*arguments: Any) -> Any:
    match arguments:
        case _NumberType(dtype=dtype), bytes(content) if len(content) == dtype.itemsize:
            return np.frombuffer(content, dtype).item()
    raise pickle.UnpicklingError("numpy's scalar is given what makes no number")


def _encode(*arguments: Any) -> bytes:
    match arguments:
        case str(text), "latin1" if len(text) <= 8:  # the bytes of a number, in protocols that have none
            return text.encode("latin-1")
    raise pickle.UnpicklingError("_codecs.encode is given what makes no number")


ADMITTED = {
    ("numpy", "dtype"): _Function(_dtype),
    ("numpy.core.multiarray", "scalar"): _Function(_scalar),  # NumPy 1
    ("numpy._core.multiarray", "scalar"): _Function(_scalar),  # NumPy 2
    ("_codecs", "encode"): _Function(_encode),
}
