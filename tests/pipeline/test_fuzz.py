"""Whatever a person or a disk makes of a file: a clear error or a correct run, never a traceback, never silence."""

import copy
import hashlib
import io
import json
import pickle
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gin
import pytest
import torch
from dvc.parsing.context import Context, ContextError
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from paths import ROOT
from project import STAGES
from ruamel.yaml import YAML
from tiny import tiny
from trainings import run

from tanglenas_engine import create_dataset, create_space
from tanglenas_engine.data import DataView, Splits, make_splits
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.configurables import create, create_optimizer, read_architecture, search
from tanglenas_engine.pipeline.config.params import check_params
from tanglenas_engine.pipeline.config.reader import configure, required
from tanglenas_engine.pipeline.files import ARCHITECTURE, MIXTURE, SPLITS, SUPERNET, load_into
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.weights import load_weights, save_weights, weights_metadata
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.tables import load_table

BASE = ['SPACE = "autoformer_nano"', 'OPTIMIZER = "drnas"', 'DATASET = "digits"', "SEED = 0"]
BYTES = [
    b"\x00",
    b"\xff",
    b"\n",
    b"{",
    b"}",
    b'"',
    b"'",
    b",",
    b":",
    b"0",
    b"-",
    b"1e999",
    b"NaN",
    b"null",
    b"@",
    b"%",
    b"(",
]


fuzzed = settings(max_examples=2 * settings().max_examples)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file after up to three accidents: cut off, bits flipped, parts lost, doubled, or overwritten."""
    data = whole
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(1, 40)))
        match draw(st.sampled_from(["cut", "flip", "lose", "double", "overwrite", "insert"])):
            case "cut":
                data = data[:start]
            case "flip" if start < len(data):
                data = data[:start] + bytes([data[start] ^ (1 << draw(st.integers(0, 7)))]) + data[start + 1 :]
            case "lose":
                data = data[:start] + data[end:]
            case "double":
                data = data[:end] + data[start:]
            case "overwrite":
                data = data[:start] + draw(st.binary(min_size=end - start, max_size=end - start)) + data[end:]
            case _:
                data = data[:start] + draw(st.sampled_from(BYTES)) + data[start:]
    return data


def refused(action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a call returns, or None after a TangleNASError with a sentence in it; anything else is a failure."""
    try:
        return action(*arguments, **options)
    except TangleNASError as error:
        text = str(error)
        assert len(text) > 20 and len(text) < 5000 and "Traceback" not in text, text
        return None


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.integers()
    | st.floats()
    | st.sampled_from(["digits", "drnas", "scratch", "1e3", "@x", "%SEED", "${seed}", "é", "a b", "'", '"', "\\", ""])
    | st.text(max_size=6)
)
nested = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | scalars.map(str), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(autouse=True)
def cleared():
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory):
    """The folder in which the cases of a test run, one after another; the current one."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("gin", "dvc.yaml", "params.yaml"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


# --- params.yaml ----------------------------------------------------------------------------------------------

PARAMS = (ROOT / "params.yaml").read_bytes()
CONTENT = YAML(typ="safe").load(PARAMS)
COMMANDS = {
    name: stage["cmd"] for name, stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items() if name in STAGES
}
KEYS = [(key,) for key in CONTENT] + [
    (group, key) for group, keys in CONTENT.items() if isinstance(keys, dict) for key in keys
]


@fuzzed
@given(damaged(PARAMS) | st.binary(max_size=40))
@pytest.mark.exhaustive
def test_a_damaged_params_file_is_read_or_refused(project: Path, data: bytes) -> None:
    file = project / "own.yaml"
    file.write_bytes(data)
    refused(check_params, file, project / "dvc.yaml")


@fuzzed
@given(nested | st.tuples(st.sampled_from(KEYS), nested, st.text(max_size=3)))
@pytest.mark.exhaustive
def test_a_key_that_nothing_uses_is_never_passed_over(project: Path, change: Any) -> None:
    content = copy.deepcopy(CONTENT)
    if isinstance(change, tuple):
        (*group, key), value, suffix = change
        where = content[group[0]] if group else content
        where[key + suffix] = value
    else:
        content = change
    file = project / "own.yaml"
    text = io.StringIO()
    YAML(typ="safe").dump(content, text)
    file.write_text(text.getvalue())
    try:
        check_params(file, project / "dvc.yaml")
    except TangleNASError:
        return
    used = {".".join(path) for path in KEYS}
    left = YAML(typ="safe").load(file.read_text())
    assert left is None or (isinstance(left, dict) and set(_paths(left)) <= used), left


def _paths(content: dict, prefix: str = ""):
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


@fuzzed
@given(st.sampled_from(KEYS), scalars, st.sampled_from(sorted(COMMANDS)))
@pytest.mark.exhaustive
def test_a_value_in_params_is_used_or_refused(project: Path, path: tuple[str, ...], value: Any, stage: str) -> None:
    content = copy.deepcopy(CONTENT)
    (*group, key) = path
    (content[group[0]] if group else content)[key] = value
    try:
        command = shlex.split(Context(content).resolve(COMMANDS[stage]))
    except (ContextError, ValueError):  # DVC's, or the shell's to refuse
        assume(False)
    assert command[:2] == ["python", "-m"]

    def read() -> None:
        configure(command[3:])
        for macro, kind in (("SPACE", str), ("DATASET", str), ("SEED", int)):
            required(macro, kind)

    refused(read)


# --- gin ------------------------------------------------------------------------------------------------------

FILES = sorted((ROOT / "gin").rglob("*.gin"))


@fuzzed
@given(st.sampled_from(FILES).flatmap(lambda file: damaged(file.read_bytes())) | st.binary(max_size=60))
@example(b"\xef\xbb\xbfsearch.epochs = 1\n")
@example(b"include 'own.gin'\n")
def test_a_damaged_gin_file_is_read_or_refused(project: Path, data: bytes) -> None:
    (project / "own.gin").write_bytes(data)
    refused(configure, ["own.gin", *BASE])


OPTIONS = {
    "search": [
        "epochs", "batch_size", "warmup_epochs", "path_epochs", "clip", "strategy", "checkpoint_every",
        "weight_optimizer", "loss", "architecture_optimizer", "scheduler", "epohcs",
    ],
    "create_space": [
        "embed_dim", "depth", "num_heads", "mlp_ratio", "head_dim", "patch_size", "image_size", "in_channels", "size",
        "num_classes", "relaxation", "sharing", "drop_path", "relative_position", "global_pool",
    ],
    "create_optimizer": ["regularizer", "scale", "scales", "derivation"],
}  # fmt: skip
BOUND = st.sampled_from([(function, option) for function, options in OPTIONS.items() for option in options])
SENSIBLE = st.sampled_from(
    [
        "1", "2", "4", "0", "-1", "0.5", "None", "True", "(8,)", "(8, 16)", "(16, 8, 8)", "(1, 2)", "()", "(0,)",
        "('a',)",
        "'exact'", "'gated'", "'paper'", "'simultaneous'", "'alternating'", "'superposed'", "'entangled'", "'l2'",
        "'kl'", "'avg'", "'token'", "[[1]]", "{'a': 1}", "float('nan')", "1e400", "10**9", "@torch.optim.SGD",
        "@torch.optim.Adam", "@torch.nn.functional.mse_loss", "@tanglenas_engine.cosine",
    ]
)  # fmt: skip


@fuzzed
@given(st.lists(st.tuples(BOUND, SENSIBLE | scalars.map(repr)), min_size=1, max_size=2))
def test_what_is_bound_is_searched_with_or_refused(project: Path, bindings: list[tuple[tuple[str, str], str]]) -> None:
    lines = [f"{function}.{option} = {value}" for (function, option), value in bindings]
    small = [
        "create_space.embed_dim = (4, 8)",
        "create_space.depth = (1,)",
        "search.epochs = 1",
        "search.batch_size = 4",
    ]

    def searched() -> None:
        configure([*BASE, *small, *lines])
        for option, value in {**gin.get_bindings("search"), **gin.get_bindings("create_space")}.items():
            values = value if isinstance(value, tuple | list) else [value]
            # What takes too long is no error.
            assume(option == "clip" or not any(isinstance(v, int) and v > 64 for v in values))
        _, space, dataset = create()
        samples = dataset.subset(torch.arange(8), train=False)
        data = DataView({name: samples for name in ("weights", "architecture", "validation")})
        result = search(space, create_optimizer(name="drnas"), data, seed=0, device="cpu")
        space.assignment_of(result.architecture)
        assert len(result.history) == gin.get_bindings("search")["epochs"]

    torch.manual_seed(0)
    refused(searched)


# --- architectures --------------------------------------------------------------------------------------------

SPACE = tiny("autoformer_nano", embed_dim=(8, 16), depth=(1, 2), image_size=8, in_channels=1, num_classes=3)
WHOLE = SPACE.largest().to_json()
CHOICES = json.loads(WHOLE)["choices"]


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """An architecture file that someone edited: every part may be there or not, and be anything."""
    content = {key: value for key, value in json.loads(WHOLE).items() if key != "digest"}
    content["choices"] = {
        **{key: draw(nested | st.sampled_from([value, value[:1] if isinstance(value, list) else value]))
           for key, value in CHOICES.items()},
        **draw(st.dictionaries(st.text(max_size=6), nested, max_size=1)),
    }  # fmt: skip
    if draw(st.booleans()):
        content[draw(st.sampled_from(["format", "space", "choices", "digest"]))] = draw(nested)
    return json.dumps(content).encode()


@fuzzed
@given(damaged(WHOLE.encode()) | changed() | st.binary(max_size=30))
@example(b"[" * 100_000)
@example(b'{"format": 1, "space": "autoformer_nano", "choices": {"embed_dim": ' + b"1" * 5000 + b"}}")
def test_an_architecture_file_is_of_the_space_or_refused(project: Path, data: bytes) -> None:
    ARCHITECTURE.parent.mkdir(parents=True, exist_ok=True)
    ARCHITECTURE.write_bytes(data)
    found = refused(read_architecture, SPACE)
    if found is not None:
        assert SPACE.cost(found) == SPACE.cost(Architecture.from_json(found.to_json()))
        SPACE.extract(found)


# --- checkpoints ----------------------------------------------------------------------------------------------

STATES = [{"step": number, "weight": torch.full((7,), float(number))} for number in (1, 2)]


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with CheckpointFolder(folder, "mine") as checkpoints:
        for state in STATES:
            checkpoints.save(state)
    return {path.name: path.read_bytes() for path in folder.glob("state-*")}


@fuzzed
@given(st.data())
def test_a_damaged_checkpoint_is_never_taken_for_a_good_one(
    project: Path, generations: dict, data: st.DataObject
) -> None:
    folder = project / "damaged"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("state-*"):
        path.unlink()
    names = data.draw(st.sets(st.sampled_from(sorted(generations))))
    for name, content in generations.items():
        (folder / name).write_bytes(data.draw(damaged(content)) if name in names else content)
    with CheckpointFolder(folder, "mine") as checkpoints, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        state = refused(checkpoints.load)
    if state is not None:
        assert state["weight"].equal(STATES[state["step"] - 1]["weight"])
        if state["step"] == 1:
            assert "checkpoint left out" in str(warned[0].message)


class Executed:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@fuzzed
@given(
    st.sampled_from(["torch", "pickle", "bytes"]),
    nested
    | st.dictionaries(st.sampled_from(["walk", "position", "history", "sums", "rng"]), nested)
    | st.just(Executed()),
    st.binary(max_size=60),
)
def test_a_foreign_checkpoint_with_a_fitting_manifest_is_refused(
    project: Path, form: str, content: Any, data: bytes
) -> None:
    if form != "bytes":
        buffer = io.BytesIO()
        (torch.save if form == "torch" else pickle.dump)(content, buffer)
        data = buffer.getvalue()
    folder = project / "foreign"
    folder.mkdir(exist_ok=True)
    (folder / "state-000001.pt").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    manifest = {"schema": 1, "fingerprint": "mine", "sha256": digest, "bytes": len(data)}
    (folder / "state-000001.json").write_text(json.dumps(manifest))
    network = torch.nn.Linear(2, 1)
    with CheckpointFolder(folder, "mine") as checkpoints, pytest.raises(TangleNASError):
        run(
            name="walk",
            epochs=1,
            steps_per_epoch=1,
            step=lambda position: {},
            end_epoch=lambda epoch, row: row,
            describe=str,
            stateful={"walk": network},
            parameters=list(network.parameters()),
            checkpoints=checkpoints,
        )
    assert not (project / "executed").exists()


# --- weights, splits, tables ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(project: Path) -> bytes:
    save_weights(project / "whole.safetensors", SPACE.state_dict(), {"space": "autoformer_nano", "pipeline_id": "p"})
    return (project / "whole.safetensors").read_bytes()


@fuzzed
@given(st.data())
def test_damaged_weights_are_those_of_the_network_or_refused(
    project: Path, weights: bytes, data: st.DataObject
) -> None:
    header = 8 + int.from_bytes(weights[:8], "little")
    content = data.draw(damaged(weights) | damaged(weights[:header]).map(lambda start: start + weights[header:]))
    SUPERNET.parent.mkdir(parents=True, exist_ok=True)
    SUPERNET.write_bytes(content)
    refused(weights_metadata, SUPERNET)
    refused(load_weights, SUPERNET)
    refused(load_into, SPACE, SUPERNET)
    if len(content) > header:
        assert {name: p.shape for name, p in SPACE.named_parameters()} == {n: p.shape for n, p in _shapes()}


def _shapes():
    other = tiny("autoformer_nano", embed_dim=(8, 16), depth=(1, 2), image_size=8, in_channels=1, num_classes=3)
    return [(name, parameter) for name, parameter in other.named_parameters()]


MIX = {name: torch.full(choice.shape, 1 / len(choice.options)) for name, choice in SPACE.choices.items()}


@fuzzed
@given(
    st.dictionaries(
        st.sampled_from([*MIX, "x"]),
        st.sampled_from(
            [*MIX.values(), torch.ones(2), torch.full((2,), float("nan")), torch.zeros(()), torch.ones(0, 2)]
        ),
    )
)
def test_a_mixture_is_of_the_space_or_refused(project: Path, tensors: dict[str, torch.Tensor]) -> None:
    MIXTURE.parent.mkdir(parents=True, exist_ok=True)
    save_weights(MIXTURE, tensors)
    found = refused(lambda: SPACE.mixture(load_weights(MIXTURE)))
    if found is not None:
        for name in SPACE.choices:
            torch.testing.assert_close(found[name].sum(-1), torch.ones(found[name].shape[:-1]))


DIGITS = create_dataset("digits")
SPLIT = make_splits(DIGITS, seed=0).to_json()


@fuzzed
@given(
    damaged(SPLIT.encode()).map(lambda data: data.decode(errors="replace"))
    | st.tuples(st.sampled_from(list(json.loads(SPLIT))), nested).map(
        lambda change: json.dumps({**json.loads(SPLIT), change[0]: change[1]})
    )
    | nested.map(json.dumps)
)
def test_a_splits_file_is_of_the_dataset_or_refused(text: str) -> None:
    splits = refused(Splits.from_json, text)
    if splits is None:
        return
    try:
        splits.check(DIGITS)
    except TangleNASError:
        return
    assert sum(splits.sizes().values()) == len(DIGITS)
    for name in splits.sizes():
        assert len(splits.indices(name)) == splits.sizes()[name]


NB201 = create_space("nb201", channels=2, cells=1, image_size=8, num_classes=3)
TABLE = "architecture,acc,seconds\n" + "".join(
    f"{NB201.to_string(NB201.sample(torch.Generator().manual_seed(seed)))},{90 + seed / 10},{seed}\n"
    for seed in range(4)
)


@fuzzed
@given(
    damaged(TABLE.encode())
    | st.lists(st.lists(scalars.map(str), max_size=4).map(",".join)).map("\n".join).map(str.encode)
)
def test_a_table_is_one_or_refused(project: Path, data: bytes) -> None:
    file = project / "table.csv"
    file.write_bytes(data)
    table = refused(load_table, file, NB201)
    if table is not None:
        for metric in table.metrics:
            assert table.row(table.best(metric), metric)["table_rank"] == 1
    table = refused(load_table, file)
    if table is not None:
        assert len(table) > 0


def test_files_of_earlier_stages_that_are_not_text_are_refused(project: Path) -> None:
    ARCHITECTURE.parent.mkdir(parents=True, exist_ok=True)
    ARCHITECTURE.write_bytes(b"\xff\xfe")
    with pytest.raises(TangleNASError, match="not an architecture file"):
        read_architecture(SPACE)
    assert SPLITS.name == "splits.json"
