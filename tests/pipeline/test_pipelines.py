"""The stages in this process: what they say when something is wrong, and how they end and go on."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import gin
import interruptions
import pytest
import torch
from dvc.parsing import ResolveError
from hypothesis import given, settings
from hypothesis import strategies as st
from project import STAGES, contents, set_params
from safetensors.torch import save_file
from stages import arguments, forget_settings

from pipelines import discretize, evaluate, search
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.configurables import create_space
from tanglenas_engine.pipeline.config.params import check_params
from tanglenas_engine.pipeline.config.reader import configurable, configure
from tanglenas_engine.pipeline.tracking.tracker import lineage
from tanglenas_engine.runtime.weights import load_weights

# MLflow's own models, on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

BASE = ['SPACE = "autoformer_nano"', 'OPTIMIZER = "drnas"', 'DATASET = "digits"', "SEED = 0"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    forget_settings(monkeypatch)
    yield
    gin.clear_config()


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which nothing ran yet; the current folder."""
    shutil.copytree(template, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


# --- configuration --------------------------------------------------------------------------------------------

MISTAKES = {
    "a parameter": ("search.epohcs = 3", "search has no parameter 'epohcs'. Did you mean 'epochs'?"),
    "a function": ("serach.epochs = 3", "nothing called 'serach' to configure. Did you mean 'search'?"),
    "a macro that stages read": ('OPTIMISER = "spos"', "nothing uses the macro 'OPTIMISER'. Did you mean 'OPTIMIZER'?"),
    "a macro that is not set": ("search.epochs = %SEEDS", "the macro %SEEDS is not set. Did you mean 'SEED'?"),
    # gin shortens names as far as no other registered one, of whatever test, ends alike: nll_loss stands alone.
    "a scope": (
        "search.loss = @mine/torch.nn.functional.nll_loss\nmin/torch.nn.functional.nll_loss.reduction = 'mean'",
        "nothing uses the scope 'min' of min/nll_loss. Did you mean 'mine'?",
    ),
    "a bare word": ("search.epochs = ten", "the value 'ten' cannot be read: expected a number"),
    "arithmetic": ("search.epochs = 1 + 1", "Expected newline [search.epochs = 1 + 1]"),
    "no value": ("search.epochs =", "Unable to parse value"),
    "an open bracket": ("search.epochs = (3", "a bracket or a quote is not closed"),
    "text for a number": ('search.epochs = "ten"', "search.epochs is 'ten', expected a whole number"),
    "a share for a number": ("search.epochs = 1.5", "search.epochs is 1.5, expected a whole number"),
    "a list for a number": ("search.epochs = [1, 2]", "search.epochs is [1, 2], expected a whole number"),
    "nothing for a number": ("search.epochs = None", "search.epochs is None, expected a whole number"),
    "a truth for a number": ("search.clip = True", "search.clip is True, expected a number or None"),
    "a wrong type behind a macro": ("search.clip = %CLIP\nCLIP = 'a'", "search.clip is 'a', expected a number or None"),
    "a number for a function": ("search.weight_optimizer = 3", "weight_optimizer is 3, expected an @reference"),
    "a function for a number": ("search.epochs = @torch.optim.SGD", "is @torch.optim.SGD, expected a whole number"),
    "a loss of one argument": (
        "search.loss = @torch.nn.functional.softsign",
        "search.loss is @torch.nn.functional.softsign, expected an @reference to what takes 2 arguments and",
    ),
    "a loss that needs more": (
        "retrain.loss = @torch.nn.functional.gaussian_nll_loss",
        "retrain.loss is @torch.nn.functional.gaussian_nll_loss, expected an @reference to what takes 2 arguments",
    ),
    "a class for a loss": (
        "search.loss = @torch.nn.CrossEntropyLoss",
        "an instance of that class is meant: @torch.nn.CrossEntropyLoss()",
    ),
    "an optimizer that needs more": (
        "search.weight_optimizer = @torch.optim.lr_scheduler.StepLR",
        "search.weight_optimizer is @torch.optim.lr_scheduler.StepLR, expected an @reference to what takes 1 argument",
    ),
    "what is no optimizer": (
        "search.architecture_optimizer = @torch.nn.Identity",
        "@torch.nn.Identity, expected an @reference to what takes 1 argument and returns Optimizer",
    ),
    "a scheduler of one argument": (
        "search.scheduler = @torch.nn.functional.softsign",
        "expected an @reference to what takes 2 arguments and returns LRScheduler or None",
    ),
    "an optimizer for a scheduler": ("retrain.scheduler = @torch.optim.SGD", "expected an @reference to what takes 2"),
    "a wrapper that needs more": ("retrain.wrap = @torch.nn.Bilinear", "retrain.wrap is @torch.nn.Bilinear, expected"),
    "a function for a number that may be left out": ("search.clip = @torch.optim.SGD", "expected a number or None"),
    "another word": ('search.strategy = "alternate"', "expected 'alternating' or 'simultaneous'"),
    "a module": ("search.loss = @torhc.nn.functional.mse_loss", "@torhc.nn.functional.mse_loss cannot be used: Modu"),
    "an attribute": ("search.loss = @torch.nn.functional.mse_los", "has no attribute 'mse_los'"),
    "a constant": ("search.loss = @torch.pi", "@torch.pi cannot be used"),
    "what the stage sets": ("search.seed = 3", "search.seed is what the stage itself sets; set the macro SEED"),
    "the name of a plugin": ('create_space.name = "x"', "create_space.name is what the stage itself sets; set the"),
    "a file": ("gin/stages/serach.gin", "'gin/stages/serach.gin' cannot be read. Did you mean 'gin/stages/search.gin'"),
    "an included file": ('include "gin/spaces/x.gin"', "'gin/spaces/x.gin' cannot be read"),
    "an import": ("import nothing.at.all", "No module named 'nothing'"),
}


@pytest.mark.parametrize("binding, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_binding_is_explained(project: Path, binding: str, message: str) -> None:
    with pytest.raises(TangleNASError) as error:
        configure([*BASE, binding])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bindings",
    [
        ["search.loss = @torch.nn.CrossEntropyLoss()"],
        ["search.loss = @torch.nn.functional.gaussian_nll_loss", "torch.nn.functional.gaussian_nll_loss.var = 1.0"],
        ["search.loss = @torch.nn.functional.cross_entropy", "torch.nn.functional.cross_entropy.target = None"],
        ["search.weight_optimizer = @timm.optim.create_optimizer_v2"],
        ["search.scheduler = @torch.optim.lr_scheduler.CosineAnnealingLR"],
        ["search.scheduler = None"],
        ["retrain.wrap = @torch.nn.Sequential"],
    ],
    ids=lambda bindings: bindings[0],
)
def test_what_takes_the_arguments_that_are_given_may_be_bound(project: Path, bindings: list[str]) -> None:
    configure([*BASE, *bindings])


def test_a_mistake_in_a_file_names_file_and_line(project: Path) -> None:
    Path("mine.gin").write_text("# a comment\n\nsearch.epochs = 3\nsearch.stragety = 'simultaneous'\n")
    with pytest.raises(TangleNASError, match=re.escape("Did you mean 'strategy'? [mine.gin: search.stragety = ")):
        configure(["mine.gin", *BASE])


def test_files_that_include_each_other_are_named(project: Path) -> None:
    Path("a.gin").write_text('include "./b.gin"\n')
    Path("b.gin").write_text('include "a.gin"\n')
    with pytest.raises(TangleNASError, match=r"'a.gin' includes itself \(a.gin -> b.gin -> a.gin\)"):
        configure(["a.gin", *BASE])


NAMES = st.sampled_from(
    [
        *(name for name in configurable if "." not in name),
        "search.epochs",
        "SPACE",
        "N",
        "a/search",
        "x",
        "gin",
        "@",
        "%",
    ]
)
ENDINGS = st.sampled_from(["", ".epochs", ".batch_size", ".clip", ".loss", ".name", ".value", ":", ".epohcs", "/x"])
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.tuples(inner) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
).map(repr)
REFERENCES = st.sampled_from(
    [
        "@torch.optim.SGD",
        "@w/torch.optim.SGD()",
        "@search",
        "@search()",
        "@x",
        "%N",
        "%SEED",
        "%",
        "@",
        "@torch.pi",
        "@a.b",
    ]
)
VALUES = LITERALS | REFERENCES | st.text(max_size=8)
BINDINGS = st.tuples(NAMES, ENDINGS, st.sampled_from([" = ", "=", " ", "\n= "]), VALUES).map("".join) | st.text(
    max_size=12
)


@settings(max_examples=2 * settings().max_examples)
@given(st.lists(BINDINGS, max_size=3))
def test_whatever_is_bound_is_taken_or_refused_in_words(finished: Path, bindings: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        try:
            configure([*BASE, *bindings])
        except TangleNASError as error:
            assert len(str(error)) > 10


@pytest.mark.parametrize(
    "binding, message",
    [
        ('SPACE = "autoformer_nanno"', "unknown space 'autoformer_nanno'. Did you mean 'autoformer_nano'?"),
        ('DATASET = "digit"', "unknown dataset 'digit'. Did you mean 'digits'?"),
        ('OPTIMIZER = "drnass"', "unknown optimizer 'drnass'. Did you mean 'drnas'?"),
        ("SPACE = 3", "SPACE is 3, expected a quoted string"),
        ("SEED = 1.5", "SEED is 1.5, expected a whole number"),
        ("SEED = -1", "SEED is -1, expected a whole number from 0"),
        ("create_space.embed_dims = (8, 16)", "no option 'embed_dims'. Did you mean 'embed_dim'?"),
        ("create_space.embed_dim = 8", "create_space.embed_dim is 8, expected a list, each item a whole number"),
        ("create_space.patch_size = 3", "images of 8 pixels do not divide into patches of 3"),
        ("create_space.in_channels = 3", "shape 1 x 8 x 8 (C x H x W)"),
        ("create_space.num_classes = 5", "has 5 outputs: create it with"),
        (
            'SPACE = "gpt_nano"',
            "'gpt_nano' is not for data such as 'digits', which need a space with num_classes, image",
        ),
        (
            'SPACE = "toy_conv_macro"\ncreate_dataset.image_size = 9',
            "from 16 on, such as 28, 32 or 64. The dataset 'digits' says so: bind create_dataset.image_size in gin/",
        ),
        ("create_optimizer.regularisation = 'kl'", "takes no option 'regularisation'"),
        ("create_optimizer.scale = 'small'", "create_optimizer.scale is 'small', expected a number"),
        ("create_dataset.image_size = 99", "digits: image_size is 99"),
        ("search.epochs = -1", "search.epochs is -1, expected a whole number of at least 1"),
        ("search.warmup_epochs = 2", "search.warmup_epochs is 2 and search.epochs 2, so alpha"),
        ("search.batch_size = 0", "search.batch_size is 0"),
        ("search.batch_size = 100000", "batch size 100000 is larger than the 647 samples"),
        ("make_splits.test_portion = 1.0", "test_portion"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_training(
    project: Path, refused, monkeypatch: pytest.MonkeyPatch, binding: str, message: str
) -> None:
    trained = interruptions.calls
    assert message in refused("search", "search.loss = @interruptions.loss", binding)
    assert interruptions.calls == trained
    assert not Path("out/search/supernet.safetensors").exists()


def test_a_folder_of_images_that_is_not_there_is_named(project: Path, refused) -> None:
    set_params(project, dataset="image_folder")
    assert "there is no folder data/images" in refused("search")


def test_a_stage_without_its_macros_says_which(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        search.main(["gin/stages/search.gin"])
    assert "SEED is not set" in capsys.readouterr().err


def test_help_says_how_a_stage_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        search.main(["--help"])
    assert not ending.value.code and "python -m pipelines.STAGE FILE.gin" in capsys.readouterr().out


# --- params.yaml ----------------------------------------------------------------------------------------------


def test_every_key_of_params_is_used_by_a_stage_and_checked(project: Path) -> None:
    check_params()
    for stage in STAGES:
        configure(arguments(project, stage))


@pytest.mark.parametrize(
    "change, key, meant",
    [
        ({"optimiser": "spos"}, "optimiser", "optimizer"),
        ({"search": {"epoch": 3}}, "search.epoch", "search.epochs"),
        ({"retrian": {"epochs": 3}}, "retrian", "retrain"),
    ],
)
def test_a_key_that_no_stage_uses_is_named_with_the_closest(
    project: Path, refused, change: dict[str, object], key: str, meant: str
) -> None:
    set_params(project, **change)
    assert f"nothing in dvc.yaml uses the key {key!r}. Did you mean {meant!r}?" in refused("search")


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\t"])
def test_params_that_are_no_yaml_are_refused(project: Path, text: str) -> None:
    Path("params.yaml").write_text(text)
    with pytest.raises(TangleNASError, match=r"params.yaml cannot be read"):
        check_params()


@pytest.mark.parametrize(
    "value, message",
    [
        ("ten", "the value 'ten' cannot be read"),
        (-1, "search.epochs is -1, expected a whole number of at least 1"),
        (1.5, "search.epochs is 1.5, expected a whole number"),
        (True, "the value 'true' cannot be read"),
    ],
)
def test_values_of_the_wrong_type_in_params_are_refused(project: Path, refused, value: object, message: str) -> None:
    set_params(project, search={"epochs": value})
    assert message in refused("search")


def test_dvc_itself_refuses_a_list_where_a_value_belongs(project: Path) -> None:
    set_params(project, search={"epochs": [1, 2]})
    with pytest.raises(ResolveError, match="failed to parse"):
        arguments(project, "search")


# --- what flows between the stages ----------------------------------------------------------------------------


def test_the_stages_leave_their_files_and_metrics(finished: Path) -> None:
    filled = {path: len(content) > 0 for path, content in contents(finished / "out").items()}
    front = {path for path in filled if path.startswith("discretize/pareto/")}  # an architecture each
    assert front and {path: there for path, there in filled.items() if path not in front} == dict.fromkeys(
        [
            *(f"search/{name}" for name in ("alphas.png", "anytime.png", "history.csv", "mixture.csv")),
            *(f"search/{name}.safetensors" for name in ("mixture", "supernet")),
            "search/splits.json",
            *(f"discretize/{name}" for name in ("architecture.json", "architecture.png", "candidates.csv")),
            *(f"discretize/{name}" for name in ("candidates.png", "pareto.csv", "pareto.png")),
            *(f"retrain/{name}" for name in ("history.csv", "training.png", "model/config.json")),
            "retrain/model/model.safetensors",
            *(f"evaluate/{name}" for name in ("architecture.png", "classes.csv", "confusion.csv", "confusion.png")),
            *(f"{stage}/operative.gin" for stage in STAGES),
            *(f"{stage}.run.json" for stage in STAGES),
        ],
        True,
    )
    metrics = {stage: json.loads((finished / "metrics" / f"{stage}.json").read_text()) for stage in STAGES}
    assert metrics["evaluate"]["digest"] == metrics["discretize"]["digest"]
    assert metrics["evaluate"]["test_samples"] == 359
    assert not list((finished / ".tanglenas").rglob("*")) or not list((finished / ".tanglenas" / "resume").iterdir())


def test_the_model_says_how_inputs_of_its_dataset_are_made(finished: Path) -> None:
    config = json.loads((finished / "out" / "retrain" / "model" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [4.88 / 16]  # that of digits, whose pixels go to 16
    assert config["pretrained_cfg"]["input_size"] == [1, 8, 8]


@pytest.mark.exhaustive
def test_the_operative_config_runs_a_stage_again_with_the_same_result(done: Path) -> None:
    before, weights = contents(done / "out" / "search"), load_weights("out/search/supernet.safetensors")
    for folder in ("stages", "spaces", "optimizers", "datasets"):
        shutil.rmtree(done / "gin" / folder)
    (done / "dvc.yaml").unlink()  # it names later stages, which a search would try
    shutil.copy("out/search/operative.gin", "mine.gin")
    assert "create_space.num_classes = 10" in Path("mine.gin").read_text()  # so the space is known without the data
    search.main(["mine.gin"])
    again = load_weights("out/search/supernet.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    after = contents(done / "out" / "search")
    assert [name for name in before if before[name] != after[name]] == ["supernet.safetensors"]  # another lineage


@pytest.mark.parametrize(
    "stage, file, before",
    [
        ("discretize", "out/search/mixture.safetensors", "search"),
        ("discretize", "out/search/supernet.safetensors", "search"),
        ("retrain", "out/discretize/architecture.json", "discretize"),
        ("evaluate", "out/retrain/model/model.safetensors", "retrain"),
    ],
)
def test_a_missing_output_of_an_earlier_stage_is_named(done: Path, refused, stage: str, file: str, before: str) -> None:
    Path(file).unlink()
    assert f"{file} is missing" in refused(stage)


def edited(**changes: object) -> str:
    content = json.loads(Path("out/discretize/architecture.json").read_text())
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: "{", "not an architecture file"),
        (lambda: edited(format=2), "format 2, but this version reads format 1"),
        (lambda: edited(space="autoformer_t", digest=None), "'autoformer_t'"),
        (lambda: edited(digest="0" * 16), "Remove the line 'digest'"),
        (lambda: edited(choices={"embed_dim": 32}, digest=None), "also needs: depth"),
    ],
    ids=["no JSON", "format", "space", "digest", "choices"],
)
@pytest.mark.parametrize("stage", ["retrain", "evaluate"])
def test_an_architecture_file_that_does_not_fit_is_refused(
    done: Path, refused, stage: str, change: Callable[[], str], message: str
) -> None:
    Path("out/discretize/architecture.json").write_text(change())
    assert message in refused(stage)


def _fails(*_: object) -> str:
    raise AttributeError("'Tokens' object has no attribute 'encode'")


@pytest.mark.parametrize("show, told", [(_fails, "AttributeError: 'Tok"), (lambda *_: ["no text"], "TypeError: ")])
def test_a_sample_that_fails_costs_no_result(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], show: Callable, told: str
) -> None:
    monkeypatch.setattr("tanglenas_engine.spaces.space.SearchSpace.show", show)
    Path("metrics/evaluate.json").unlink()
    evaluate.main(arguments(done, "evaluate"))
    assert f"no sample, as `show` of 'autoformer_nano' failed: {told}" in capsys.readouterr().out
    assert Path("metrics/evaluate.json").exists() and not Path("out/evaluate/sample.txt").exists()


def test_weights_of_another_network_are_refused(done: Path, refused) -> None:
    smallest = create_space(name="autoformer_nano", relative_position=True).smallest()
    Path("out/discretize/architecture.json").write_text(smallest.to_json())
    assert "out/retrain/model/model.safetensors holds the weights of another network" in refused("evaluate")
    message = refused("discretize", "create_space.embed_dim = (8, 16)")
    assert "out/search/supernet.safetensors holds the weights of another network" in message


FOREIGN = {
    "of another project": ({"conv1.weight": torch.zeros(3, 3)}, {"format": "pt"}),
    "without tensors": ({}, {"format": "pt"}),
    "without metadata": ({}, None),
    "a number": ({"embed_dim": torch.tensor(1.0)}, {"derivation": "argmax"}),
    "other edges": ({"edges": torch.zeros(2)}, {"derivation": "argmax"}),
    "another method": ({}, {"derivation": "guess"}),
}


@pytest.mark.parametrize("tensors, metadata", FOREIGN.values(), ids=FOREIGN)
def test_the_mixture_of_something_else_is_refused(done: Path, refused, tensors, metadata) -> None:
    save_file(tensors, "out/search/mixture.safetensors", metadata)
    message = refused("discretize")
    assert "out/search/mixture.safetensors is not what search writes for 'autoformer_nano': " in message
    assert message.endswith("Run search again, or `dvc repro`\n")


@pytest.mark.parametrize("tensors, metadata", list(FOREIGN.values())[:3], ids=list(FOREIGN)[:3])
@pytest.mark.parametrize(
    "stage, file, bindings",
    [
        ("discretize", "out/search/supernet.safetensors", []),
        ("retrain", "out/search/supernet.safetensors", ["retrain.mode = 'finetune'"]),
        ("retrain", "out/search/supernet.safetensors", ["retrain.teacher = 'largest'"]),
        ("evaluate", "out/retrain/model/model.safetensors", []),
    ],
)
def test_the_weights_of_something_else_are_refused(
    done: Path, refused, stage: str, file: str, bindings: list[str], tensors, metadata
) -> None:
    save_file(tensors, file, metadata)
    assert f"{file} holds the weights of another network than" in refused(stage, *bindings)


@pytest.mark.parametrize("stage", ["discretize", "retrain", "evaluate"])
def test_splits_of_other_data_are_refused(done: Path, refused, stage: str) -> None:
    splits = json.loads(Path("out/search/splits.json").read_text())
    Path("out/search/splits.json").write_text(json.dumps({**splits, "fingerprint": "other"}))
    assert "these splits were made for digits (fingerprint other" in refused(stage)


def test_a_budget_below_the_smallest_architecture_is_refused(done: Path, refused) -> None:
    set_params(done, discretize={"max_params": 1000})
    assert "no architecture of 'autoformer_nano' has at most 1,000 params: the smallest has" in refused("discretize")


def test_a_budget_is_kept(done: Path) -> None:
    largest = json.loads(Path("metrics/discretize.json").read_text())["params"]
    set_params(done, discretize={"max_params": largest - 10_000})
    discretize.main(arguments(done, "discretize"))
    assert json.loads(Path("metrics/discretize.json").read_text())["params"] <= largest - 10_000


# --- how a stage ends, and goes on ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without experiments: making one takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").get_experiment_by_name("none")
    return path


@pytest.fixture
def tracked(project: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch):
    """What the store of `project` knows: (stage, status) of every run."""
    from mlflow import MlflowClient

    shutil.copy(migrated, project)
    monkeypatch.setenv("TANGLENAS_TRACKING", "on")
    client = MlflowClient(tracking_uri=f"sqlite:///{project / 'mlflow.db'}")

    def runs() -> list[tuple[str, str]]:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        known = [(run.data.tags["tanglenas.stage"], run.info.status) for run in client.search_runs(experiments)]
        return [(stage, status) for stage, status in known if stage != "pipeline"]

    return runs


INTERRUPTIBLE = "search.loss = @interruptions.loss"


@pytest.mark.exhaustive
def test_sigterm_saves_the_search_and_the_same_command_finishes_it(
    project: Path, tracked, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*arguments(project, "search"), INTERRUPTIBLE]
    interruptions.calls = 0
    monkeypatch.setenv("INTERRUPT", "14:SIGTERM")
    with pytest.raises(SystemExit) as ending:
        search.main(command)
    said = capsys.readouterr().err
    assert ending.value.code == 130
    assert re.fullmatch(r"search stopped at step \d+ of 20 .* Run the same command again to continue\n", said)
    assert tracked() == [("search", "KILLED")]

    monkeypatch.delenv("INTERRUPT")
    other = [*command, "SEED = 1"]
    search.main(other)
    assert "resuming" not in capsys.readouterr().out
    assert sorted(tracked()) == [("search", "FINISHED"), ("search", "KILLED")]

    search.main(command)
    assert re.search(r"search: resuming at step \d+ of 20", capsys.readouterr().out)
    assert tracked() == [("search", "FINISHED")] * 2
    resumed = contents(project / "out" / "search")

    shutil.rmtree("out")
    monkeypatch.setenv("TANGLENAS_TRACKING", "off")
    search.main(command)
    assert contents(project / "out" / "search") == resumed


@pytest.mark.exhaustive
def test_sigterm_outside_of_training_ends_the_run_as_well(
    project: Path, tracked, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **options: object) -> None:
        os.kill(os.getpid(), 15)

    monkeypatch.setattr(search, "search", stop)
    with pytest.raises(SystemExit) as ending:
        search.main(arguments(project, "search"))
    assert ending.value.code == 130
    assert capsys.readouterr().err == "search stopped. Run the same command again to continue\n"
    assert tracked() == [("search", "KILLED")]


def test_diverged_training_is_a_failed_run_and_one_sentence(project: Path, tracked, refused) -> None:
    message = refused("search", "weights/torch.optim.AdamW.lr = 1e30", "search.clip = None")
    assert "training diverged. Lower the learning rate" in message
    assert tracked() == [("search", "FAILED")]


def test_an_unexpected_exception_keeps_its_traceback_and_fails_the_run(
    project: Path, tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("a plugin's own fault")

    monkeypatch.setattr("tanglenas_gradient.drnas.DrNAS.sample", broken)
    with pytest.raises(ZeroDivisionError, match="a plugin's own fault"):
        search.main(arguments(project, "search"))
    assert tracked() == [("search", "FAILED")]


def test_the_metrics_that_a_stage_rewrites_make_no_other_code(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)

    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name in ("metrics/search.json", "dvc.lock"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    for name in ("metrics/search.json", "dvc.lock"):
        Path(name).write_text("{1}")
    assert lineage("search")["git.dirty"] == "false"
    Path("params.yaml").write_text("")
    assert lineage("search")["git.dirty"] == "true"
