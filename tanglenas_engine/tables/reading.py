"""Table files: comma-separated values, and the pickles in which tables are published. Either may be gzip-compressed."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.tables.metrics import TOLD, expected, is_deviation_of_accuracy, kind_of, possible
from tanglenas_engine.tables.pickles import MAX_STEPS, read_pickle
from tanglenas_engine.tables.table import HEADER, Table

if TYPE_CHECKING:
    from tanglenas_engine.spaces.space import SearchSpace

MAX_BYTES = 128 * 2**20
"""The largest uncompressed file, 40 times that of NAS-Bench-201. A small compressed file may hold any amount."""

KEY_COLUMNS = ("architecture", "arch")
OTHERS = {";": "';'", "\t": "tabs", "|": "'|'"}
"""Separators of columns that are not read, with their names."""
INDEX_COLUMNS = ("", "index", "unnamed: 0")
"""The columns without content, in lower case; pandas writes and reads the last."""


def load_table(
    path: str | Path, space: SearchSpace | None = None, higher_is_better: Mapping[str, bool] | None = None
) -> Table:
    """Read a benchmark table. With `space`, tie it to that space (see `Table.of`).

    A file has one of three forms:

    - CSV with a column `arch` or `architecture` (or `architecture of SPACE`, as `tanglenas tables import` writes it);
    - CSV with one column of text per choice. The architecture is then the text "option, option, ...", of the columns
      `space.table_columns` where all of these are there, or else of all columns of text in the order of the file;
    - a pickle of `{architecture: {metric: value}}`. Nothing in it is executed (see `read_pickle`).

    All other columns are metrics, except `index`. An accuracy that never exceeds 1 is a fraction, and becomes a
    percentage, unless the file is one that `Table.write` wrote, where it is one already. Where no accuracy of a file
    exceeds 1 and one is a fraction, all are, and so are their standard deviations, but for those that exceed 1.
    `higher_is_better` is as for `Table`; a file that `Table.write` wrote has it in its header.

    Raises:
        TangleNASError: The file is missing, empty, damaged, or not a table (names the line), or does not fit `space`.
    """
    path = Path(path)
    try:
        data = _contents(path)
        keys, columns, name, key_columns = _from_pickle(data) if _is_pickle(path, data) else _from_csv(data)
        told = {match[1]: match[2] == "more" for match in map(TOLD.fullmatch, columns) if match}
        for header in columns:
            if header != _metric(header) in columns:
                raise TangleNASError(f"columns {_metric(header)!r} and {header!r} are of one metric: remove one")
        columns = {_metric(header): values for header, values in columns.items()}
        written = name is not None  # by Table.write, which names the space
        fractions = () if written else _fractions(columns)
        for metric in fractions:
            columns[metric] = [100 * value for value in columns[metric]]
        table = Table(keys, columns, name, {**told, **(higher_is_better or {})})
        table.fractions, table.key_columns = fractions, key_columns
        return table if space is None else table.of(space)
    except OSError as error:
        raise TangleNASError(f"cannot read the table {path}: {error.strerror or error}") from None
    except TangleNASError as error:
        raise TangleNASError(f"table {path}: {error}") from None


def _metric(header: str) -> str:
    """Return the name of a metric without the direction that a header may give behind it."""
    match = TOLD.fullmatch(header)
    return match[1] if match else header


def _fractions(columns: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    """Return the columns of a file that are fractions of 1."""
    accuracies = {metric: values for metric, values in columns.items() if kind_of(metric) == "accuracy"}
    small = [metric for metric, values in accuracies.items() if max(values) <= 1]
    found = [metric for metric in small if any(0 < value < 1 for value in accuracies[metric])]
    if found and len(small) == len(accuracies):
        found = [*small, *(name for name in columns if is_deviation_of_accuracy(name) and max(columns[name]) <= 1)]
    return tuple(metric for metric in columns if metric in found)


def _contents(path: Path) -> bytes:
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            data = (gzip.GzipFile(fileobj=file) if compressed else file).read(MAX_BYTES + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise TangleNASError(f"its compression is damaged ({error}): copy or download it again") from None
    if len(data) > MAX_BYTES:
        raise TangleNASError(f"it holds more than {MAX_BYTES // 2**20} MiB, more than any table should: is it one?")
    if not data.strip():
        raise TangleNASError("it is empty: copy or download it again")
    return data


def _is_pickle(path: Path, data: bytes) -> bool:
    """Return whether this is a pickle: by the first byte, which no text has, or by the name for old protocols."""
    return data[0] == 0x80 or path.name.removesuffix(".gz").endswith((".pkl", ".pickle", ".p"))


Contents = tuple[list[str], dict[str, Any], str | None, tuple[str, ...]]
"""The keys, the columns by metric, the space's name if the file gives it, and the columns that are a key together."""


def _from_pickle(data: bytes) -> Contents:
    content = read_pickle(data)
    if not isinstance(content, dict) or not content:
        raise TangleNASError("the pickle holds no {architecture: {metric: value}}")
    columns: dict[str, array[float]] = {}
    for key, values in content.items():
        where = _printable("an architecture", key)[:200]
        if not isinstance(values, dict) or not values:
            raise TangleNASError(f"{where}: expected a dict of metrics")
        names = [_printable("a metric", metric, where) for metric in values]
        columns = columns or {name: array("d") for name in names}
        if len(content) * len(columns) > MAX_STEPS:  # one dict of metrics may stand for every architecture
            raise TangleNASError(
                f"it lists {len(content)} architectures with {len(columns)} metrics, more than any table should: "
                "is it one?"
            )
        if values.keys() != columns.keys():
            odd = sorted(values.keys() ^ columns.keys())[0]
            raise TangleNASError(
                f"{where}: metric {odd[:80]!r} is not there for every architecture: complete or remove it"
            )
        for metric, value in values.items():
            columns[metric].append(_number(where, metric, value))
    return list(content), columns, None, ()


def _from_csv(data: bytes) -> Contents:
    lines = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""), strict=True)
    try:
        return _from_rows(lines)
    except UnicodeDecodeError as error:
        raise TangleNASError(f"line {lines.line_num + 1}: not text in UTF-8 ({error.reason}): is it a table?") from None
    except csv.Error as error:
        raise TangleNASError(f"line {lines.line_num}: not CSV ({error})") from None


def _from_rows(lines: Any) -> Contents:
    header = [name.strip() for name in next(lines, [])]
    rows = (row for row in lines if row)  # blank lines do no harm
    first = next(rows, None)
    if first is None:
        raise TangleNASError("it has a header but no architectures: copy or download it again")
    for name in header:
        if header.count(name) > 1:
            raise TangleNASError(f"line 1: column {name!r} is there twice: remove or rename one")
    key_columns, space = _key_columns(header, first)
    metrics = {
        i: _printable("a metric", name)
        for i, name in enumerate(header)
        if i not in key_columns and name.lower() not in INDEX_COLUMNS
    }
    if not metrics:
        raise TangleNASError(f"line 1: no column of a metric among {', '.join(header)[:200]!r}")
    keys: dict[str, int] = {}
    columns: dict[str, array[float]] = {metric: array("d") for metric in metrics.values()}
    for row in itertools.chain([first], rows):
        where = f"line {lines.line_num}"
        if len(row) != len(header):
            raise TangleNASError(f"{where}: {len(row)} values, but the header has {len(header)} columns")
        parts = [row[i].strip() for i in key_columns]
        if len(parts) > 1:
            for i, part in zip(key_columns, parts, strict=True):
                if not part or _is_number(part):
                    raise TangleNASError(f"{where}: {header[i]} is {part!r}, expected an option's name")
        key = _printable("an architecture", ", ".join(parts), where)
        if key in keys:
            taken = f", by the columns {', '.join(header[i] for i in key_columns)}" if len(parts) > 1 else ""
            advice = ". Where options are numbers, give a column 'arch' with all of them" if len(parts) > 1 else ""
            raise TangleNASError(
                f"{where}: {key[:200]} is already in line {keys[key]}{taken[:200]}: remove one of them{advice}"
            )
        keys[key] = lines.line_num
        for i, metric in metrics.items():
            columns[metric].append(_number(where, metric, row[i]))
    return list(keys), columns, space, tuple(header[i] for i in key_columns) if len(key_columns) > 1 else ()


def _key_columns(header: list[str], first: list[str]) -> tuple[list[int], str | None]:
    """Which columns name the architecture, and the space's name if the header gives it."""
    for i, name in enumerate(header):
        if name.startswith(HEADER) and len(name) > len(HEADER):
            return [i], name.removeprefix(HEADER)
        if name.lower() in KEY_COLUMNS:
            return [i], None
    if len(header) == 1 and (found := next((name for sign, name in OTHERS.items() if sign in header[0]), "")):
        raise TangleNASError(f"line 1: its columns are separated by {found}, expected commas: save it with commas")
    text = [i for i, value in enumerate(first[: len(header)]) if value.strip() and not _is_number(value)]
    if len(text) < 2:
        raise TangleNASError(
            f"line 1: no column names the architecture. Expected 'arch', 'architecture', or one column of text per "
            f"choice, got {', '.join(header)[:200]!r}"
        )
    return text, None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # Python reads 9_1 as 91


def _number(where: str, metric: str, value: Any) -> float:
    """Return `value` as a number that the metric can have. `where` names its line or architecture in errors."""
    shown = repr(value)[:60] if isinstance(value, str | float) else f"of type {type(value).__name__}"
    try:
        usable = isinstance(value, str | int | float) and not isinstance(value, bool) and "_" not in str(value)
        number = float(value) if usable else None
    except (ValueError, OverflowError):
        number = None
    if number is None or not possible(kind_of(_metric(metric)), number):
        wanted = expected(kind_of(_metric(metric)))
        raise TangleNASError(f"{where}: {metric} is {shown}, expected {wanted}: correct or remove it")
    return number


def _printable(what: str, text: Any, where: str = "") -> str:
    if not isinstance(text, str) or not text or not text.isprintable():
        prefix = f"{where}: " if where else ""
        raise TangleNASError(f"{prefix}{what} is named {text!r:.80}, expected printable text")
    return text
