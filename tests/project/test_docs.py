"""The documentation is complete, and what it shows works."""

import ast
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pluggy
import pytest
import torch
from click.testing import CliRunner
from paths import ROOT
from ruamel.yaml import YAML

import tanglenas_engine.pipeline.config.configurables  # noqa: F401  # makes known what gin files can bind
from tanglenas_engine import create_dataset, create_space
from tanglenas_engine.cli import main
from tanglenas_engine.cli.new_plugin import _renamed
from tanglenas_engine.pipeline.config.reader import configure
from tanglenas_engine.plugins import KINDS, PluginManager, hookspecs
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.testing import check_dataset, check_objective, check_optimizer, check_space

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXAMPLE = ROOT / "examples" / "tanglenas-example" / "tanglenas_example"
MANAGER = PluginManager()
OURS = [it for it in MANAGER.registrations() if it.distribution == "tanglenas"]


def text(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def blocks(language: str) -> list[tuple[str, str]]:
    """Every fenced block of a language, with the name of its page."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page.relative_to(DOCS).as_posix(), code) for page in PAGES for code in fence.findall(page.read_text())]


def python(page: str, part: str) -> str:
    (found,) = [code for name, code in blocks("python") if name == page and part in code]
    return found


def shell(program: str) -> list[tuple[str, list[str]]]:
    """The arguments of every command that blocks of shell commands give a program, with the name of the page."""
    lines = [(page, line) for page, code in blocks("sh") for line in code.replace("\\\n", "").splitlines()]
    parts = [(page, shlex.split(part, comments=True)) for page, line in lines for part in line.split("&&")]
    assignment = re.compile(r"[A-Z_]+=.*")
    parts = [(page, words[1:] if words and assignment.fullmatch(words[0]) else words) for page, words in parts]
    return [(page, words[1:]) for page, words in parts if words[:1] == [program]]


def leaves(group: click.Group) -> Iterator[click.Command]:
    """All commands, with those of groups."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        yield command
        if isinstance(command, click.Group):
            yield from leaves(command)


# --- complete ----------------------------------------------------------------------------------------------------


def test_every_hook_is_documented():
    manager = pluggy.PluginManager("tanglenas")
    manager.add_hookspecs(hookspecs)
    hooks = {name: vars(manager.hook)[name].spec.argnames for name in hookspecs.HOOKS}
    assert len(hooks) == len(KINDS)
    for name, arguments in hooks.items():
        assert f"`{name}({', '.join(arguments)})`" in text("hooks.md")


@pytest.mark.parametrize("it", OURS, ids=lambda it: f"{it.kind} {it.name}")
def test_every_name_is_documented(it):
    page = {"space": "spaces.md", "optimizer": "optimizers.md", "dataset": "datasets.md", "objective": "budgets.md"}
    assert f"| `{it.name}` |" in text(page[it.kind])
    if it.kind == "space":
        assert any(f"space={it.name}" in arguments for name, arguments in shell("dvc") if name == "spaces.md") or (
            f"space={it.name.rsplit('_', 1)[0]}_" in text("spaces.md")
        ), f"no example command searches {it.name}"


@pytest.mark.parametrize("name", [it.name for it in OURS if it.kind == "space"])
def test_the_numbers_of_a_space_are_its_own(name):
    with torch.device("meta"):
        space = create_space(name)
    least, most = space.cost(space.smallest()), space.cost(space.largest())
    costs = [f"{getattr(least, metric):,} to {getattr(most, metric):,}" for metric in ("params", "macs")]
    assert f"| `{name}` | {space.size:,} | {' | '.join(costs)} |" in text("spaces.md")


def test_every_key_of_params_yaml_is_documented():
    for key in params():
        assert f"`{key}`" in text("configuration.md")


def test_every_environment_variable_is_documented():
    sources = [
        path for folder in ("tanglenas_engine", "pipelines", "plugins") for path in (ROOT / folder).rglob("*.py")
    ]
    used = {name for path in sources for name in re.findall(r"TANGLENAS_[A-Z_]*[A-Z]", path.read_text("utf-8"))}
    documented = "".join(page.read_text("utf-8") for page in PAGES)
    assert used and not [name for name in used if name not in documented]


def test_the_public_names_are_the_api_page():
    package = ROOT / "tanglenas_engine"
    public = {*exports(package / "__init__.pyi"), *exports(package / "testing" / "__init__.py")}
    listed = re.findall(r"^::: (\S+)", text("api.md"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted(public), "docs/api.md lists other names than the public ones"


def exports(file: Path) -> set[str]:
    """The names that a package's file imports from its modules, each by the path of the module that defines it."""
    package = ".".join(file.parent.relative_to(ROOT).parts)
    imports = [node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {".".join(filter(None, (package, it.module, alias.name))) for it in imports for alias in it.names}


def test_the_help_of_every_command_is_in_the_reference():
    module = _loaded(DOCS / "reference.py")
    said, written = module.page().split(), text("commands.md").split()
    assert said == written, "docs/commands.md is out of date: run `python docs/reference.py`"


# --- true --------------------------------------------------------------------------------------------------------


def test_commands_of_tanglenas_are_understood(monkeypatch):
    called = []
    for command in leaves(main):
        if not isinstance(command, click.Group):
            monkeypatch.setattr(command, "callback", lambda *_, **__: called.append(1))
    given = [(page, arguments) for page, arguments in shell("tanglenas") if arguments != ["plugins"]]
    for page, arguments in given:
        outcome = CliRunner().invoke(main, [word for word in arguments if word != "--json"])
        assert outcome.exit_code == 0, f"{page}: tanglenas {shlex.join(arguments)}: {outcome.output}"
    assert len(called) >= 20


def params() -> dict:
    """params.yaml, by the keys that `-S` takes."""
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    flat = {f"{group}.{key}": value for group, inner in values.items() if isinstance(inner, dict)
            for key, value in inner.items()}  # fmt: skip
    return {**flat, **{key: value for key, value in values.items() if not isinstance(value, dict)}}


def test_runs_that_are_shown_set_what_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit = set()
    runs = [(page, words) for page, words in shell("dvc") if words[:2] == ["exp", "run"]]
    assert len(runs) >= 20
    for page, words in runs:
        settings = [words[i + 1] for i, word in enumerate(words) if word in ("-S", "--set-param")]
        values = dict(setting.split("=", 1) for setting in settings)
        assert not set(values) - set(params()), page
        now = {**params(), **values}
        assert (ROOT / "gin" / now["recipe"]).is_dir(), page
        if now["search.weights"] != "scratch":  # other rates can destroy trained weights
            assert (now["recipe"], now["retrain.mode"]) == ("pretrained", "finetune"), shlex.join(words)
        recipe = dict(
            re.findall(r"^(search\.\w+) = (\d+)$", (ROOT / "gin" / now["recipe"] / "search.gin").read_text(), re.M)
        )
        epochs, warmup = (int(now[key] or recipe[key]) for key in ("search.epochs", "search.warmup_epochs"))
        assert warmup < epochs, f"{page}: {shlex.join(words)}"
        if "theirs" not in values.values():
            assert all(MANAGER.resolve("optimizer", name) for name in now["optimizer"].split(","))
            fit |= set(itertools.product(now["space"].split(","), now["dataset"].split(",")))
    for number, (space, dataset) in enumerate(sorted(fit)):  # `init` refuses a pair that does not fit
        outcome = CliRunner().invoke(main, ["init", str(number), "--space", space, "--dataset", dataset])
        assert outcome.exit_code == 0, outcome.output


@pytest.mark.parametrize("number", range(len(blocks("gin"))))
def test_gin_files_that_are_shown_are_read(number, monkeypatch, tmp_path):
    page, code = blocks("gin")[number]
    monkeypatch.chdir(ROOT)
    shown = tmp_path / "shown.gin"
    shown.write_text(code)
    name = {"evaluate.md": "evaluate"}.get(page, "discretize" if "evolution." in code else "search")
    bindings = ['SPACE = "nb201"', 'OPTIMIZER = "drnas"', 'DATASET = "digits"', "SEED = 0"]
    configure([f"gin/stages/{name}.gin", f"gin/demo/{name}.gin", str(shown), *bindings])


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[0] for _, words in shell("make")} | set(re.findall(r"`make ([a-z-]+)`", "".join(map(text, names()))))
    assert named and named <= targets


def names() -> list[str]:
    return [page.relative_to(DOCS).as_posix() for page in PAGES]


ALONE = ("self.derive_seed", "class Operations", "class FairPaths")
"""What shows the blocks of tutorials that are no part of the example."""


@pytest.mark.parametrize("page", ["own-space.md", "own-optimizer.md"])
def test_tutorials_show_the_example(page):
    files = (*EXAMPLE.glob("*.py"), *EXAMPLE.parent.glob("tests/*.py"))
    written = _renamed("\n".join(path.read_text() for path in files), "theirs")  # as new-plugin does it
    shown = [code for name, code in blocks("python") if name == page and not any(part in code for part in ALONE)]
    assert len(shown) >= 2
    for code in shown:
        parts = [part for part in re.split(r"\n\n\n", code.strip("\n")) if not part.startswith(("import", "from"))]
        assert all(part in written for part in parts), code


def test_datasets_that_are_shown_keep_the_contract(tmp_path):
    names: dict = {}
    exec(python("own-data.md", "class Stripes"), names)
    check_dataset(names["Stripes"])
    exec(python("own-data.md", "class Table"), names)
    rows = [f"{i % 7},{i % 5},{'abc'[i % 3]}" for i in range(60)]
    (tmp_path / "table.csv").write_text("\n".join(["width,height,kind", *rows]))
    check_dataset(lambda: names["Table"](str(tmp_path / "table.csv")))


@pytest.mark.slow
def test_the_space_of_operations_that_is_shown_is_one():
    names: dict = {}
    exec(python("own-space.md", "class Operations"), names)
    check_space(names["Operations"])


@pytest.mark.slow
@pytest.mark.parametrize("space", ["autoformer_nano", "toy_cell"])
def test_the_optimizer_of_several_paths_that_is_shown_is_one(space):
    names: dict = {}
    exec(python("own-optimizer.md", "class FairPaths"), names)
    check_optimizer(names["FairPaths"], lambda: create_space(space))


def test_the_objective_that_is_shown_is_one():
    names: dict = {}
    exec(python("budgets.md", "class Memory"), names)
    space = create_space("gpt_nano")
    objective = names["Memory"]().bind(space)
    assert objective.cost(space.largest()) == 2 * space.cost(space.largest()).params
    check_objective(names["Memory"], lambda: create_space("gpt_nano"))


@pytest.mark.parametrize("name", ["autoformer_nano", "toy_cell", "mobilenetv3_nano"])
def test_the_objective_by_tables_that_is_shown_is_one(name, tmp_path):
    names: dict = {}
    exec(python("budgets.md", "class Energy"), names)
    space = create_space(name)
    prices = {f"{row.choice}={one}": sorted(row.options).index(one) for row in space.rows for one in row.options}
    (tmp_path / "energy.json").write_text(json.dumps(prices))
    check_objective(lambda: names["Energy"](str(tmp_path / "energy.json")), lambda: create_space(name))


@pytest.mark.parametrize(("page", "part"), [("quickstart.md", "result = search("), ("faq.md", "load_state_dict")])
def test_code_that_is_shown_runs(page, part):
    exec(python(page, part), {})


@pytest.mark.exhaustive
def test_answers_are_commands_that_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    space = create_space("autoformer_nano")
    found = space.sample(torch.Generator().manual_seed(0))
    write_atomic(Path("out/discretize/architecture.json"), found.to_json())
    space.export(space.extract(found), found, Path("out/retrain/model"), create_dataset("digits"))
    run = [
        words for page, words in shell("tanglenas") if page == "faq.md" and words[0] in ("show", "export", "latency")
    ]
    assert {words[0] for words in run} == {"show", "export", "latency"}
    for words in run:
        outcome = CliRunner().invoke(main, words)
        assert outcome.exit_code == 0, f"{shlex.join(words)}: {outcome.output}"
    assert Path("architecture.png").stat().st_size and Path("exported/model.pt2").stat().st_size
    names: dict = {}
    exec(python("quickstart.md", "timm.create_model"), names)
    assert sum(p.numel() for p in names["model"].parameters()) == space.cost(found).params


# --- whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=names())
def test_links_lead_somewhere(page):
    for target in re.findall(
        r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    ):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page: Path) -> list[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings]


@pytest.mark.exhaustive
def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    outcome = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert outcome.returncode == 0, outcome.stderr
    assert 'id="tanglenas_engine.stages.search.search"' in (tmp_path / "api" / "index.html").read_text()


def _loaded(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
