"""Recipes: one name configures all four stages, and each of the paper's goes through them."""

import inspect
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import gin
import numpy as np
import pytest
import torch
from dataset_files import write_fashion
from dvc.repo import Repo
from paths import ROOT
from PIL import Image
from project import STAGES, lay_out, set_params
from safetensors.torch import load_file
from stages import MAIN, arguments, forget_settings

from tanglenas_engine import Architecture, create_space
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config import configurables
from tanglenas_engine.pipeline.config.reader import configure
from tanglenas_engine.pipeline.config.values import check_types
from tanglenas_engine.plugins import manager
from tanglenas_engine.training.optim import parameter_groups

PAPER = sorted(path.name for path in (ROOT / "gin" / "paper").iterdir())
RECIPES = ["demo", "cpu", "pretrained", *(f"paper/{name}" for name in PAPER)]
NULL = {
    "search": dict.fromkeys(("epochs", "batch_size", "warmup_epochs")),
    "discretize": {"candidates": None},
    "retrain": dict.fromkeys(("epochs", "batch_size")),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lay_out(tmp_path_factory.mktemp("template"), code=False)
    set_params(folder, **NULL)
    Repo.init(folder, no_scm=True).close()
    return folder


@pytest.fixture(autouse=True)
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A project with no number in params.yaml; the current folder."""
    forget_settings(monkeypatch)
    shutil.copytree(template, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    yield tmp_path / "project"
    gin.clear_config()


def choose(recipe: str) -> None:
    """Set in params.yaml what the command in the recipe's search.gin sets."""
    text = Path("gin", recipe, "search.gin").read_text()
    changes = dict(re.findall(r"-S ([a-z]+)=(\S+)", text)) or {"recipe": recipe}
    assert changes["recipe"] == recipe
    if mode := re.search(r"-S retrain.mode=(\w+)", text):
        set_params(Path.cwd(), retrain={"mode": mode[1]})
    set_params(Path.cwd(), **changes)


def test_the_paper_has_a_recipe_for_every_space_of_its_own() -> None:
    assert PAPER == ["autoformer", "darts", "gpt_tinystories", "mobilenetv3", "nb201", "toy_cell", "toy_conv_macro"]


# --- every file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.part(4)
def test_a_recipe_configures_the_plugins_that_it_names(project: Path, recipe: str, stage: str) -> None:
    choose(recipe)
    configure(arguments(project, stage))
    for kind in ("space", "optimizer", "dataset") if stage == "search" else ("space", "dataset"):
        plugin = manager().resolve(kind, gin.query_parameter(f"%{kind.upper()}")).load()
        options = gin.get_bindings(f"create_{kind}")
        known = {name for base in plugin.__mro__ for name in inspect.signature(base.__init__).parameters}
        assert set(options) <= known
        check_types(kind, plugin, options)
    if stage in ("search", "retrain"):
        with torch.device("meta"):  # shapes only: the paper's spaces are large
            assert configurables.create_space(name=gin.query_parameter("%SPACE")).size > 1000


@pytest.mark.parametrize("stage", ["search", "retrain"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.part(6)
@pytest.mark.exhaustive
def test_a_recipe_trains(project: Path, recipe: str, stage: str) -> None:
    choose(recipe)
    configure(arguments(project, stage))
    bound = gin.get_bindings(stage)
    assert {"epochs", "batch_size"} <= bound.keys() and bound["epochs"] is not None
    network = torch.nn.Linear(3, 2)
    for name in (name for name in bound if name.endswith("optimizer")):
        reference = gin.query_parameter(f"{stage}.{name}")
        optimizer = bound[name](parameter_groups(network))
        rate = gin.query_parameter(f"{reference.scoped_selector}.lr")
        assert optimizer.param_groups[0]["lr"] == rate
        schedule = bound["scheduler"](optimizer, 1000)
        rates, before = [], network.weight.clone()
        for _ in range(1000):
            rates.append(optimizer.param_groups[0]["lr"])
            loss = bound.get("loss", torch.nn.functional.cross_entropy)
            loss(network(torch.ones(1, 3)), torch.tensor([1])).backward()
            optimizer.step()
            schedule.step()
        assert max(rates) == rate and rates[-1] < rate / 2
        assert not torch.equal(network.weight, before)


@pytest.mark.parametrize("one, other", [("search", "discretize"), ("retrain", "evaluate")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stage_has_the_space_and_the_data_of_the_one_whose_weights_it_reads(
    project: Path, recipe: str, one: str, other: str
) -> None:
    choose(recipe)
    found = []
    for stage in (one, other):
        configure(arguments(project, stage))
        bound = gin.get_bindings("create_space") | gin.get_bindings("create_dataset")
        found.append({name: value for name, value in bound.items() if name != "relaxation"})
    assert found[0] == found[1]


# --- what wins ------------------------------------------------------------------------------------------------


def test_a_number_in_params_wins_over_the_recipe_and_null_leaves_it_to_it(project: Path) -> None:
    choose("paper/nb201")
    set_params(project, search={"epochs": 7})
    configure(arguments(project, "search"))
    assert [gin.query_parameter(f"search.{name}") for name in ("epochs", "batch_size")] == [7, 64]
    assert gin.query_parameter("create_space.affine") is False  # over gin/spaces/nb201.gin
    set_params(project, recipe="demo")
    configure(arguments(project, "search"))
    assert [gin.query_parameter(f"search.{name}") for name in ("epochs", "batch_size")] == [7, 32]
    assert gin.query_parameter("create_space.affine") is True


def test_null_is_a_value_where_there_may_be_none(project: Path) -> None:
    Path("gin/demo/discretize.gin").write_text("discretize.max_params = 9\ndiscretize.candidates = 3\n")
    configure(arguments(project, "discretize"))
    assert gin.query_parameter("discretize.max_params") is None
    assert gin.query_parameter("discretize.candidates") == 3


def test_null_without_a_recipe_that_says_more_is_refused(project: Path) -> None:
    Path("gin/demo/search.gin").write_text("search.batch_size = 32\n")
    with pytest.raises(TangleNASError, match=r"search.epochs is None, expected a whole number"):
        configure(arguments(project, "search"))


def test_a_recipe_that_is_not_there_is_named_with_the_closest(project: Path) -> None:
    set_params(project, recipe="paper/dart")
    with pytest.raises(TangleNASError, match=r"gin/paper/dart/search.gin'.*Did you mean 'gin/paper/darts/search.gin'"):
        configure(arguments(project, "search"))


# --- through the pipeline -------------------------------------------------------------------------------------


def cifar10(folder: Path) -> None:
    """Random images of all ten classes, in the files of the binary version."""
    rng = np.random.default_rng(0)
    for file, count in {**{f"data_batch_{i}.bin": 20 for i in range(1, 6)}, "test_batch.bin": 20}.items():
        records = rng.integers(0, 256, (count, 3073), np.uint8)
        records[:, 0] = np.arange(count) % 10
        (folder / file).write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(map(str, range(10))))


def imagenet(folder: Path) -> None:
    for part, label in ((p, n) for p in ("train", "val") for n in ("a", "b")):
        (folder / part / label).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((40, 40, 3), 20 * i, np.uint8)).save(folder / part / label / f"{i}.png")


def text(folder: Path) -> None:
    (folder / "1.txt").write_text("What is read here has a few words. " * 100)


DATA: dict[str, Callable[[Path], object]] = {
    "cifar10": cifar10,
    "fashion_mnist": lambda folder: write_fashion(folder, train=100),
    "imagenet": imagenet,
    "text": text,
}
SIZES = {
    "autoformer": [
        "create_dataset.image_size = 32", "create_space.embed_dim = (24, 32)", "create_space.head_dim = 8",
        "create_space.depth = (1, 2)",
    ],
    "darts": ["create_dataset.image_size = 8", "create_space.channels = 2", "create_space.layers = 3"],
    "gpt_tinystories": [
        "create_dataset.block_size = 6", "create_dataset.tokenizer = 'char'", "create_space.vocab_size = 40",
        "create_space.layers = (1, 2)", "create_space.embed_dim = (24, 12)", "create_space.num_heads = (2, 3)",
    ],
    "mobilenetv3": [
        "create_dataset.image_size = 28", "create_dataset.num_classes = 2", "create_space.depth = (1, 2)",
        "create_space.stem_width = 8", "create_space.head_widths = (16, 24)",
        "create_space.stages = ('s2_c8_nre', 's2_c16_nhs_se0.25')",
    ],
    "nb201": ["create_dataset.image_size = 8", "create_space.channels = 2", "create_space.cells = 1"],
    "toy_cell": ["create_space.channels = 2"],
    "toy_conv_macro": [
        "create_dataset.image_size = 16", *(f"create_space.channels{i} = (2, 4)" for i in range(1, 5)),
    ],
}  # fmt: skip
SHORT = {
    "search": ["search.epochs = 1", "search.batch_size = 8"],
    "discretize": ["discretize.recalibration_batches = 1"],
    "retrain": ["retrain.epochs = 1", "retrain.batch_size = 16"],
    "evaluate": [],
}


def run(project: Path, stage: str, *bindings: str) -> dict[str, object]:
    """Run a stage and return its metrics."""
    MAIN[stage]([*arguments(project, stage), *bindings])
    return json.loads((project / "metrics" / f"{stage}.json").read_text())


def bind(name: str, stages: Sequence[str], *bindings: str) -> None:
    """Add bindings to a recipe of the paper, as the search reads those of the later stages."""
    for stage in stages:
        with Path("gin", "paper", name, f"{stage}.gin").open("a") as file:
            file.write("\n".join(["", *bindings, *SHORT[stage], ""]))


@pytest.fixture
def prepared(project: Path) -> Callable[[str], list[str]]:
    """Choose a recipe of the paper, write data for it, and return the bindings that make it small."""

    def prepare(name: str) -> list[str]:
        choose(f"paper/{name}")
        dataset = re.search(r"-S dataset=(\S+)", Path("gin", "paper", name, "search.gin").read_text())[1]
        (project / "data" / dataset).mkdir(parents=True)
        DATA[dataset](project / "data" / dataset)
        return [f"create_dataset.root = 'data/{dataset}'", *SIZES[name]]

    return prepare


@pytest.mark.parametrize("name", [name for name in PAPER if name != "darts"])
@pytest.mark.part(6)
@pytest.mark.exhaustive
def test_a_recipe_of_the_paper_goes_through_all_stages(project: Path, prepared, name: str) -> None:
    bind(name, STAGES, *prepared(name))
    for stage in STAGES:
        metrics = run(project, stage)
    assert 0 <= metrics["test_accuracy"] <= 100 and metrics["params"] > 0


@pytest.mark.exhaustive
def test_the_darts_recipe_retrains_a_larger_network_than_it_searched(
    project: Path, prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    small = prepared("darts")
    larger = [*small, "create_space.layers = 4", "create_space.channels = 3"]
    bind("darts", ("search", "discretize"), *small)
    bind("darts", ("retrain", "evaluate"), *larger)
    run(project, "search")
    searched = run(project, "discretize")
    run(project, "retrain")
    metrics = run(project, "evaluate")

    architecture = Architecture.from_json(Path("out/discretize/architecture.json").read_text())
    space = create_space("darts", layers=4, channels=3, affine=True, pool_norm=False, image_size=8)
    cost = space.cost(architecture)
    assert (metrics["params"], metrics["macs"]) == (cost.params, cost.flops) and metrics["params"] > searched["params"]
    weights = load_file("out/retrain/model/model.safetensors")
    assert weights.keys() == space.standalone(architecture).state_dict().keys()  # without the auxiliary head

    with pytest.raises(SystemExit):
        run(project, "evaluate", *small)
    assert "model.safetensors holds the weights of another network" in capsys.readouterr().err
    for mode in ("inherit", "finetune"):
        with pytest.raises(SystemExit):
            run(project, "retrain", f"retrain.mode = {mode!r}")
        said = capsys.readouterr().err
        assert f"retrain.mode {mode!r} takes the weights of the search: create the space as there" in said
