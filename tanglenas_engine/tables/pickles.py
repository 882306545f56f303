"""Reading the pickles in which benchmark tables are published, without unpickling.

A pickle is a program for a small stack machine; what makes it dangerous is that it may import and call anything.
The machine here knows dicts, lists, tuples, strings and numbers only. It imports nothing and calls nothing that a
pickle names: a NumPy scalar is recognised by its form, (constructor, dtype, bytes), and decoded with `struct`.
"""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
from collections.abc import Callable
from typing import Any

from tanglenas_engine.errors import TangleNASError

FORMATS = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip
"""NumPy's codes of number types, as `struct` has them."""


MAX_STEPS = 10_000_000
"""Of the machine, five times those of NAS-Bench-201 with NumPy scalars: each may take 100 bytes of memory."""


class Name:
    """One of the four names that a pickled NumPy scalar contains. It stands for itself: nothing is imported."""

    def __init__(self, name: str):
        self.name = name


class DType:
    """A NumPy number type: its code, and the byte order, which the pickle sets afterwards."""

    def __init__(self, code: str):
        self.code = code
        self.order = "<"


NAMES = {
    "numpy dtype": Name("dtype"),
    "numpy.core.multiarray scalar": Name("scalar"),  # NumPy 1
    "numpy._core.multiarray scalar": Name("scalar"),  # NumPy 2
    "_codecs encode": Name("encode"),  # bytes, in protocols that have none
}

VALUES = {
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
KINDS = {int: "an int", str: "a string", bytes: "bytes", Name: "a name", DType: "a number type", type(None): "None"}


def read_pickle(data: bytes) -> Any:
    """What a pickle of dicts with string keys, lists, tuples, strings and numbers holds; NumPy scalars as numbers.

    Objects may contain each other, or one another many times, as the pickle says: check types before walking down.

    Raises:
        TangleNASError: The pickle is damaged, or does anything else; names the opcode and its position.
    """
    machine = _Machine()
    position, name = 0, "the start"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in the strings of old protocols
            for step, (opcode, argument, at) in enumerate(pickletools.genops(io.BytesIO(data))):
                position, name = at or 0, opcode.name
                if step >= MAX_STEPS:
                    raise _Refused(f"it takes more than {MAX_STEPS} steps")
                machine.step(name, argument)
    except _Refused as refusal:
        raise TangleNASError(
            f"pickle refused: {refusal} ({name} at byte {position}). Nothing was executed. Tables are dicts of "
            "numbers: if you trust this file, turn its values into plain floats and write it as CSV"
        ) from None
    except (ValueError, OverflowError) as error:  # how pickletools says that the next opcode makes no sense
        raise TangleNASError(
            f"not a whole pickle: {str(error)[:200]} (after {name} at byte {position}). Download the file again"
        ) from None
    if position + 1 != len(data):
        raise TangleNASError(
            f"the pickle ends at byte {position + 1}, but the file has {len(data)}: it holds more than one table, "
            "or is damaged. Download it again"
        )
    return machine.result


class _Refused(Exception):
    """Not what a table of numbers is made of."""


def _kind(kind: type) -> str:
    # In place of the value: one that contains itself, or another many times, cannot be shown.
    return KINDS.get(kind, f"a {kind.__name__}")


class _Machine:
    """The stack machine. `outer` holds the stacks below each open MARK, as in Python's own reader."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, argument: Any) -> None:
        if name in VALUES:
            self.stack.append(CONSTANTS.get(name, argument))
        elif name in STEPS:
            STEPS[name](self, argument)
        else:
            raise _Refused(f"{name} is not among the opcodes of a table of numbers")

    def top(self, kind: type = object) -> Any:
        """The top of the stack, which must be a `kind`."""
        if not self.stack:
            raise _Refused("it works on an empty stack")
        if not isinstance(self.stack[-1], kind):
            raise _Refused(f"it works on {_kind(type(self.stack[-1]))}, expected {_kind(kind)}")
        return self.stack[-1]

    def pop(self, kind: type = object) -> Any:
        value = self.top(kind)
        del self.stack[-1]
        return value

    def since_mark(self) -> list[Any]:
        """What was pushed since the last MARK, which is closed."""
        if not self.outer:
            raise _Refused("no MARK is open")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def stop(self, _: Any) -> None:
        self.result = self.pop()

    # Memo.

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def memoize(self, _: Any) -> None:
        self.put(len(self.memo))

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise _Refused(f"nothing is stored as {index}")
        self.stack.append(self.memo[index])

    # Containers.

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def tuple_since_mark(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def list_since_mark(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append(items)

    def append(self, _: Any) -> None:
        value = self.pop()
        self.top(list).append(value)

    def appends(self, _: Any) -> None:
        values = self.since_mark()
        self.top(list).extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.update(self.top(dict), [key, value])

    def set_items(self, _: Any) -> None:
        items = self.since_mark()
        self.update(self.top(dict), items)

    def dict_since_mark(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.update(self.stack[-1], items)

    def update(self, target: dict[str, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise _Refused("a dict has a key without value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):  # hashing a tuple of tuples can take for ever
                raise _Refused(f"a key is {_kind(type(key))}, expected a string")
            if key in target:
                raise _Refused(f"the key {key[:80]!r} comes twice")
            target[key] = value

    # NumPy scalars.

    def name(self, dotted: str) -> None:
        if dotted not in NAMES:
            raise _Refused(f"it names {dotted.replace(' ', '.', 1)[:80]!r}")
        self.stack.append(NAMES[dotted])

    def name_on_stack(self, _: Any) -> None:
        attribute, module = self.pop(str), self.pop(str)
        self.name(f"{module} {attribute}")

    def call(self, _: Any) -> None:
        arguments, name = self.pop(tuple), self.pop(Name).name
        match name, arguments:
            case "dtype", (str(code), _, _) if code in FORMATS:
                self.stack.append(DType(code))
            case "encode", (str(text), "latin1") if len(text) <= 8:  # as long as a number is
                self.stack.append(text.encode("latin-1"))
            case "scalar", (DType() as dtype, bytes(content)):
                form = dtype.order + FORMATS[dtype.code]
                if len(content) != struct.calcsize(form):
                    raise _Refused(f"{len(content)} bytes for a number of type {dtype.code}")
                self.stack.extend(struct.unpack(form, content))
            case _:
                raise _Refused(f"{name} is given what makes no number")

    def build(self, _: Any) -> None:
        state, dtype = self.pop(tuple), self.top(DType)
        match state:
            case (int(), "<" | ">" | "|" as order, None, None, None, int(), int(), int()):
                dtype.order = order.replace("|", "<")  # "|": one byte, which has no order
            case _:
                raise _Refused("a number type is given what is no byte order")


STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine.mark,
    "STOP": _Machine.stop,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": _Machine.tuple_since_mark,
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "LIST": _Machine.list_since_mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "DICT": _Machine.dict_since_mark,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}
