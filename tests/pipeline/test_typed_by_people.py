"""What people type and save with the tools that they have: numbers, digests, encodings, notations, consoles."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import gin
import pytest
import torch
from torch import nn

from tanglenas_engine import SearchSpace, create_space, elastic
from tanglenas_engine.errors import TangleNASError, print_anything
from tanglenas_engine.pipeline import open_stage
from tanglenas_engine.pipeline.config import configurables
from tanglenas_engine.pipeline.config.reader import configure

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "tanglenas_engine").exists():  # a test file may lie in a folder of tests
    ROOT = ROOT.parent


@pytest.fixture(autouse=True)
def cleared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


def bound(name):
    return gin.query_parameter(name)


# Encodings.


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_gin_file_may_begin_with_a_byte_order_mark(start):
    Path("inner.gin").write_bytes(start + b"search.batch_size = 32\n")
    Path("search.gin").write_bytes(start + b"include 'inner.gin'\nsearch.epochs = 1\n")
    configure(["search.gin"])
    assert bound("search.epochs") == 1 and bound("search.batch_size") == 32


def test_a_gin_file_of_another_encoding_is_one_sentence():
    Path("search.gin").write_bytes("search.epochs = 1\n".encode("utf-16"))
    with pytest.raises(TangleNASError, match=r"'search\.gin' cannot be read .*utf-8"):
        configure(["search.gin"])


@pytest.mark.exhaustive
def test_a_gin_file_is_read_alike_under_every_locale():
    Path("search.gin").write_text("# größer 大\nsearch.epochs = 1\n", "utf-8")
    code = """
from tanglenas_engine.pipeline import search
from tanglenas_engine.pipeline.config.reader import configure
configure(["search.gin"])
print("read")
"""
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ascii_only)
    assert run.stdout == b"read\n", run.stderr.decode()


READS_OUR_ASCII = {"doctor.py", "spool.py"}


@pytest.mark.exhaustive
def test_no_text_is_read_or_written_in_the_encoding_of_the_locale():
    found = []
    for folder in ("tanglenas_engine", "plugins", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name in READS_OUR_ASCII:
                continue
            for call in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                    given = len(call.args) + sum(word.arg == "encoding" for word in call.keywords)
                    if given < {"read_text": 1, "write_text": 2}.get(call.func.attr, 0):
                        found.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not found


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_console_that_cannot_print_a_character_prints_its_escape(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    print_anything()
    print("a smile: \N{GRINNING FACE}, half of one: \ud83d")
    stream.flush()
    smile = "\\U0001f600" if encoding != "utf-8" else "\N{GRINNING FACE}"
    assert stream.buffer.getvalue().decode(encoding) == f"a smile: {smile}, half of one: \\ud83d\n"


@pytest.mark.exhaustive
def test_the_stages_and_the_command_print_anything():
    for code in (
        "from tanglenas_engine.cli import main\ntry:\n main(['plugins'], standalone_mode=False)\nfinally:\n",
        "from tanglenas_engine.pipeline import open_stage\ntry:\n with open_stage('search', ['-h']): pass\n"
        "except SystemExit:\n",
    ):
        shown = subprocess.run(
            [sys.executable, "-c", code + " print('\\U0001f600')"],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        )
        assert b"\\U0001f600" in shown.stdout, shown.stderr.decode()


# Numbers.


@pytest.mark.parametrize("text, value", [("6e4", 60_000), ("60000.0", 60_000), ("60_000", 60_000), ("None", None)])
def test_a_whole_number_may_be_written_as_a_float(text, value):
    configure([f"discretize.max_params = {text}"])
    found = bound("discretize.max_params")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["6.5", "1e400", "'6e4'"])
def test_other_numbers_are_no_whole_numbers(text):
    with pytest.raises(TangleNASError, match=r"discretize\.max_params is .*, expected a whole number"):
        configure([f"discretize.max_params = {text}"])


def test_a_parameter_that_takes_fractions_keeps_its_float():
    configure(["target.value = 2.0"])
    assert type(bound("target.value")) is float


# Digests.


@pytest.fixture
def front(monkeypatch):
    """A function that writes a Pareto front of architectures under the names given, and reads by `pick`."""
    space = create_space("toy_conv_macro")
    architectures = [space.smallest(), space.largest()]

    def read(digests, pick):
        folder = Path("front")
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(configurables, "FRONT", folder)
        for digest, architecture in zip(digests, architectures, strict=True):
            (folder / f"{digest}.json").write_text(architecture.to_json())
        with gin.unlock_config():
            gin.bind_parameter("read_architecture.pick", pick)
        return architectures.index(configurables.read_architecture(space))

    return read


@pytest.mark.parametrize(
    "pick, typed",
    [
        ("12e45678", "12e45678"),
        ("inf", "12e45678, as DVC writes it"),
        ("120000.0", "12e4, as DVC writes it"),
        ("12", "the first two digits"),
    ],
)
def test_a_digest_that_looks_like_a_number_is_found(front, pick, typed):
    assert front(["ab0123456789abcd", "12e456789abcdef0"], pick) == 1, typed


def test_a_digest_that_begins_with_zeros_is_found(front):
    assert front(["0012345678abcdef", "fb12e456789abcde"], "12345") == 0


@pytest.mark.parametrize("pick", ["inf", "120000.0", "ffff", ""])
def test_a_number_that_is_several_digests_or_none_is_told(front, pick):
    with pytest.raises(
        TangleNASError, match=r"expected 'best' or the digest .*DVC reads digits with one e as a number"
    ):
        front(["12e4567890abcdef", "12e45a6789abcdef" if pick == "120000.0" else "34e456789abcdef0"], pick)


# Notations.

GENOTYPE = """
Genotype(
    normal=[
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("skip_connect", 0),
        ("dil_conv_3x3", 2),
    ],
    normal_concat=[2, 3, 4, 5],
    reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1),
            ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)],
    reduce_concat=range(2, 6),
)
"""


def test_a_genotype_may_go_over_several_lines():
    space = create_space("darts_nano")
    one_line = " ".join(GENOTYPE.split()).replace("( ", "(").replace(", ]", "]").replace(", )", ")")
    assert space.from_string(GENOTYPE) == space.from_string(one_line)
    assert space.to_string(space.from_string(GENOTYPE)).startswith("Genotype(normal=[('sep_conv_3x3', 0), ('sep")


@pytest.mark.parametrize(
    "text",
    [
        "", "Genotype()", "Genotype(1)", "Genotype(normal=1)", "Genotype(**x)", "Genotype(normal=[(1, 2)])", "(" * 5000,
        "Genotype(normal=range(0, 10**9))", "Genotype(normal=__import__('os'))", "\x00", "Genotype(normal=[[]])",
        GENOTYPE.replace("normal=", "normal=[1], normal="),
        GENOTYPE.replace('"skip_connect", 0', '"skip_connect", 0, 1'),
        GENOTYPE.replace("range(2, 6)", "range(2)"), GENOTYPE.replace("(\n", "(\n    other=[],"),
    ],
)  # fmt: skip
def test_what_is_no_genotype_is_one_sentence(text):
    with pytest.raises(TangleNASError, match="is not an architecture of 'darts_nano'"):
        create_space("darts_nano").from_string(text)


# A batch norm on one value.


class OneValue(SearchSpace):
    def __init__(self, **options):
        super().__init__(**options)
        width = self.choice("width", (2, 4))
        self.conv = elastic.Conv2d(1, width, 3, padding=1)
        self.norm = elastic.BatchNorm2d(width)
        self.head = elastic.Linear(width, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).mean((2, 3), keepdim=True)).flatten(1))

    def example_input(self, batch):
        return torch.randn(batch, 1, 4, 4)


@pytest.mark.parametrize("network", [OneValue, lambda: nn.BatchNorm2d(3)])
def test_a_batch_norm_on_one_value_is_one_sentence(monkeypatch, capsys, network):
    def fail(arguments):
        network().train()(torch.randn(1, *((1, 4, 4) if network is OneValue else (3, 1, 1))))

    monkeypatch.setattr("tanglenas_engine.pipeline.stage.configure", fail)
    with pytest.raises(SystemExit) as ended, open_stage("search", []):
        pass
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("search: a batch norm in training mode got one value per channel (Expected more than 1")
    assert "Raise the batch size, or lower accumulate, to 2 or more samples" in said and said.count("\n") == 1
