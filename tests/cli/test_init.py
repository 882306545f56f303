"""`tanglenas init`: the project that it lays out, from this checkout and from a wheel."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from dvc.repo import Repo
from paths import ROOT
from project import STAGES, contents, execute, set_params
from ruamel.yaml import YAML

from pipelines import environment
from tanglenas_engine.cli import main
from tanglenas_engine.cli.init import _with_keys

SMALL = {"search": {"epochs": 1, "warmup_epochs": 0, "batch_size": 64}, "retrain": {"epochs": 1, "batch_size": 64}}


@pytest.fixture
def init(tmp_path, monkeypatch):
    """Run the command for `project` in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["init", "project", *arguments])


def test_what_every_stage_depends_on_is_laid_out_or_written_by_another_stage(init, tmp_path):
    assert init().exit_code == 0
    project = tmp_path / "project"
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    with Repo(project) as repo:  # as DVC reads it, with the values of params.yaml in it
        stages = {stage.name: stage for stage in repo.index.stages}
        assert set(stages) == {"environment", *STAGES}
        written = [out.fs_path for stage in stages.values() for out in stage.outs]
        for name, stage in stages.items():
            files = [Path(dep.fs_path) for dep in stage.deps if dep.def_path != "params.yaml"]
            for file in files:
                made = any(file == Path(out) or Path(out) in file.parents for out in written)
                assert made or file.exists(), (name, file)
            assert name == "environment" or project / "environment.json" in files, name


@pytest.mark.parametrize("command", ["init", "study anytime --no-run --out", "study ranking --no-run --out"])
def test_git_adds_no_output_that_dvc_keeps_even_of_a_run_that_failed(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, [*command.split(), "project"]).exit_code == 0
    project = tmp_path / "project"
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    with Repo(project) as repo:
        kept = {str(Path(out.fs_path).relative_to(project)): out.use_cache for out in repo.index.outs}
    assert any(kept.values()) and not all(kept.values())
    asked = subprocess.run(["git", "check-ignore", *kept], cwd=project, capture_output=True, text=True)
    assert asked.stdout.splitlines() == [path for path, cached in kept.items() if cached]


def test_the_recipes_and_stages_are_those_of_this_version(init, tmp_path):
    init()
    laid_out = contents(tmp_path / "project")
    assert not [name for name in laid_out if "__pycache__" in name]
    for name in (
        "gin/stages/search.gin",
        "gin/spaces/autoformer_nano.gin",
        "pipelines/search.py",
        "dvc.yaml",
        ".dvcignore",
    ):
        assert laid_out[name] == (ROOT / name).read_bytes()
    assert not (tmp_path / "project" / "gin" / "__init__.py").exists()
    assert {"README.md", ".gitignore"} <= set(laid_out)


def test_names_go_into_params_and_the_rest_of_it_stays(init, tmp_path):
    init("--space", "gpt_nano", "--dataset", "stdlib_text", "--optimizer", "spos")
    before = (ROOT / "params.yaml").read_text().splitlines()
    after = (tmp_path / "project" / "params.yaml").read_text().splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["space: gpt_nano", "optimizer: spos", "dataset: stdlib_text"]


def test_a_repository_without_files_is_an_empty_folder(init, tmp_path):
    (tmp_path / "project" / ".git").mkdir(parents=True)
    assert init().exit_code == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--space", "autoformr_nano"], "Did you mean 'autoformer_nano'?"),
        (["--dataset", "digit"], "Did you mean 'digits'?"),
        (["--optimizer", "drnass"], "Did you mean 'drnas'?"),
        (["--space", "gpt_nano"], "--dataset stdlib_text or text"),
        (["--dataset", "text"], "gpt or gpt2 or gpt_char or gpt_nano or llama_nano or smollm_135m"),
    ],
)
def test_what_would_not_run_is_refused_before_anything_is_written(init, tmp_path, arguments, message):
    result = init(*arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "project").exists()


def test_a_folder_with_files_is_refused_and_left_as_it_is(init, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "notes.txt").write_text("mine")
    result = init()
    assert result.exit_code == 2 and "not an empty folder" in result.stderr
    assert contents(tmp_path / "project") == {"notes.txt": b"mine"}


def test_a_file_is_no_folder(init, tmp_path):
    (tmp_path / "project").write_text("mine")
    assert init().exit_code == 2


# --- a project that holds a copy of the pipeline, as those of earlier versions do ----------------------------------


@pytest.fixture
def earlier(init, tmp_path):
    """Such a project, with an own recipe and without one that came with the package."""
    assert init().exit_code == 0
    project = tmp_path / "project"
    for name in ("_config", "_records", "_spool", "_stage", "_store", "_tracking"):
        (project / "pipelines" / f"{name}.py").write_text("from tanglenas_engine.somewhere_else import something\n")
    for name in STAGES:
        (project / "pipelines" / f"{name}.py").write_text("from pipelines._stage import stage\n")
    environment = "import tanglenas_engine\nfrom tanglenas_engine.somewhere_else import code_version\n"
    (project / "pipelines" / "environment.py").write_text(environment)
    (project / "dvc.yaml").write_text("stages: {}\n")
    (project / "params.yaml").write_text("space: toy_cell\n")
    (project / "gin" / "demo" / "search.gin").write_text("search.epochs = 7\n")
    (project / "gin" / "cpu" / "search.gin").unlink()
    return project


@pytest.mark.parametrize("script", ["environment", *STAGES])
def test_a_script_of_an_earlier_version_says_in_a_sentence_what_to_do(earlier, script):
    command = [sys.executable, "-m", f"pipelines.{script}", "autoformer_nano", "drnas", "digits"]
    done = subprocess.run(command, cwd=earlier, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "Run `tanglenas init --upgrade .`" in done.stderr


def test_an_upgrade_replaces_scripts_and_dvc_yaml_and_keeps_what_was_there(earlier, init):
    before = contents(earlier)
    result = init("--upgrade")
    assert result.exit_code == 0, result.output
    after = contents(earlier)
    for name in ("dvc.yaml", *(f"pipelines/{script}.py" for script in ("__init__", "environment", *STAGES))):
        assert after[name] == (ROOT / name).read_bytes()
    assert not [name for name in after if name.startswith("pipelines/_") and name != "pipelines/__init__.py"]
    assert after["params.yaml"] == before["params.yaml"] and after["gin/demo/search.gin"] == b"search.epochs = 7\n"
    assert after["gin/cpu/search.gin"] == (ROOT / "gin" / "cpu" / "search.gin").read_bytes()
    (kept,) = (earlier / ".tanglenas" / "replaced").iterdir()
    assert contents(kept) == {name: before[name] for name in contents(kept)}
    assert {"dvc.yaml", "pipelines/_stage.py", "pipelines/search.py"} < set(contents(kept))
    assert "replaced: dvc.yaml, pipelines/discretize.py" in result.output and str(kept.name) in result.output
    assert "is of this version already" in init("--upgrade").output
    assert contents(earlier) == after


WHAT = ("replaced", "added")


def test_an_upgrade_adds_the_keys_that_dvc_yaml_refers_to(earlier, init):
    params = earlier / "params.yaml"
    params.write_text("# mine\nspace: toy_cell\ndiscretize:\n  max_params: 70  # a budget\n  max_flops: 5\n")
    assert (
        "added to params.yaml: discretize.method, discretize.candidates, discretize.seconds, discretize.max_macs"
        in init("--upgrade").output
    )
    text = params.read_text()
    assert text.startswith("# mine\nspace: toy_cell\n") and "max_params: 70  # a budget" in text
    values = YAML(typ="safe").load(text)["discretize"]
    added = {"method": "auto", "candidates": None, "seconds": None, "max_macs": None}
    assert values == {"max_params": 70, "max_flops": 5, **added}
    assert "is of this version already" in init("--upgrade").output
    params.write_text("a: [")
    (earlier / "dvc.yaml").write_text("stages: {}\n")
    before = contents(earlier)
    assert "params.yaml cannot be read" in init("--upgrade").stderr
    assert contents(earlier) == before


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_upgrade_leaves_the_lines_of_params_yaml_as_they_are(earlier, init, end):
    params, today = earlier / "params.yaml", (ROOT / "params.yaml").read_text()
    ours = next(line for line in today.splitlines() if line.startswith("  path_epochs: "))
    lacking = [line for line in today.splitlines() if line != ours]
    before = end.join([*lacking, "mine: null", "", "# the end", "other: {a: 1}"]).encode()
    params.write_bytes(before)
    (earlier / "dvc.yaml").unlink()
    (earlier / "dvc.yaml").write_text("stages: {}\n")
    (earlier / "pipelines" / "evaluate.py").unlink()
    said = init("--upgrade").output
    after = params.read_bytes().split(end.encode())
    assert after.count(ours.encode()) == 1
    assert [line for line in after if line != ours.encode()] == before.split(end.encode())
    last = max(i for i, line in enumerate(lacking) if line.startswith("  ") and i < lacking.index("discretize:"))
    assert after[last + 1] == ours.encode() and after[last + 2] == b""
    (kept,) = (earlier / ".tanglenas" / "replaced").iterdir()
    assert (kept / "params.yaml").read_bytes() == before
    replaced, added = (next(line for line in said.splitlines() if line.startswith(f"{verb}: ")) for verb in WHAT)
    assert "dvc.yaml" in replaced and "pipelines/evaluate.py" not in replaced and "pipelines/evaluate.py" in added


@pytest.mark.parametrize(
    "before, after",
    [
        ("seed: 0\r\ngroup:\r\n  mine: 1", "seed: 0\r\ngroup:\r\n  mine: 1\r\n  added: 2  # ours"),
        ("group:\n  a: 1\n# of b\n  b: 3\n# end\n", "group:\n  a: 1\n# of b\n  b: 3\n  added: 2  # ours\n# end\n"),
        (
            "all: &all {a: 1}\ngroup:\n  <<: *all\n  b: 3\n",
            "all: &all {a: 1}\ngroup:\n  <<: *all\n  b: 3\n  added: 2  # ours\n",
        ),
    ],
)
def test_lines_are_added_at_the_end_of_a_group(before, after):
    assert _with_keys(before, "group:\n  added: 2  # ours\n") == (after, ["group.added"])


@pytest.mark.parametrize("group", ["{}", "{method: auto}", "{method: auto,\n  candidates: 3}"])
def test_keys_that_cannot_be_added_are_told_and_nothing_is_replaced(earlier, init, group):
    (earlier / "params.yaml").write_text(f"discretize: {group}\n")
    (earlier / "dvc.yaml").write_text("stages: {}\n")
    before = contents(earlier)
    assert "params.yaml lacks discretize." in (said := " ".join(init("--upgrade").stderr.split()))
    assert "Write it so, and run this again" in said
    assert contents(earlier) == before


def test_an_upgrade_adds_the_rules_for_git_that_are_new(earlier, init):
    rules = earlier / ".gitignore"
    ours = rules.read_text()
    rules.write_text("mine\n# /data/\n.venv\nout")  # one put out, and two written otherwise
    result = init("--upgrade")
    assert "added to .gitignore: __pycache__/, *.pyc, /.tanglenas/, /mlflow.db*, /mlartifacts/\n" in result.output
    assert rules.read_text().startswith("mine\n# /data/\n.venv\nout\n__pycache__/\n")
    assert "is of this version already" in init("--upgrade").output
    rules.unlink()
    init("--upgrade")
    assert rules.read_text().splitlines() == [line for line in ours.splitlines() if not line.startswith("#")]


def test_dvc_does_not_read_what_an_upgrade_keeps(earlier, init):
    """DVC reads each dvc.yaml below its root, unless git ignores it, or .dvcignore in a project without git."""
    shutil.copy(ROOT / "params.yaml", earlier)
    (earlier / "dvc.yaml").write_text("vars: [beside.yaml]\nstages: {}\n")
    (earlier / ".dvcignore").write_text("mine\n__pycache__/\n")
    said = init("--upgrade").output
    with (earlier / ".dvc" / "config").open("a") as config:
        config.write("    no_scm = true\n")
    with Repo(earlier) as repo:
        assert len(repo.index.stages) == len(STAGES) + 1
    assert "added to .dvcignore: *.pyc, /.tanglenas/\n" in said
    assert (earlier / ".dvcignore").read_text() == "mine\n__pycache__/\n*.pyc\n/.tanglenas/\n"


def test_a_project_is_told_apart_from_another_folder_with_files(earlier, init):
    assert "tanglenas init --upgrade project" in init().stderr


def test_only_a_project_can_be_upgraded_and_its_names_stay(earlier, init):
    result = CliRunner().invoke(main, ["init", "--upgrade", "elsewhere"])
    assert result.exit_code == 2 and "elsewhere has no dvc.yaml and pipelines/ to upgrade" in result.stderr
    result = init("--upgrade", "--space", "gpt_nano")
    assert result.exit_code == 2 and "leaves params.yaml as it is" in result.stderr


def test_a_study_is_no_project_to_upgrade_and_stays_as_it_is(init, tmp_path):
    command = ["study", "ranking", "--no-run", "--seeds", "0", "--out", "project"]
    assert CliRunner().invoke(main, command).exit_code == 0
    before = contents(tmp_path / "project")
    result = init("--upgrade")
    assert result.exit_code == 2 and contents(tmp_path / "project") == before
    assert "project is a study" in result.stderr and "another --out: tanglenas study ranking" in result.stderr
    assert "is not an empty folder" in (advice := init().stderr) and "upgrade" not in advice


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Two installed plugins, one of which brings the space `theirs`."""
    for name in ("theirs", "unused"):
        info = tmp_path / f"tanglenas_{name}-0.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tanglenas-{name}\nVersion: 0.3\n")
        (info / "entry_points.txt").write_text(f"[tanglenas]\n{name} = tanglenas_{name}\n")
        (tmp_path / f"tanglenas_{name}").mkdir()
        (tmp_path / f"tanglenas_{name}" / "space.py").write_text("")
        (tmp_path / f"tanglenas_{name}" / "__init__.py").write_text(
            "from tanglenas_engine import hookimpl\n@hookimpl\n"
            f"def tanglenas_register_spaces(register):\n register({name!r}, 'tanglenas_{name}.space:Space')\n"
        )

    def written() -> dict:
        code = "import sys; from pipelines.environment import main; main(['theirs', 'drnas', 'digits'])"
        paths = os.pathsep.join([str(tmp_path), str(ROOT)])
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, check=True, stdout=-1
        )
        return json.loads((tmp_path / "environment.json").read_text())

    return written


@pytest.mark.exhaustive
def test_the_environment_changes_with_the_code_of_a_plugin_in_use_only(plugin, tmp_path):
    before = plugin()
    assert before["versions"]["tanglenas-theirs"] == "0.3"
    assert set(before["sources"]) == {
        "tanglenas_datasets", "tanglenas_engine", "tanglenas_gradient", "tanglenas_objectives", "tanglenas_theirs",
    }  # fmt: skip
    (tmp_path / "tanglenas_unused" / "space.py").write_text("WIDTH = 4\n")
    assert plugin() == before
    (tmp_path / "tanglenas_theirs" / "space.py").write_text("WIDTH = 4\n")
    after = plugin()
    assert after["sources"].pop("tanglenas_theirs") != before["sources"].pop("tanglenas_theirs")
    assert after == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["autoformr_nano", "drnas", "digits"], "Did you mean 'autoformer_nano'?"),
        (["autoformer_nano", "drnas"], "expected the names of space, optimizer, dataset"),
    ],
)
def test_the_environment_of_an_unknown_plugin_is_told_in_a_sentence(capsys, arguments, message):
    with pytest.raises(SystemExit) as ending:
        environment.main(arguments)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_an_editable_installation_copies_nothing(tmp_path):
    builders = pytest.importorskip("hatchling.builders.wheel", reason="hatchling comes with the extra 'dev'")
    (wheel,) = builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["editable"])
    packed = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert packed == ["_tanglenas.pth"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_project_of_an_installed_wheel_runs_outside_this_repository(tmp_path):
    pytest.importorskip("hatchling", reason="builds the wheel; it comes with the extra 'dev'")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").iterdir()
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    # An environment of its own, which borrows the libraries only after the wheel is in: pip must not see this one.
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    assert not {"gin", "pipelines", "plugins"} & {path.name for path in site.iterdir()}
    (site / "libraries.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))

    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])

    def run(folder: Path, *command: str) -> str:
        return execute(folder, *command, PATH=path, PYTHONPATH="", TANGLENAS_TRACKING="off")

    where = "import tanglenas_engine, tanglenas_vit; print(tanglenas_engine.__file__, tanglenas_vit.__file__)"
    assert run(tmp_path, "python", "-c", where).count(str(site)) == 2
    run(tmp_path, "tanglenas", "init", "project")
    project = tmp_path / "project"
    set_params(project, **SMALL)
    run(project, "git", "init", "--quiet")
    run(project, "git", "add", ".")
    person = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org")
    run(project, "git", *person, "commit", "--quiet", "-m", "new")
    run(project, "python", "-m", "dvc", "repro")
    assert json.loads((project / "metrics" / "evaluate.json").read_text())["test_samples"] == 359
    untracked = run(project, "git", "status", "--short", "--untracked-files=all")
    assert "out/search" not in untracked and "mlflow" not in untracked and ".tanglenas" not in untracked
    again = run(project, "python", "-m", "dvc", "repro")
    assert again.count("didn't change, skipping") == len(STAGES)
    # Commands share a process, whose start takes longer than they do.
    calls = [["show", "out/discretize/architecture.json"], ["report"], ["doctor"], ["new-plugin", "ladder"]]
    code = f"for call in {calls!r}: assert not main(call, standalone_mode=False), call"
    said = run(project, "python", "-c", f"from tanglenas_engine.cli import main\n{code}")
    assert json.loads((project / "metrics" / "evaluate.json").read_text())["digest"] in said and "problem" not in said
    assert (project / "report.html").exists()
    assert (project / "tanglenas-ladder" / "tanglenas_ladder" / "space.py").exists()
