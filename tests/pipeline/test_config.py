"""Every gin file is read, and what it configures is built."""

import json
import subprocess
import sys
import typing
from pathlib import Path

import gin
import numpy as np
import pytest
import torch
from dataset_files import write_cifar, write_fashion
from paths import ROOT
from PIL import Image
from project import STAGES, lay_out

from pipelines import discretize, evaluate, retrain, search
from tanglenas_datasets.cifar import CIFAR10, CIFAR100
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.configurables import create_dataset, create_optimizer, create_space
from tanglenas_engine.pipeline.config.params import check_params, stage_arguments
from tanglenas_engine.pipeline.config.reader import bound_parameters, configurable, configure
from tanglenas_engine.pipeline.config.values import accepts
from tanglenas_engine.training.optim import parameter_groups

FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "gin").rglob("*.gin"))
BASE = ['SPACE = "autoformer_nano"', 'OPTIMIZER = "drnas"', 'DATASET = "digits"', "SEED = 0"]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(lay_out(tmp_path, code=False))
    yield tmp_path
    gin.clear_config()


def named(path: str) -> list[str]:
    return [file for file in FILES if Path(file).parts[1] == path]


def test_every_gin_file_is_in_a_folder_that_is_tested_here_or_is_a_recipe() -> None:
    assert {Path(file).parts[1] for file in FILES} <= {
        "stages",
        "spaces",
        "optimizers",
        "datasets",
        "demo",
        "cpu",
        "pretrained",
        "paper",
    }
    assert {Path(file).stem for file in named("stages")} == set(STAGES)


def train_a_step(stage: str) -> None:
    """Build the optimizers and the schedule that a stage's configuration binds, and let them train something."""
    bound = gin.get_bindings(stage)
    network = torch.nn.Linear(3, 2)
    for name in (name for name in bound if name.endswith("optimizer")):
        reference = gin.query_parameter(f"{stage}.{name}")
        optimizer = bound[name](parameter_groups(network))
        assert optimizer.param_groups[0]["lr"] == gin.query_parameter(f"{reference.scoped_selector}.lr")
        schedule = bound["scheduler"](optimizer, 10)
        before = network.weight.clone()
        network(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        schedule.step()
        assert not torch.equal(network.weight, before)


@pytest.mark.parametrize("file", named("stages"))
def test_a_stage_file_makes_optimizers_and_schedules_that_train(file: str) -> None:
    configure([file, *BASE])
    train_a_step(Path(file).stem)


@pytest.mark.parametrize(
    "file", [pytest.param(one, marks=[pytest.mark.exhaustive] * ("elasticized" in one)) for one in named("spaces")]
)
@pytest.mark.part(2)
def test_a_space_file_builds_its_space(file: str) -> None:
    configure([*BASE, f'SPACE = "{Path(file).stem}"'])
    with torch.device("meta"):  # shapes only: the paper's spaces are large
        space = create_space(name=Path(file).stem)
    assert space.cost(space.smallest()).params < space.cost(space.largest()).params


@pytest.mark.parametrize("file", named("optimizers"))
def test_an_optimizer_file_builds_its_optimizer(file: str) -> None:
    configure([*BASE, f'OPTIMIZER = "{Path(file).stem}"'])
    optimizer = create_optimizer(name=Path(file).stem)
    optimizer.bind(create_space(name="autoformer_nano"), 0)
    assert optimizer.sample(0, "weights") is not None


@pytest.mark.parametrize("file", named("datasets"))
def test_a_dataset_file_opens_its_dataset(file: str, project: Path) -> None:
    name, more = Path(file).stem, []
    if name == "fashion_mnist":
        write_fashion(project)
        more = [f'create_dataset.root = "{project}"']
    if name.startswith("cifar"):
        folder, *_ = write_cifar(project, CIFAR10 if name == "cifar10" else CIFAR100)
        more = [f'create_dataset.root = "{folder}"']
    if name.startswith("imagenet"):
        more = ["create_dataset.num_classes = 2"]
    parts = {"image_folder": ["images"], **{n: [f"{n}/train", f"{n}/val"] for n in ("imagenet", "imagenet16_120")}}
    for part in parts.get(name, []):
        for label, value in (("dark", 40), ("light", 200)):
            folder = project / "data" / part / label
            folder.mkdir(parents=True)
            Image.fromarray(np.full((40, 50, 3), value, np.uint8)).save(folder / "1.png")
    if name == "text":
        (project / "data" / "text").mkdir(parents=True)
        (project / "data" / "text" / "1.txt").write_text("What is read here has a few words. " * 500)
    configure([*BASE, f'DATASET = "{name}"', *more])
    dataset = create_dataset(name=name)
    inputs, targets = dataset.subset(torch.tensor([0, 1]), train=True).batch(torch.arange(2))
    assert len(inputs) == len(targets) == 2
    if (options := dataset.space_options()).keys() >= {"image_size"}:
        assert inputs.shape[1:] == (options["in_channels"], options["image_size"], options["image_size"])
        assert targets.max() < options["num_classes"]
    else:
        assert inputs.shape[1] == options["block_size"] and inputs.max() < options["vocab_size"]


def test_a_file_may_include_others_and_refer_to_any_package(project: Path) -> None:
    Path("other.gin").write_text("search.weight_optimizer = @torch.optim.SGD\nSGD.lr = %RATE\n")
    Path("mine.gin").write_text('include "other.gin"\nRATE = 0.5  # not @nothing.at.all\n')
    configure(["mine.gin", *BASE, 'create_dataset.root = "me@example.org #1 %NOTHING"'])
    optimizer = gin.get_bindings("search")["weight_optimizer"](parameter_groups(torch.nn.Linear(1, 1)))
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["lr"] == 0.5


def test_a_comment_behind_an_include_may_have_quotes(project: Path) -> None:
    Path("other.gin").write_text("search.epochs = 3\n")
    Path("mine.gin").write_text('include "other.gin"  # the "small" one\n')
    configure(["mine.gin", *BASE])
    assert gin.query_parameter("search.epochs") == 3


def test_functions_of_one_name_in_two_modules_keep_their_parameters_apart(project: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("first_of_two", "second_of_two"):
        Path(f"{module}.py").write_text("def lean(optimizer, steps, size=1):\n    return None\n")
    Path("mine.gin").write_text(
        "search.scheduler = @first_of_two.lean\nretrain.scheduler = @second_of_two.lean\n"
        "first_of_two.lean.size = 5\nsecond_of_two.lean.size = 7\n"
    )
    configure(["mine.gin", *BASE])
    found = bound_parameters()
    assert (found["first_of_two.lean.size"], found["second_of_two.lean.size"]) == (5, 7)
    assert "lean.size" not in found and found["search.scheduler"] == "@first_of_two.lean"


def test_options_of_several_types_are_checked_one_by_one() -> None:
    assert accepts(tuple[str, int], ("a", 1)) and not accepts(tuple[str, int], ("a", "b"))
    assert not accepts(tuple[str, int], ("a",)) and accepts(tuple[int, ...], (1, 2, 3))
    assert accepts(typing.Sequence, (1, "a")) and not accepts(typing.Sequence, 1)


def test_templates_are_found_as_dvc_finds_them(project: Path) -> None:
    Path("params.yaml").write_text("my-key: 1\nseeds: [4, 5]\nflag: true\nsearch: {rate: 0.5}\n")
    command = "python -m pipelines.search '${my-key} ${seeds[1]} ${ search.rate }' x=${flag}"
    Path("dvc.yaml").write_text(f"stages:\n  search:\n    cmd: {json.dumps(command)}\n")
    check_params()
    assert stage_arguments("search") == ["1 5 0.5", "x=true"]


@pytest.mark.parametrize(
    "command",
    [
        "OMP_NUM_THREADS=1 python -m pipelines.search 'SEED = 4' x='(1)'",
        "srun -n 2 torchrun --nproc-per-node 2 -m pipelines.search 'SEED = 4' x='(1)' 2>errors.log",
        ["mkdir -p logs", "python -m pipelines.search 'SEED = ${seed}' x='(1)' > logs/search.txt", "echo done"],
        "cd . && python -u -m pipelines.search 'SEED = 4' \\\n  x='(1)' && python -m pipelines.discretize 'SEED = 5'",
        "python -m pipelines.search 'SEED = 4' x='(1)' | tee 'log of; search'",
    ],
)
def test_the_arguments_of_a_stage_are_found_wherever_its_command_runs_it(project: Path, command: str | list) -> None:
    Path("params.yaml").write_text("seed: 4\n")
    Path("dvc.yaml").write_text(f"stages:\n  search:\n    cmd: {json.dumps(command)}\n")
    assert stage_arguments("search") == ["SEED = 4", "x=(1)"]


@pytest.mark.parametrize(
    "command", ["./mine.sh", "python -m pipelines.searching x=1", "bash -c \"python -m pipelines.search 'x = 1'\"", 7]
)
def test_a_command_that_does_not_tell_has_no_arguments(project: Path, command: str | int) -> None:
    Path("params.yaml").write_text("seed: 4\n")
    Path("dvc.yaml").write_text(f"stages:\n  search:\n    cmd: {json.dumps(command)}\n")
    assert stage_arguments("search") is None


def test_a_file_may_use_the_names_that_functions_had_before_they_were_public() -> None:
    before = "tanglenas_engine.training"
    Path("base.gin").write_text(f"search.scheduler = @{before}.cosine\n{before}.cosine.final = 0.5\n")
    Path("mine.gin").write_text('include "base.gin"\nretrain.loss = @tanglenas_engine.retrain.auxiliary\n')
    configure(["gin/stages/search.gin", "mine.gin", *BASE, f"{before}.cosine.warmup = 0.25"])
    assert gin.query_parameter("search.scheduler").selector == "tanglenas_engine.cosine"
    assert gin.get_bindings("tanglenas_engine.cosine")["final"] == 0.5
    assert gin.get_bindings("tanglenas_engine.cosine")["warmup"] == 0.25
    assert gin.query_parameter("retrain.loss").selector == "tanglenas_engine.auxiliary"
    Path("mine.gin").write_text(f"\n{before}.cosine.finnal = 0.5\n")
    with pytest.raises(TangleNASError, match=r"no parameter 'finnal'. Did you mean 'final'\? \[mine.gin: "):
        configure(["gin/stages/search.gin", "mine.gin", *BASE])


def test_bindings_win_over_files_and_the_last_one_over_all() -> None:
    configure(["gin/stages/search.gin", *BASE, "search.clip = 1.0", "search.clip = None"])
    assert gin.query_parameter("search.clip") is None


@pytest.mark.parametrize("name", ["torch.optim.Adadelta", "weights/torch.optim.ASGD"])
def test_a_binding_is_about_what_only_a_file_refers_to(project: Path, name: str) -> None:
    Path("mine.gin").write_text(f"search.weight_optimizer = @{name}\n{name}.lr = 0.5\n")
    assert name.split("/")[-1] not in configurable
    configure(["mine.gin", *BASE, f"{name}.lr = 0.01"])
    assert gin.query_parameter(f"{name}.lr") == 0.01
    with pytest.raises(TangleNASError, match=r"nothing called 'torch\.optim\.AdamV' to configure\. Did you mean"):
        configure(["mine.gin", *BASE, "torch.optim.AdamV.lr = 0.01"])


def test_stages_are_configurable_under_their_own_names() -> None:
    modules = (search, discretize, retrain, evaluate)
    assert [module.__name__ for module in modules] == [f"pipelines.{stage}" for stage in STAGES]
    assert set(STAGES) < set(configurable)


# --- the folder called gin ------------------------------------------------------------------------------------


def test_the_folder_gin_is_no_package_and_the_package_is_gin_config() -> None:
    assert not list((ROOT / "gin").rglob("*.py"))
    assert "site-packages" in Path(gin.__file__).parts


def test_from_the_root_of_the_project_import_gin_is_gin_config(project: Path) -> None:
    found = subprocess.check_output([sys.executable, "-c", "import gin; print(gin.__file__)"], cwd=ROOT, text=True)
    assert Path(found.strip()) == Path(gin.__file__)
