"""Stages that are killed at random moments, whose disk fills up, or whose data vanish, and that are run again."""

import os
import random
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from kills import EMA, Case, Kill, Theatre, lay_out, play
from PIL import Image
from project import contents
from stages import MAIN

GRADIENT = Case("search", "autoformer_nano", "drnas")
SAMPLED = Case("search", "nb201", "spos")
TEXT = Case("search", "gpt_nano", "darts", ("search.strategy = 'simultaneous'",))
WORKERS = Case("search", "autoformer_nano", "darts", ("search.num_workers = 1",))
LOSS = "retrain.loss = @torch.nn.functional.cross_entropy"  # gin sees it called
RETRAIN = Case("retrain", "nb201", "spos", (f"retrain.ema = @{EMA}", LOSS))
DISCRETIZE = Case("discretize", "nb201", "spos", ("discretize.candidates = 3",))


@pytest.fixture(scope="module")
def theatre(tmp_path_factory: pytest.TempPathFactory) -> Theatre:
    return Theatre(tmp_path_factory.mktemp("theatre"))


@pytest.mark.parametrize("case", [GRADIENT, SAMPLED, TEXT, RETRAIN, DISCRETIZE], ids=str)
@pytest.mark.part(5)
@pytest.mark.exhaustive
def test_a_stage_that_is_killed_at_a_random_moment_leaves_what_it_leaves_undisturbed(
    theatre: Theatre, case: Case
) -> None:
    kill = next(theatre.random_kills(case, random.Random(str(case))))
    outcome = theatre.killed(case, [kill])
    assert (outcome.status, outcome.different) == (0, []), f"{kill}:\n{outcome.log}"


@pytest.mark.parametrize("moment", ["within", "before", "manifest", "second"])
@pytest.mark.exhaustive
def test_a_kill_inside_a_checkpoint_write_goes_on_from_the_one_before(theatre: Theatre, moment: str) -> None:
    # After the output folders are made, the first checkpoint is: state (open, rename), manifest (open, rename).
    whole = theatre.undisturbed(GRADIENT)
    opens = [number for number, what in enumerate(whole.operations, 1) if re.search(r"open .*\.state-\d+\.pt", what)]
    kill = {
        "before": Kill(opens[1], 0),
        "within": Kill(opens[1], 3e-4),
        "manifest": Kill(opens[1] + 2, 0),
        "second": Kill(opens[2] + 1, 0),
    }[moment]
    outcome = theatre.killed(GRADIENT, [kill])
    assert (outcome.kills, outcome.resumes) == (1, 1), outcome.log
    assert (outcome.status, outcome.different) == (0, []), outcome.log


@pytest.mark.parametrize("case", [GRADIENT, RETRAIN], ids=str)
@pytest.mark.exhaustive
def test_a_stage_that_is_killed_after_its_last_step_takes_none_again(theatre: Theatre, case: Case) -> None:
    whole = theatre.undisturbed(case)
    metrics = next(n for n, what in enumerate(whole.operations, 1) if what.startswith("open metrics/"))
    outcome = theatre.killed(case, [Kill(metrics, 0), Kill(len(whole.operations), 0)])
    assert re.findall(r"resuming at step (\d+) of \1\n", outcome.log), outcome.log
    assert (outcome.status, outcome.different) == (0, []), outcome.log


@pytest.mark.exhaustive
def test_the_data_loaders_of_a_killed_search_do_not_keep_it_from_going_on(theatre: Theatre) -> None:
    opens = [n for n, what in enumerate(theatre.undisturbed(WORKERS).operations, 1) if ".state-" in what]
    outcome = theatre.killed(WORKERS, [Kill(opens[-1], 0)])
    assert (outcome.kills, outcome.resumes, outcome.status, outcome.different) == (1, 1, 0, []), outcome.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.exhaustive
def test_a_stage_that_is_told_to_stop_says_so_and_goes_on_later(theatre: Theatre, number: signal.Signals) -> None:
    whole = theatre.undisturbed(GRADIENT)
    opens = [n for n, what in enumerate(whole.operations, 1) if re.search(r"open .*\.state-\d+\.pt", what)]
    project = theatre.copy(whole.before)
    assert play(project, GRADIENT, Kill(opens[1], 0, number)) == 130
    log = Path(f"{project}.log")
    assert re.search(r"search stopped at step \d of 4 and is saved in .*Run the same command again", log.read_text())
    assert play(project, GRADIENT) == 0
    assert "resuming at step" in log.read_text() and contents(project) == whole.after


# --- the surroundings -----------------------------------------------------------------------------------------


def said(project: Path, case: Case, **options: object) -> str:
    """Run a stage that must end with one sentence and status 2, and return the sentence."""
    log = Path(f"{project}.log")
    log.unlink(missing_ok=True)
    assert play(project, case, **options) == 2, log.read_text()
    text = log.read_text()
    assert "Traceback" not in text, text
    return text.splitlines()[-1]


@pytest.mark.exhaustive
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(theatre: Theatre) -> None:
    whole = theatre.undisturbed(GRADIENT)
    project = theatre.copy(whole.before)
    for size in (2_000, 60_000, 130_000):
        message = said(project, GRADIENT, limit=(resource.RLIMIT_FSIZE, size))
        assert "File too large" in message and re.search(r"(\.tanglenas|out|metrics)/\S+", message), (size, message)
    assert play(project, GRADIENT) == 0
    assert contents(project) == whole.after


@pytest.mark.exhaustive
def test_a_place_that_cannot_be_written_is_named(theatre: Theatre) -> None:
    whole = theatre.undisturbed(GRADIENT)
    project = theatre.copy(whole.before)
    for name in (".tanglenas", ".tanglenas/locks", ".tanglenas/resume", "out", "metrics"):
        place = project / name
        place.parent.mkdir(exist_ok=True)
        if place.is_dir():  # a refused run made it
            shutil.rmtree(place)
        place.write_text("a file where a folder should be: no user may write below it, not even root")
        assert name in said(project, GRADIENT)
        place.unlink()
    assert play(project, GRADIENT) == 0
    assert contents(project) == whole.after


@pytest.mark.exhaustive
def test_data_that_vanish_are_named_and_the_run_goes_on_once_they_are_back(theatre: Theatre, tmp_path: Path) -> None:
    project = lay_out(tmp_path / "project")
    generator = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        (project / "data" / label).mkdir(parents=True)
        for number in range(24):
            pixels = torch.randint(256, (8, 8), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(project / "data" / label / f"{number}.png")
    images = ("DATASET = 'image_folder'", "create_dataset.root = 'data'", "create_dataset.in_channels = 1")
    small = ("create_dataset.image_size = 8", "search.batch_size = 8")
    case = Case("search", "autoformer_nano", "drnas", images + small)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(project, undisturbed)
    assert play(undisturbed, case) == 0, Path(f"{undisturbed}.log").read_text()

    assert play(project, case, Kill(30, 0)) == -signal.SIGKILL
    (project / "data").rename(tmp_path / "elsewhere")
    assert "data" in said(project, case)
    shutil.copytree(tmp_path / "elsewhere", project / "data")
    (project / "data" / "cat" / "3.png").write_bytes(b"no picture")
    assert "3.png" in said(project, case)
    shutil.rmtree(project / "data")
    (tmp_path / "elsewhere").rename(project / "data")
    assert play(project, case) == 0
    assert contents(project) == contents(undisturbed)


@pytest.mark.exhaustive
def test_a_second_start_names_the_process_that_runs(theatre: Theatre, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    case = Case("search", "autoformer_nano", "drnas", ("search.loss = @interruptions.loss",))
    project = lay_out(tmp_path / "project")
    process = play(project, case, wait=False, environment={"INTERRUPT": f"5:{fifo}"})
    with open(fifo, "w"):  # opens once the search stands still
        assert f"pid {process.pid} is still running this stage" in said(project, case)
        process.kill()
    process.join()
    assert play(project, case) == 0


def test_every_stage_is_played() -> None:
    assert set(MAIN) == {"search", "discretize", "retrain", "evaluate"}
