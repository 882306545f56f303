"""Benchmark tables: questions, spaces, files, and pickles that must not run."""

import csv
import gzip
import itertools
import json
import math
import pickle
import random
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import shared
from tiny import ALL, tiny

from tanglenas_engine import Architecture, SearchSpace, elastic
from tanglenas_engine.cli import main
from tanglenas_engine.cli._console import number
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import create_space, manager
from tanglenas_engine.tables import Table, kendall_tau, load_table, pickles, read_pickle, reading, spearman


class Stack(SearchSpace):
    """One or two layers, each of width 8 or 16: six architectures, written as the list of their widths."""

    def __init__(self):
        super().__init__()
        depth = self.choice("depth", (1, 2))
        width = self.choice("width", (8, 16), per=depth)
        self.layers = elastic.Depth(depth, [elastic.Linear(4, 4) for _ in range(2)])
        self.head = elastic.Linear(4, width[0])

    def to_string(self, architecture: Architecture) -> str:
        return str(list(architecture.choices["width"]))

    def from_string(self, text: str) -> Architecture:
        try:
            width = [int(part) for part in text.strip("[]").split(",")]
        except ValueError:
            raise TangleNASError(f"{text!r} is no list of widths") from None
        return self.architecture(depth=len(width), width=width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


@pytest.fixture
def space() -> Stack:
    space = Stack()
    space.name = "stack"
    return space


STACKS = {
    "[8]": 70.0,
    "[16]": 80.0,
    "[8, 8]": 80.0,
    "[8, 16]": 90.5,
    "[16, 8]": 60.0,
    "[16, 16]": 90.0,
}


def table(values=STACKS, metric="test_acc", space=None, **more) -> Table:
    return Table(values, {metric: list(values.values()), **more}, space)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Questions.


def test_value_rank_and_regret():
    found = table()
    assert len(found) == 6 and found.metrics == ("test_acc",)
    assert found.best("test_acc") == "[8, 16]" and found.worst("test_acc") == "[16, 8]"
    assert found.median("test_acc") == 80
    assert found.value("[16]", "test_acc") == 80
    assert [found.rank(key, "test_acc") for key in STACKS] == [5, 3, 3, 1, 6, 2]
    assert found.regret("[16, 16]", "test_acc") == 0.5 and found.regret("[8, 16]", "test_acc") == 0


def test_of_a_cost_less_is_better():
    found = table(params=[10, 20, 15, 25, 25, 10])
    assert found.best("params") == "[8]" and found.worst("params") == "[8, 16]"
    assert [found.rank(key, "params") for key in STACKS] == [1, 4, 3, 5, 5, 1]
    assert found.regret("[16]", "params") == 10


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.sampled_from(["acc", "test_loss"]))
def test_rank_is_one_plus_the_number_of_better_ones(values, metric):
    found = table({str(i): float(value) for i, value in enumerate(values)}, metric)
    sign = -1 if metric == "test_loss" else 1
    for i, value in enumerate(values):
        assert found.rank(str(i), metric) == 1 + sum(sign * other > sign * value for other in values)
        assert (found.regret(str(i), metric) == 0) == (found.rank(str(i), metric) == 1)


def test_unknown_names_are_told():
    with pytest.raises(TangleNASError, match=r"unknown metric 'test_ac'\. Did you mean 'test_acc'"):
        table().value("[8]", "test_ac")
    with pytest.raises(TangleNASError, match=r"no architecture '\[9\]'. It lists 6, written like '\[8\]'"):
        table().rank("[9]", "test_acc")


@pytest.mark.parametrize(
    "values", [{"a": math.nan}, {"a": math.inf}, {"a": -0.1}, {"a": 100.01}, {"a": 50, "b": math.nan}]
)
def test_a_table_holds_no_impossible_value(values):
    with pytest.raises(TangleNASError, match=r"acc of . is .*, expected an accuracy in %, from 0 to 100"):
        table(values)
    with pytest.raises(TangleNASError, match="loss of a is nan, expected a finite number"):
        table({"a": math.nan}, "loss")


def test_rank_correlations():
    exact = {key: 2 * value for key, value in STACKS.items()}
    assert kendall_tau(exact, table(), "test_acc") == pytest.approx(1)
    assert spearman(exact, table(), "test_acc") == pytest.approx(1)
    subset = {"[8]": 3.0, "[16]": 1.0, "[8, 16]": 2.0}  # true order: 1, 2, 3
    assert kendall_tau(subset, table(), "test_acc") == pytest.approx(-1 / 3)  # one pair of three agrees
    assert spearman(subset, table(), "test_acc") == pytest.approx(1 - 6 * (4 + 1 + 1) / (3 * 8))
    low = {"[8]": -1.0, "[16]": -2.0}
    assert kendall_tau(low, table(params=range(6)), "params") == pytest.approx(1)  # fewer parameters are better


def test_rank_correlations_that_do_not_exist():
    assert math.isnan(spearman({"[8]": 1.0, "[16]": 1.0}, table(), "test_acc"))
    for correlation in (kendall_tau, spearman):
        assert math.isnan(correlation({"[16]": 1.0, "[8, 8]": 2.0}, table(), "test_acc"))
    with pytest.raises(TangleNASError, match="2 architectures or more, but 1"):
        kendall_tau({"[8]": 1.0}, table(), "test_acc")
    with pytest.raises(TangleNASError, match=r"score of \[16\] is nan"):
        spearman({"[8]": 1.0, "[16]": math.nan}, table(), "test_acc")


# Spaces.


def test_a_table_of_a_space_answers_for_architectures_and_every_spelling(space):
    found = table({key.replace(" ", ""): value for key, value in STACKS.items()}).of(space)
    assert found.space == "stack" and found.keys == tuple(STACKS)
    architecture = space.from_string("8,16")
    assert found.value(architecture, "test_acc") == found.value("8,16", "test_acc") == 90.5
    assert found.row(architecture, "test_acc") == {"table_value": 90.5, "table_rank": 1, "table_regret": 0}
    assert json.dumps(found.row(space.largest(), "test_acc")) == (
        '{"table_value": 90.0, "table_rank": 2, "table_regret": 0.5}'
    )
    for _ in range(10):
        assert found.rank(space.sample(), "test_acc") >= 1
    assert kendall_tau({space.largest(): 1.0, space.smallest(): 0.0}, found, "test_acc") == pytest.approx(1)


def test_an_architecture_needs_a_table_of_its_space(space):
    with pytest.raises(TangleNASError, match=r"not tied to a space.*load_table\(path, space\)"):
        table().value(space.largest(), "test_acc")


@pytest.mark.parametrize("name", ALL)
def test_every_space_writes_its_architectures_as_text(name):
    space = tiny(name)
    generator = torch.Generator().manual_seed(0)
    for one in (space.largest(), space.smallest(), *(space.sample(generator) for _ in range(5))):
        text = space.to_string(one)
        assert space.from_string(text) == one and "\n" not in text
    with pytest.raises(TangleNASError):
        space.from_string("none")


def test_check_of_a_complete_table(space):
    check = table().check(space)
    assert check.complete and str(check) == "all 6 architectures of stack"


def test_check_names_what_is_missing_listed_twice_and_foreign(space):
    values = {"[8]": 1.0, "8": 2.0, "[9]": 3.0, "[16, 16]": 4.0, "none": 5.0}
    check = table(values).check(space)
    assert not check.complete
    assert (check.size, check.found, check.foreign) == (6, 2, ("[9]", "none"))
    assert check.duplicates == ("[8] as 8",)
    assert set(check.missing) < set(STACKS) - {"[8]", "[16, 16]"} and len(check.missing) == 3
    assert str(check).startswith("2 of the 6 architectures of stack. 4 missing, such as ")
    assert str(check).endswith("1 listed twice, such as [8] as 8. 2 not of this space, such as [9]; none")
    with pytest.raises(TangleNASError, match="2 not of this space"):
        table(values).of(space)
    with pytest.raises(TangleNASError, match=r"1 listed twice, such as \[8\] as 8\. Remove what is wrong"):
        table({"[8]": 1.0, "8": 2.0}).of(space)


def test_the_one_missing_architecture_is_named(space):
    for absent in STACKS:
        found = table({key: value for key, value in STACKS.items() if key != absent})
        assert found.check(space).missing == (absent,)
        with pytest.raises(TangleNASError, match="no architecture"):
            found.of(space).value(space.from_string(absent), "test_acc")


# Files.


def test_a_file_needs_a_space(tmp_path):
    with pytest.raises(TangleNASError, match=r"tie the table to one by table.of\(\)"):
        Table(["a", "b"], {"test_acc": [0.5, 0.9]}, None).write(tmp_path / "table.csv")


def test_the_canonical_file_keeps_every_bit(space, tmp_path):
    original = table({"[8]": 1 / 3, "[16, 16]": 91.99999999186198}, params=[129306, 2**40]).of(space)
    path = tmp_path / "stack.csv.gz"
    original.write(path)
    first = path.read_bytes()
    again = load_table(path)
    assert (again.space, again.keys) == ("stack", original.keys)
    assert all((again.columns[m] == original.columns[m]).all() for m in original.metrics)
    again.write(path)
    assert path.read_bytes() == first and first[4:8] == bytes(4)  # where gzip would write the time
    assert gzip.decompress(first).decode().splitlines()[:2] == [
        "architecture of stack,test_acc,params",
        "[8],0.3333333333333333,129306",
    ]
    assert load_table(path, space).value(space.largest(), "params") == 2**40


def test_a_table_of_another_size_of_the_space_says_whose_values_it_has(tmp_path):
    own, other = create_space("toy_cell"), create_space("toy_cell_nano")
    table = Table([own.to_string(own.largest())], {"test_acc": [90.0]}, "toy_cell")
    assert not table.origin and not table.of(own).origin
    table.of(own).write(tmp_path / "table.csv")
    tied = load_table(tmp_path / "table.csv", other)
    assert tied.named == "toy_cell" and tied.space == "toy_cell_nano"
    assert tied.origin == ("the table is of toy_cell: its values are of networks of that space, not of toy_cell_nano")
    (tmp_path / "plain.csv").write_text(f'arch,test_acc\n"{own.to_string(own.largest())}",90\n')
    assert not load_table(tmp_path / "plain.csv", other).origin  # the file names no space


def test_a_file_of_another_space_does_not_pass(space, tmp_path):
    path = write(tmp_path / "t.csv", "architecture of other,acc\nx,1\n")
    with pytest.raises(TangleNASError, match=r"t\.csv: 0 of the 6 architectures of stack.*1 not of this space"):
        load_table(path, space)


def test_columns_by_choice_are_read_in_their_order(tmp_path):
    path = write(tmp_path / "t.csv", "Unnamed: 0,first,second,acc\n0,sep,dil,50\n1,sep, sep,60\n\n")
    found = load_table(path)
    assert found.keys == ("sep, dil", "sep, sep") and found.metrics == ("acc",)


@pytest.mark.parametrize("more", [(), ("hash",)])
def test_columns_that_a_space_knows_are_read_by_their_names(tmp_path, more):
    space = installed("toy_cell_nano")
    names = ("normal_0_in", "normal_1_in", "normal_1_0", "reduce_0_in", "reduce_1_in", "reduce_1_0")
    assert space.table_columns == names
    some = [space.sample(torch.Generator().manual_seed(seed)) for seed in range(5)]
    rows = [dict(zip(names, space.to_string(one).split(", "), strict=True), hash="dil_conv_3x3") for one in some]
    order = sorted([*names, *more])
    lines = [",".join([*order, "acc"])] + [
        ",".join([*(row[name] for name in order), str(i)]) for i, row in enumerate(rows)
    ]
    path = write(tmp_path / "t.csv", "\n".join(lines))
    for found in (load_table(path, space), load_table(path).of(space)):
        assert [found.value(one, "acc") for one in some] == [0, 1, 2, 3, 4]
        assert found.check(space).found == 5 and found.key_columns == names


def test_import_says_in_which_order_it_reads_columns_that_the_space_does_not_know(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    operations = "sep_conv_3x3,sep_conv_5x5,sep_conv_3x3,sep_conv_3x3,sep_conv_3x3,dil_conv_3x3"
    write(tmp_path / "t.csv", f"a,b,c,d,e,f,acc\n{operations},50\n")
    result = CliRunner().invoke(main, ["tables", "import", "t.csv", "--space", "toy_cell_nano"])
    assert "an architecture is the columns a, b, c, d, e, f, and their order counts" in result.output
    assert f"the first one is read as {operations.replace(',', ', ')}" in result.output
    names = "normal_0_in,normal_1_in,normal_1_0,reduce_0_in,reduce_1_in,reduce_1_0"
    write(tmp_path / "t.csv", f"{names},acc\n{operations},50\n")
    result = CliRunner().invoke(main, ["tables", "import", "t.csv", "--space", "toy_cell_nano", "--out", "u.csv"])
    assert result.exit_code == 0 and "order counts" not in result.output


def test_a_spreadsheet_s_file_is_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufeffArch,acc\r\n"[8, 8]",50\r\n'.encode())
    assert load_table(path).value("[8, 8]", "acc") == 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("\n \n", "it is empty"),
        ("\ufeff", "it has a header but no architectures"),
        ("arch,acc\n", "it has a header but no architectures"),
        ("arch,acc\n\n\n", "it has a header but no architectures"),
        ("arch\nx\n", "line 1: no column of a metric"),
        ("index,arch\n0,x\n", "line 1: no column of a metric"),
        ("name,acc\nx,1\n", "line 1: no column names the architecture. Expected 'arch'.* got 'name, acc'"),
        ("acc,loss\n1,2\n", "line 1: no column names the architecture"),
        ("arch,acc,acc\nx,1,2\n", "line 1: column 'acc' is there twice"),
        ("arch,acc\nx,1\ny\n", "line 3: 1 values, but the header has 2"),
        ("arch,acc\nx,1\ny,2,3\n", "line 3: 3 values, but the header has 2"),
        ("arch,acc\nx,1\ny,\n", "line 3: acc is '', expected an accuracy"),
        ("arch,acc\nx,n/a\n", "line 2: acc is 'n/a', expected an accuracy"),
        ("arch,acc\nx,1\ny,nan\n", "line 3: acc is 'nan', expected an accuracy in %, from 0 to 100: correct or remove"),
        ("arch,acc\nx,100.5\n", "line 2: acc is '100.5'"),
        ("arch,acc\nx,-1\n", "line 2: acc is '-1'"),
        ("arch,acc\nx,9_1\n", "line 2: acc is '9_1'"),
        ("arch,params\nx,inf\n", "line 2: params is 'inf', expected a finite number, 0 or more"),
        ("arch,acc\nx,1\n\ny,2\nx,3\n", "line 5: x is already in line 2"),
        ("arch,acc\n,1\n", "line 2: an architecture is named ''"),
        ("arch,acc\n\x1b[2J,1\n", "line 2: an architecture is named .*expected printable text"),
        ("arch;acc\nx;1\n", "line 1: its columns are separated by ';', expected commas"),
        ("arch\tacc\nx\t1\n", "line 1: its columns are separated by tabs, expected commas"),
        ("a,b,k,acc\nx,y,3,1\nx,y,5,2\n", "line 3: x, y is already in line 2, by the columns a, b: .*options are num"),
        ("a,b,acc\nsep,dil,1\nsep,3,1\n", "line 3: b is '3', expected an option's name"),
        ('arch,acc\nx,1\n"y,2\n', "line 3: not CSV"),
        ('arch,acc\n"x"y,2\n', "line 2: not CSV"),
        ("arch,acc\nx," + "1" * 200_000, "line 2: not CSV"),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_its_line(tmp_path, text, message):
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(TangleNASError, match=f"t\\.csv: {message}"):
        load_table(path)


def test_files_that_cannot_be_read_are_told(tmp_path):
    with pytest.raises(TangleNASError, match=r"cannot read the table .*none\.csv: No such file"):
        load_table(tmp_path / "none.csv")
    with pytest.raises(TangleNASError, match="Is a directory"):
        load_table(tmp_path)
    path = tmp_path / "t.csv"
    path.write_bytes(b"arch,acc\nx\xff,1\n")
    with pytest.raises(TangleNASError, match="line 1: not text in UTF-8"):
        load_table(path)
    whole = gzip.compress(b"arch,acc\n" + b"".join(b"%d_,1\n" % i for i in range(999)))
    damaged = bytearray(whole)
    damaged[40] ^= 255
    for data in (whole[:100], whole[:-4], bytes(damaged), b"\x1f\x8b"):
        path.write_bytes(data)
        with pytest.raises(TangleNASError, match="compression is damaged"):
            load_table(path)


def test_a_small_file_that_holds_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 2**20)
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"arch,acc\n" + bytes(2**22)))
    with pytest.raises(TangleNASError, match="more than 1 MiB"):
        load_table(path)


OPERATIONS = ("avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3", "none", "skip_connect")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_table_of_the_size_of_nas_bench_201_is_light(tmp_path):
    path = tmp_path / "large.csv.gz"
    generator = random.Random(0)
    with gzip.open(path, "wt") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "arch", *(f"acc{i}" for i in range(13))])
        for i, (a, b, c, d, e, f) in enumerate(itertools.product(OPERATIONS, repeat=6)):
            arch = f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|"
            writer.writerow([i, arch, *(round(generator.uniform(10, 95), 3) for _ in range(13))])
    code = f"""
import re, sys, time
from tanglenas_engine.tables import load_table
start = time.process_time()
table = load_table({str(path)!r})
print(len(table), time.process_time() - start, "torch" in sys.modules)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory of a process is read from /proc, which this system has not")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    entries, seconds, torch_loaded, peak_kib = run.stdout.split()
    assert (entries, torch_loaded) == ("15625", "False")
    assert float(seconds) < 2  # 0.4 s and 40 MB on two busy cores
    assert int(peak_kib) < 300_000


@pytest.mark.slow
def test_nas_bench_201_has_its_known_optima():
    found = load_table(shared("nb201.csv.gz"))
    assert len(found) == 15_625
    for metric, optimum, index in [
        ("c10_test200", 94.373, 6111),
        ("c100_test200", 73.513, 9930),
        ("in16_test200", 47.311, 857),
    ]:
        best = found.best(metric)
        assert found.keys.index(best) == index
        assert found.row(best, metric) == {"table_value": optimum, "table_rank": 1, "table_regret": 0}
        assert found.rank(found.worst(metric), metric) > 15_000


def test_the_toy_cell_has_its_known_figures():
    found = load_table(shared("toy_cell.csv.gz"))
    assert len(found) == 4096
    assert found.value(found.best("test_acc"), "test_acc") == 91.63
    assert found.median("test_acc") == 90.54
    assert found.value(found.worst("test_acc"), "test_acc") == 86.06


def installed(name: str) -> SearchSpace:
    if name not in {registration.name for registration in manager().registrations("space")}:
        pytest.skip(f"no plugin brings the space {name}")
    return create_space(name)


@pytest.mark.parametrize(("name", "file"), [("nb201", "nb201.csv.gz"), ("toy_cell", "toy_cell.csv.gz")])
def test_a_published_table_covers_its_space(name, file):
    path, space = shared(file), installed(name)
    found = load_table(path, space)
    assert found.check(space).complete
    metric = found.metrics[0]
    assert found.rank(space.from_string(found.best(metric)), metric) == 1


@pytest.mark.slow
def test_the_form_of_the_conv_macro_release_covers_its_space(tmp_path):
    space = installed("toy_conv_macro")
    path = tmp_path / "macro.pkl"
    path.write_bytes(pickle.dumps(conv_macro_release()))
    found = load_table(path, space)
    assert found.check(space).complete
    assert found.rank(space.largest(), "test_acc") == 1 and found.rank(space.smallest(), "test_acc") == 6561


# Pickles.

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")


def toy_cell_release() -> dict:
    """The form of the authors' toy cell table, cut to 2 of 4 operations."""
    edges = ((0, 0), (0, 0), (0, 1))
    release = {}
    for ops in itertools.product(("sep_conv_3x3", "dil_conv_5x5"), repeat=6):
        cells = [[(op, source) for op, (_, source) in zip(part, edges, strict=True)] for part in (ops[:3], ops[3:])]
        genotype = Genotype(cells[0], range(1, 3), cells[1], range(1, 3))
        value = 85 + len(release) / 10
        release[str(genotype)] = {"test_acc": np.float64(value), "train_acc": np.float32(value + 1)}
    return release


def conv_macro_release() -> dict:
    """The form of the authors' conv macro table, whole."""
    channels = [(8, 16, 32), (16, 32, 64), (32, 64, 128), (64, 128, 256)]
    release = {}
    for choices in itertools.product(*channels, *[(3, 5, 7)] * 4):
        key = str([list(choices[:4]), list(choices[4:])])
        release[key] = {"test_acc": len(release) / 100, "train_acc": np.float64(90)}
    return release


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_authors_pickles_are_read_in_every_protocol(protocol, tmp_path):
    release = toy_cell_release()
    path = tmp_path / "toy.pkl"
    path.write_bytes(pickle.dumps(release, protocol))
    found = load_table(path)
    assert len(found) == 64 and found.metrics == ("test_acc", "train_acc")
    for key, values in release.items():
        assert found.value(key, "test_acc") == values["test_acc"]
        assert found.value(key, "train_acc") == values["train_acc"]


@pytest.mark.slow
def test_a_whole_release_is_read_compressed_or_not(tmp_path):
    data = pickle.dumps(conv_macro_release(), 4)
    for name, content in [("macro", data), ("macro.pkl.gz", gzip.compress(data))]:
        path = tmp_path / name
        path.write_bytes(content)
        found = load_table(path)
        assert len(found) == 6561
        assert found.value("[[8, 16, 32, 64], [3, 3, 3, 7]]", "test_acc") == 0.02
        assert found.best("test_acc") == "[[32, 64, 128, 256], [7, 7, 7, 7]]"


SCALARS = [np.bool_(True), np.int8(-5), np.uint8(200), np.int16(-300), np.uint16(60_000), np.int32(-70_000)]
SCALARS += [np.uint32(2**32 - 1), np.int64(-(2**40)), np.uint64(2**64 - 1), np.float16(0.5), np.float32(1.1)]
SCALARS += [np.float64(1 / 3), np.dtype(">f8").type(2.5), np.array([7.25], ">f4")[0]]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_scalars_become_plain_numbers(protocol):
    content = {str(i): scalar for i, scalar in enumerate(SCALARS)}
    read = read_pickle(pickle.dumps(content, protocol))
    assert read == {key: scalar.item() for key, scalar in content.items()}
    assert {type(value) for value in read.values()} == {bool, int, float}
    old = pickle.dumps(content, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert read_pickle(old) == read
    swapped = pickle.dumps(np.float64(1.5), 2).replace(b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>")
    assert read_pickle(swapped) == struct.unpack(">d", struct.pack("<d", 1.5))[0]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.floats(-1e4, 1e4).map(np.float64),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
@settings(max_examples=2 * settings().max_examples)
def test_plain_data_is_read_as_python_reads_it(content, protocol):
    assert read_pickle(pickle.dumps(content, protocol)) == content


def string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


SYSTEM = b"cos\nsystem\n"
MALICIOUS = {
    "GLOBAL": SYSTEM + b"(%stR.",
    "STACK_GLOBAL": b"\x80\x04" + string("os") + string("system") + b"\x93%s\x85R.",
    "INST": b"(%sios\nsystem\n.",
    "OBJ": b"(" + SYSTEM + b"%so.",
}
"""What to put around a pickled string so that Python's own reader runs it."""


@pytest.mark.parametrize("opcode", MALICIOUS)
def test_a_planted_pickle_is_refused_and_nothing_runs(opcode, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "table.pkl"
    data = MALICIOUS[opcode].replace(b"%s", string(f"touch {canary}"))
    pickle.loads(data)  # the payload is live: this is what the reader must not do
    canary.unlink()
    path.write_bytes(data)
    with pytest.raises(TangleNASError, match=r"table\.pkl: pickle refused: .*Nothing was executed"):
        load_table(path)
    assert not canary.exists()


DTYPE, SCALAR, ENCODE = b"cnumpy\ndtype\n", b"cnumpy._core.multiarray\nscalar\n", b"c_codecs\nencode\n"
DOUBLE = DTYPE + string("f8") + b"\x89\x88\x87R"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cbuiltins\neval\n.", r"names 'builtins\.eval'"),
        (b"c__builtin__\ngetattr\n" + SYSTEM + string("__self__") + b"\x86R.", r"names '__builtin__\.getattr'"),
        (b"\x80\x04" + string("numpy") + string("dtype.__class__") + b"\x93.", r"names 'numpy\.dtype\.__class__'"),
        (b"Psomething\n.", r"not among the opcodes of a table of numbers \(PERSID at byte 0\)"),
        (string("something") + b"Q.", "BINPERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x04\x8f.", "EMPTY_SET"),
        # NumPy's names, given what is no number: its own functions take objects and structures, too.
        (DTYPE + string("O8") + b"\x89\x88\x87R.", "dtype is given what makes no number"),
        (DTYPE + string("f8") + b"\x89" + DOUBLE + b"\x87R.", "dtype is given what makes no number"),
        (DOUBLE + b"(K\x03" + string("O") + b"NNNK\x00K\x00K\x00tb.", "a state that is no byte order"),
        (SCALAR + DOUBLE + b"C\x07seven..\x86R.", "scalar is given what makes no number"),
        (SCALAR + string("O8") + b"C\x08" + bytes(8) + b"\x86R.", "scalar is given what makes no number"),
        (ENCODE + string("x" * 9) + string("latin1") + b"\x86R.", "encode is given what makes no number"),
        (ENCODE + string("x") + string("idna") + b"\x86R.", "encode is given what makes no number"),
        # The admitted functions serve all later pickles, too.
        (DTYPE + b"N}" + string("__defaults__") + b"Ns\x86b.", "gives a function a state"),
        (DTYPE + b"}" + string("function") + b"Nsb.", "gives a function a state"),
        (DTYPE + b")\x81.", "NEWOBJ"),
        (DTYPE + b")}\x92.", "a tuple is there that is no argument"),
    ],
)
def test_whatever_does_more_than_hold_numbers_is_refused(data, message):
    with pytest.raises(TangleNASError, match=f"pickle refused: .*{message}"):
        read_pickle(data)
    assert read_pickle(pickle.dumps(np.float64(0.5))) == 0.5


def laughs(levels: int) -> bytes:
    """A tuple of two tuples of two tuples ...: 2 ** levels leaves, in a few bytes."""
    return b")q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(levels))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "pickle exhausted"),
        (b"\x80\x04}", "pickle exhausted"),
        (b"\x80\x04\xff.", "unknown"),
        (b"}.}.", "ends at byte 2, but the file has 4"),
        (b"\x80\x04h\x05.", "Memo value not found"),
        (b"X\xff\xff\xff\x7fx.", "expected 2147483647 bytes .* but only 2 remain"),
        (b"\x8d" + struct.pack("<Q", 2**62) + b"x.", "bytes"),
        (b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"x.", "bytes"),
        (b"\x96" + struct.pack("<Q", 2**40) + b"x.", "bytes"),
        (b"\x8b\xff\xff\xff\x7fx.", "long4"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.", "truncated"),
        (b"}r\xff\xff\xff\x7f.", "skips to number 2147483647 of the memo"),
        (b"}p99999999999\n.", "skips to number 99999999999 of the memo"),
        (b"I" + b"9" * 5000 + b"\n.", "4300 digits"),
        (b"\x8a\x09" + b"\x7f" * 9 + b".", "more than 64 bits"),
        (b"}" + b")" + b"\x85" * 200_000 + b"Ns.", "a tuple is there that is no argument"),
        (b"}" + laughs(200) + b"Ns.", "a tuple is there that is no argument"),
        (b"]" * 1001 + b".", "more than 1000 steps"),
    ],
)
def test_damage_and_bombs_are_told(data, message, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_STEPS", 1000)
    with pytest.raises(TangleNASError, match=f"pickle refused: .*{message}.*download the file again"):
        read_pickle(data)


def test_few_bytes_cannot_hold_a_table_without_end(monkeypatch, tmp_path):
    monkeypatch.setattr(reading, "MAX_STEPS", 1000)
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(dict.fromkeys(map(str, range(100)), dict.fromkeys("abcdefghijk", 1))))
    with pytest.raises(TangleNASError, match="100 architectures with 11 metrics, more than any table"):
        load_table(tmp_path / "t.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no"),
        ([1], "holds no"),
        ({"x": 1.0}, "x: expected a dict of metrics"),
        ({"x": {}}, "x: expected a dict of metrics"),
        ({"x": {"acc": 1}, "y": {"acc": 1, "loss": 2}}, "y: metric 'loss' is not there for every architecture"),
        ({"x": {"acc": 1}, "y": {"loss": 1}}, "y: metric 'acc' is not there"),
        ({"x": {"acc": "high"}}, "x: acc is 'high'"),
        ({"x": {"acc": "90"}}, None),
        ({"x": {"acc": True}}, "x: acc is of type bool"),
        ({"x": {"acc": None}}, "x: acc is of type NoneType"),
        ({"x": {"acc": math.nan}}, "x: acc is nan"),
        ({"x": {"acc": np.float64(101)}}, "x: acc is 101.0, expected an accuracy"),
        ({"x": {"acc": [1.0]}}, "x: acc is of type list"),
        ({1: {"acc": 1}}, "an architecture is named 1, expected printable text"),
        ({"x": {2: 1}}, "x: a metric is named 2, expected printable text"),
        ({"\x1b[2J": {"acc": 1}}, "expected printable text"),
        ({"\ud800": {"acc": 1}}, "expected printable text"),
        ({"x": {"a\nb": 1}}, "expected printable text"),
    ],
)
def test_pickles_of_something_else_are_refused(content, message, tmp_path):
    path = tmp_path / "table.pkl"
    path.write_bytes(pickle.dumps(content))
    if message is None:
        assert load_table(path).value("x", "acc") == 90
        return
    with pytest.raises(TangleNASError, match=message):
        load_table(path)


VALID = [pickle.dumps(dict(list(toy_cell_release().items())[:2]), protocol) for protocol in range(6)]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        data[at : at + length] = draw(st.binary(max_size=8))
    return bytes(data)


@given(st.binary(max_size=60) | mutated() | st.binary(max_size=60).map(b"\x80\x04".__add__))
@settings(max_examples=3 * settings().max_examples)
def test_any_bytes_give_a_table_or_an_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.pkl"
    path.write_bytes(data)
    try:
        found = load_table(path)
    except TangleNASError:
        return
    assert len(found) >= 1 and all(np.isfinite(column).all() for column in found.columns.values())


AUDITED = """
import pickle, sys
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.tables import read_pickle

def read(pickles):
    for data in pickles:
        try:
            read_pickle(data)
        except TangleNASError:
            pass

valid, malicious = eval(sys.stdin.read())
read(valid)  # Python loads its codecs on first use
heard = []
sys.addaudithook(lambda event, _: heard.append(event))
read(valid + malicious)
events = set(heard)
pickle.loads(malicious[0])
print(events, {"os.system", "pickle.find_class"} <= set(heard))
"""


def test_reading_imports_opens_and_executes_nothing():
    """Python's own audit events say so; and they do tell when Python reads a planted pickle."""
    malicious = [data.replace(b"%s", string("true")) for data in MALICIOUS.values()] + [b"cantigravity\nfly\n."]
    run = subprocess.run(
        [sys.executable, "-c", AUDITED], input=repr((VALID, malicious)), capture_output=True, text=True, check=True
    )
    assert run.stdout == "set() True\n"


# The command.


@pytest.fixture
def call(space, monkeypatch, tmp_path):
    def create(name: str) -> SearchSpace:
        return space if name == "stack" else create_space(name)

    monkeypatch.setattr("tanglenas_engine.plugins.create_space", create)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["tables", *arguments])


def release(values=STACKS) -> None:
    Path("release.pkl").write_bytes(pickle.dumps({key: {"test_acc": value} for key, value in values.items()}))


def test_import_writes_the_canonical_file_and_says_that_it_is_complete(call, space):
    release()
    result = call("import", "release.pkl", "--space", "stack")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "stack.table.csv.gz: all 6 architectures of stack; test_acc (more)\n"
    assert load_table("stack.table.csv.gz", space).value(space.largest(), "test_acc") == 90
    assert call("import", "stack.table.csv.gz", "--space", "stack", "--out", "sub/again.csv").exit_code == 0
    kept = Path("stack.table.csv.gz").read_bytes()
    release(STACKS | {"[8]": 1.0})
    again = call("import", "release.pkl", "--space", "stack")
    assert again.exit_code == 2 and "stack.table.csv.gz exists: name the file to write with --out" in again.stderr
    assert Path("stack.table.csv.gz").read_bytes() == kept
    assert Path("sub/again.csv").read_text().startswith("architecture of stack,test_acc\n[8],70\n")


def test_import_warns_of_an_incomplete_table(call):
    release({"[8]": 1.0, "[16]": 2.0})
    result = call("import", "release.pkl", "--space", "stack")
    assert result.exit_code == 0 and "2 of the 6 architectures of stack. 4 missing, such as [8, 8];" in result.stdout
    assert "incomplete" in result.stderr


@pytest.mark.parametrize(
    ("values", "name", "message"),
    [
        ({"[8]": 1.0, "[9]": 2.0}, "stack", "1 not of this space, such as [9]. Remove what is wrong"),
        (STACKS, "autoformer_nano", "6 not of this space, such as [8]"),
        (STACKS, "autoformer_nan", "Did you mean 'autoformer_nano'"),
    ],
)
def test_import_refuses_what_does_not_fit(call, values, name, message):
    release(values)
    result = call("import", "release.pkl", "--space", name)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["release.pkl"]


def test_query_takes_text_and_architecture_files(call, space):
    release()
    call("import", "release.pkl", "--space", "stack")
    Path("architecture.json").write_text(space.from_string("[16]").to_json())
    for asked in ("[16]", "16", "architecture.json"):
        lines = call("query", "stack.table.csv.gz", asked).stdout.splitlines()
        assert [line.split() for line in lines] == [
            ["metric", "value", "rank", "regret"],
            ["test_acc", "80", "3", "of", "6", "10.5"],
        ]
    assert call("query", "release.pkl", "architecture.json", "--metric", "test_acc").stdout.splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["release.pkl", "[9]"], "no architecture '[9]'"),
        (["release.pkl", "[8]", "--metric", "tst_acc"], "unknown metric 'tst_acc'. Did you mean 'test_acc'"),
        (["release.pkl", "none.json"], "cannot read none.json"),
        (["none.csv", "[8]"], "cannot read the table none.csv"),
    ],
)
def test_query_tells_what_is_wrong(call, arguments, message):
    release()
    result = call("query", *arguments)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_show_summarises(call):
    Path("t.csv").write_text("arch,test_acc,params\nx,90.25,1000\ny,91.5,3000\nz,10,2000\n")
    lines = call("show", "t.csv").stdout.splitlines()
    assert lines[0] == "3 architectures of a space that the file does not name"
    assert [line.split() for line in lines[3:5]] == [
        ["test_acc", "more", "91.5", "90.25", "10"],
        ["params", "less", "1000", "2000", "3000"],
    ]
    assert lines[5:] == ["", "best test_acc: y", "best params: x"]


def test_show_has_the_best_architecture_whole_in_a_narrow_terminal(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("tanglenas_engine.cli._console.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: 1)))
    best = "|avg_pool_3x3~0|+|none~0|none~1|+|none~0|none~1|nor_conv_3x3~2|"
    Path("t.csv").write_text(f"arch,test_acc\n{best},90.25\nother,10\n")
    assert f"best test_acc: {best}" in call("show", "t.csv").stdout.splitlines()


@pytest.mark.parametrize(
    "value, text", [(-0.0002, "-0.0002"), (0.0002, "0.0002"), (-0.05, "-0.05"), (0.0, "0"), (94.3732, "94.373")]
)
def test_small_numbers_keep_their_digits_whatever_their_sign(value, text):
    assert number(value) == text


@pytest.mark.slow
def test_looking_at_a_table_loads_no_torch(tmp_path):
    path = write(tmp_path / "t.csv", "architecture of stack,acc\nx,50\n")
    for arguments in (["tables", "show", str(path)], ["tables", "query", str(path), "x"], ["tables", "--help"]):
        code = f"""
import sys
from tanglenas_engine.cli import main
main({arguments!r}, standalone_mode=False)
print("torch" in sys.modules, file=sys.stderr)
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout and run.stderr == "False\n"
