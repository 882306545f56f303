"""What is left on disk after a kill, a full disk or a flipped bit, and what the next run makes of it."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Forked

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.files import check_writable, exclusive, write_atomic
from tanglenas_engine.runtime.fingerprint import code_version, fingerprint
from tanglenas_engine.runtime.seeding import restore_rng_state, rng_state
from tanglenas_engine.runtime.weights import load_weights, save_weights, weights_metadata


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "resume" / "search"


def saved(folder: Path, *steps: int) -> None:
    with CheckpointFolder(folder, "mine") as checkpoints:
        for step in steps:
            checkpoints.save({"step": step, "weight": torch.full((50,), float(step))})


def resumed_step(folder: Path) -> int:
    with CheckpointFolder(folder, "mine") as checkpoints:
        state = checkpoints.load()
    assert state is not None
    assert torch.equal(state["weight"], torch.full((50,), float(state["step"])))
    return state["step"]


# --- saving and loading ---


def test_a_new_folder_has_no_state_and_leaves_nothing_behind(folder: Path) -> None:
    with CheckpointFolder(folder, "mine") as checkpoints:
        assert checkpoints.load() is None
    assert not folder.exists()


def test_the_newest_state_comes_back_as_it_was_saved(folder: Path) -> None:
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": rng_state(),
        "history": [{"loss": 0.5, "ok": True, "note": None}],
        "shape": (3, 2),
    }
    with CheckpointFolder(folder, "mine") as checkpoints:
        checkpoints.save({"step": 1})
        checkpoints.save(state)
        loaded = checkpoints.load()
    assert loaded is not None
    assert loaded["history"] == state["history"] and loaded["shape"] == state["shape"]
    assert torch.equal(loaded["network"]["weight"], network.weight)
    torch.optim.Adam(network.parameters()).load_state_dict(loaded["optimizer"])


@pytest.mark.parametrize("value", [np.float64(0.5), Path("x"), {1, 2}.__iter__], ids=["NumPy scalar", "path", "method"])
def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved(folder: Path, value: object) -> None:
    saved(folder, 1)
    with CheckpointFolder(folder, "mine") as checkpoints:
        with pytest.raises(TangleNASError, match="could not be loaded again"):
            checkpoints.save({"loss": value})
    assert resumed_step(folder) == 1


def test_two_generations_are_kept(folder: Path) -> None:
    saved(folder, 1, 2, 3, 4)
    assert [path.name for path in sorted(folder.glob("state-*"))] == [
        "state-000003.json",
        "state-000003.pt",
        "state-000004.json",
        "state-000004.pt",
    ]


def test_a_run_that_never_loaded_keeps_the_generation_before_its_own(folder: Path) -> None:
    saved(folder, 1, 2)
    saved(folder, 3)
    next(iter(sorted(folder.glob("*.pt"), reverse=True))).unlink()
    with pytest.warns(UserWarning, match="checkpoint left out"):
        assert resumed_step(folder) == 2


def test_discard_leaves_nothing(folder: Path) -> None:
    with CheckpointFolder(folder, "mine") as checkpoints:
        checkpoints.save({"step": 1})
        checkpoints.discard()
        assert checkpoints.load() is None
    assert not folder.exists()


def test_discard_touches_no_file_of_others(folder: Path) -> None:
    write_atomic(folder / "notes.txt", "mine")
    saved(folder, 1)
    with CheckpointFolder(folder, "mine") as checkpoints:
        checkpoints.discard()
    assert (folder / "notes.txt").read_text() == "mine"


def test_saving_outside_the_lock_is_an_error(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="inside `with"):
        CheckpointFolder(folder, "mine").save({"step": 1})


# --- damage ---


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_run(manifest: Path) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "fingerprint": "theirs"}))


def of_another_state(manifest: Path) -> None:
    data = b"something else, with a manifest that fits"
    manifest.with_suffix(".pt").write_bytes(data)
    claim = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **claim}))


DAMAGES = [
    pytest.param("state-000002.pt", truncate, r"state-000002\.pt has \d+ of \d+ bytes", id="truncated"),
    pytest.param("state-000002.pt", flip_a_bit, r"state-000002\.pt is not what was written", id="bit flipped"),
    pytest.param("state-000002.pt", Path.unlink, r"state-000002\.pt cannot be read \(No such", id="missing"),
    pytest.param("state-000002.pt", empty, r"state-000002\.pt has 0 of \d+ bytes", id="empty"),
    pytest.param("state-000002.json", truncate, r"state-000002\.json is no manifest", id="manifest truncated"),
    pytest.param("state-000002.json", empty, r"state-000002\.json is no manifest", id="manifest empty"),
    pytest.param("state-000002.json", of_another_run, "holds the checkpoint of another run", id="foreign"),
    pytest.param("state-000002.json", of_another_state, r"state-000002\.pt is no checkpoint", id="foreign bytes"),
]


@pytest.mark.parametrize("name, damage, reason", DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before(folder: Path, name, damage, reason) -> None:
    saved(folder, 1, 2)
    damage(folder / name)
    with pytest.warns(UserWarning, match=rf"{reason}.*Going on from the one before it, state-000001\.pt"):
        assert resumed_step(folder) == 1


def test_after_a_fallback_the_good_generation_outlives_the_damaged_one(folder: Path) -> None:
    saved(folder, 1, 2)
    truncate(folder / "state-000002.pt")
    with CheckpointFolder(folder, "mine") as checkpoints:
        with pytest.warns(UserWarning, match="left out"):
            checkpoints.load()
        checkpoints.save({"step": 3})
    truncate(folder / "state-000003.pt")
    with pytest.warns(UserWarning, match="left out"):
        assert resumed_step(folder) == 1


def test_files_of_others_in_the_folder_are_left_alone(folder: Path) -> None:
    others = ["state-mine.json", "state-1.txt", "state-.pt", "states.json"]
    folder.mkdir(parents=True)
    for name in others:
        (folder / name).write_text("")
    saved(folder, 1, 2, 3)
    assert resumed_step(folder) == 3
    with CheckpointFolder(folder, "mine") as checkpoints:
        checkpoints.discard()
    assert sorted(os.listdir(folder)) == sorted([*others, "lock"])


def test_when_both_are_damaged_the_error_names_both_and_the_way_out(folder: Path) -> None:
    saved(folder, 1, 2)
    truncate(folder / "state-000001.pt")
    flip_a_bit(folder / "state-000002.pt")
    with CheckpointFolder(folder, "mine") as checkpoints, pytest.raises(TangleNASError) as error:
        checkpoints.load()
    for words in ("state-000001.pt has", "state-000002.pt is not", "Delete the folder"):
        assert words in str(error.value)


def test_a_state_without_its_manifest_was_never_committed(folder: Path) -> None:
    saved(folder, 1, 2)
    (folder / "state-000002.json").unlink()
    assert resumed_step(folder) == 1


def test_the_checkpoint_of_another_run_is_refused_with_both_fingerprints(folder: Path) -> None:
    saved(folder, 1)
    with CheckpointFolder(folder, "theirs") as checkpoints:
        with pytest.raises(TangleNASError, match=r"fingerprint is mine.*theirs.*folder of its own"):
            checkpoints.load()


def test_a_later_schema_is_refused(folder: Path) -> None:
    saved(folder, 1)
    manifest = folder / "state-000001.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    with CheckpointFolder(folder, "mine") as checkpoints:
        with pytest.raises(TangleNASError, match="schema version 99, this release reads version 1"):
            checkpoints.load()


# --- kills and other processes ---

SLOW_SAVE = """
import os, sys, torch
from tanglenas_engine.runtime import checkpoint
folder, slow = sys.argv[1:]
def stuck(*args):
    print("saving", flush=True)
    sys.stdin.read()
with checkpoint.CheckpointFolder(folder, "mine") as checkpoints:
    checkpoints.save({"step": 1, "weight": torch.full((50,), 1.0)})
    if slow == "fsync":  # the state is written to its temporary file
        os.fsync = stuck
    elif slow == "replace":  # nothing has its name yet
        os.replace = stuck
    else:  # the state has its name, the manifest does not
        replace = os.replace
        os.replace = lambda source, name: (stuck if str(name).endswith("json") else replace)(source, name)
    checkpoints.save({"step": 2, "weight": torch.full((50,), 2.0)})
"""


@pytest.mark.parametrize("moment", ["fsync", "replace", "manifest"])
def test_kill_in_the_middle_of_a_save_keeps_the_one_before(folder: Path, moment: str) -> None:
    with Forked(SLOW_SAVE, folder, moment) as process:
        assert process.stdout.readline() == "saving\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert list(folder.glob(".*.tmp"))
    assert resumed_step(folder) == 1
    assert not list(folder.glob(".*.tmp"))
    saved(folder, 3)
    assert resumed_step(folder) == 3


HOLD = """
import sys
from tanglenas_engine.runtime.files import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_the_pid_of_the_first_until_that_is_killed(folder: Path) -> None:
    with Forked(HOLD, folder) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(TangleNASError, match=f"pid {process.pid} is still running this stage") as error:
            with CheckpointFolder(folder, "mine"):
                pass
        assert str(folder) in str(error.value) and f"kill {process.pid}" in str(error.value)
        process.kill()
    with CheckpointFolder(folder, "mine") as checkpoints:
        assert checkpoints.load() is None


LEAVE = """
import os, sys
from tanglenas_engine.runtime.files import exclusive
with exclusive(sys.argv[1]):
    if os.fork() == 0:  # as a data loader's worker
        print("forked", flush=True)
        sys.stdin.read(1)
        os._exit(0)
    os.kill(os.getpid(), 9)
"""


def test_children_of_a_killed_process_hold_nothing(folder: Path) -> None:
    with Forked(LEAVE, folder) as process:
        assert process.stdout.readline() == "forked\n"
        process.wait()
        with exclusive(folder):
            pass


def test_a_claim_that_a_kill_left_behind_is_not_taken_for_the_holders(folder: Path) -> None:
    with exclusive(folder):
        claim = json.loads((folder / "owner.json").read_text())
        with subprocess.Popen(["true"]) as gone:
            gone.wait()
        (folder / "owner.json").write_text(json.dumps({**claim, "pid": gone.pid}))
        with pytest.raises(TangleNASError, match="another process is still running this stage"):
            with exclusive(folder):
                pass


def test_a_process_of_another_machine_is_named_with_it(folder: Path) -> None:
    with exclusive(folder):
        claim = json.loads((folder / "owner.json").read_text())
        (folder / "owner.json").write_text(json.dumps({**claim, "host": "elsewhere"}))
        with pytest.raises(TangleNASError, match=f"pid {os.getpid()} on elsewhere is still running"):
            with exclusive(folder):
                pass


@pytest.mark.parametrize("claim", ["", "[]", "{}", '{"pid": "x", "host": "y", "since": 0}', '{"pid": 1e999}'])
def test_a_claim_that_cannot_be_read_is_somebodys_all_the_same(folder: Path, claim: str) -> None:
    with exclusive(folder):
        (folder / "owner.json").write_text(claim)
        with pytest.raises(TangleNASError, match="another process is still running this stage"):
            with exclusive(folder):
                pass


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TangleNASError, match=f"cannot hold the folder {folder}"):
            with exclusive(folder):
                pass


@pytest.mark.parametrize("times, held", [(3, True), (10**9, False)])
def test_a_folder_that_its_last_holder_removes_is_made_again_for_a_while(folder: Path, monkeypatch, times, held):
    opened, calls = os.open, itertools.count(1)

    def after_the_other(path, *rest, **options):
        if path == str(folder / "lock") and next(calls) <= times:
            folder.rmdir()
        return opened(path, *rest, **options)

    monkeypatch.setattr(os, "open", after_the_other)
    with nullcontext() if held else pytest.raises(TangleNASError, match=f"cannot hold the folder {folder}: No such"):
        with exclusive(folder):
            assert (folder / "owner.json").exists()
    assert next(calls) > 4


def test_the_refused_process_leaves_the_holders_claim_alone(folder: Path) -> None:
    with exclusive(folder):
        for _ in range(2):
            with (
                pytest.raises(TangleNASError, match=f"pid {os.getpid()} is still running"),
                exclusive(folder),
            ):
                pass
    with exclusive(folder):
        pass


def test_the_lock_is_free_after_an_exception(folder: Path) -> None:
    with pytest.raises(KeyError), CheckpointFolder(folder, "mine"):
        raise KeyError
    saved(folder, 1)
    assert resumed_step(folder) == 1


# --- files ---


def test_write_atomic_writes_text_and_bytes_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.csv"
    write_atomic(path, "a,b\r\nä,1\n")
    assert path.read_bytes() == "a,b\r\nä,1\n".encode()
    write_atomic(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert [entry.name for entry in path.parent.iterdir()] == ["out.csv"]


def test_write_atomic_follows_the_umask_like_any_other_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "atomic", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_atomic_leaves_the_target_of_a_link_alone(tmp_path: Path) -> None:
    cached, out = tmp_path / "cached", tmp_path / "out"
    cached.write_text("old")
    out.symlink_to(cached)
    write_atomic(out, "new")
    assert (cached.read_text(), out.read_text()) == ("old", "new")


@pytest.mark.parametrize("write", [lambda path: write_atomic(path, ""), check_writable])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, monkeypatch, write) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # as a device, which root could replace
    Path("link").symlink_to("pipe")
    for path in ("pipe", "link", ".", ""):
        with pytest.raises(TangleNASError, match="no regular file"):
            write(path)
    assert Path("pipe").is_fifo() and Path("link").is_symlink() and sorted(os.listdir()) == ["link", "pipe"]


def test_the_check_of_a_path_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "old").write_text("old")
    for path in ("new/folder/file", "there/file", "old"):
        check_writable(tmp_path / path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "there"]
    assert (tmp_path / "old").read_text() == "old"


def test_a_full_disk_names_the_file_and_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    code = """
import resource, sys
from tanglenas_engine.runtime.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(sys.argv[1], b"x" * 5000)
except ValueError as error:
    print(error)
"""
    said = Forked(code, path).finished()
    assert f"cannot write {path}: File too large" in said
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_weights_come_back_with_slices_and_tied_tensors(tmp_path: Path) -> None:
    path = tmp_path / "supernet.safetensors"
    weight = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "slice": weight[:, :2],
        "row": weight[1],
        "tied": weight,
        "parameter": torch.nn.Parameter(weight),
    }
    save_weights(path, tensors, {"space": "autoformer_t", "epoch": "3"})
    loaded = load_weights(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert weights_metadata(path) == {"space": "autoformer_t", "epoch": "3"}


def test_weights_have_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = """
import sys, torch
from tanglenas_engine.runtime.weights import save_weights
save_weights(sys.argv[1], {"w": torch.ones(3), "v": torch.zeros(2)}, {key: key for key in "abcdefgh"})
"""
    paths = [tmp_path / "first", tmp_path / "second"]
    save_weights(paths[0], {"v": torch.zeros(2), "w": torch.ones(3)}, {key: key for key in "hgfedcba"})
    Forked(code, paths[1]).finished()  # with a hash seed of its own
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    assert first == second
    assert list(load_weights(paths[0])) == ["v", "w"]


@pytest.mark.parametrize("read", [load_weights, weights_metadata])
def test_missing_and_truncated_weights_are_named(tmp_path: Path, read) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(TangleNASError, match=f"no weights at {path}"):
        read(path)
    save_weights(path, {"w": torch.ones(100)})
    truncate(path)
    with pytest.raises(TangleNASError, match=f"cannot read {path} as a safetensors file"):
        read(path)


# --- fingerprints ---


def test_a_fingerprint_depends_on_values_and_names_and_not_on_order() -> None:
    one = fingerprint(config={"lr": 0.1, "epochs": 2}, data="abc")
    assert one == fingerprint(data="abc", config={"epochs": 2, "lr": 0.1}) == "28b0e370d95a81a4"
    assert one != fingerprint(config={"lr": 0.1, "epochs": 3}, data="abc")
    assert one != fingerprint(config={"lr": 0.1, "epochs": 2}, set="abc")


def test_a_part_without_a_stable_form_is_refused() -> None:
    with pytest.raises(TangleNASError, match="cannot fingerprint data=<object"):
        fingerprint(data=object())


def module(name: str, folder: Path, package: bool = True) -> types.ModuleType:
    made = types.ModuleType(name)
    if package:
        made.__path__ = [str(folder)]
    made.__file__ = str(folder / "__init__.py")
    return made


def test_the_code_version_follows_content_and_names_and_not_the_place(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        write_atomic(folder / "__init__.py", "")
        write_atomic(folder / "layers" / "linear.py", "x = 1\n")
    write_atomic(there / "layers" / "__pycache__" / "linear.pyc", "cache")
    version = code_version(module("plugin", here))
    assert version == code_version(module("plugin", there))
    assert version != code_version(module("plugin", here, package=False))

    write_atomic(there / "layers" / "linear.py", "x = 2\n")
    assert version != code_version(module("plugin", there))
    (here / "layers" / "linear.py").rename(here / "linear.py")
    assert version != code_version(module("plugin", here))


# --- generators ---


def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), random.gauss(), np.random.rand(), np.random.randn()]


def test_restored_generators_repeat_their_draws_after_a_checkpoint(folder: Path) -> None:
    before = rng_state()
    try:
        draws()  # an odd number of Gaussian draws: the second of the pair is part of the state
        with CheckpointFolder(folder, "mine") as checkpoints:
            checkpoints.save(rng_state())
            expected = draws()
            state = checkpoints.load()
        assert state is not None
        restore_rng_state(state)
        assert draws() == expected
    finally:
        restore_rng_state(before)
