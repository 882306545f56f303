"""Budgets, objectives and tables through the stages: what they refuse, report and depend on."""

import json
import re
import shutil
import sys
from pathlib import Path

import gin
import pytest
import safetensors.torch
from paths import ROOT
from project import SMALL, set_params
from stages import arguments, forget_settings

from pipelines import discretize, search
from tanglenas_engine import Architecture, create_space
from tanglenas_engine.pipeline.config import configurables
from tanglenas_engine.pipeline.config.configurables import create
from tanglenas_engine.pipeline.config.params import stage_arguments
from tanglenas_engine.pipeline.config.reader import configured
from tanglenas_engine.pipeline.files import ARCHITECTURE, MIXTURE
from tanglenas_engine.pipeline.stage import _contents as stage_contents
from tanglenas_engine.pipeline.stage import open_stage
from tanglenas_engine.plugins import manager
from tanglenas_engine.runtime.weights import save_weights, weights_metadata
from tanglenas_objectives.latency_table import LatencyTable, Machine, cost_of_largest, options_of

JOULES = """
from tanglenas_datasets.digits import Digits

from tanglenas_engine import Objective, SearchSpace, hookimpl

ANSWERS = {"fine": 1.0, "nan": float("nan"), "negative": -1.0}


class Joules(Objective):
    "A thousandth of the parameters, as a cost without tables."

    unit = "J"

    def __init__(self, mode: str = "fine"):
        self.mode = mode

    def terms(self, space):
        if self.mode == "unbound":
            raise RuntimeError("the meter is off")

    def measure(self, architecture):
        return ANSWERS[self.mode] * self.space.cost(architecture).params / 1000

    def expectation(self, mixture):
        return ANSWERS[self.mode] * self.space.expected_cost(mixture).params / 1000


class Numbers(Digits):
    pass


class Fallen(SearchSpace):
    def __init__(self, num_classes: int = 10, image_size: int = 8, in_channels: int = 1, **options):
        super().__init__(**options)
        {}["fallen"]


@hookimpl
def tanglenas_register_spaces(register):
    register("fallen", "joules:Fallen", summary="fails in its constructor")


@hookimpl
def tanglenas_register_objectives(register):
    register("joules", "joules:Joules", summary="energy")


@hookimpl
def tanglenas_register_datasets(register):
    register("numbers", "joules:Numbers", summary="digits")
"""
LOSSES = """
from torch.nn.functional import cross_entropy

calls = 0


def loss(outputs, targets):
    global calls
    calls += 1
    return cross_entropy(outputs, targets) * (float("nan") if calls == 9 else 1)
"""


@pytest.fixture(scope="module", autouse=True)
def joules(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a plugin and a module of losses, both importable."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "joules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: joules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tanglenas]\njoules = joules\n")
    (folder / "joules.py").write_text(JOULES)
    (folder / "losses.py").write_text(LOSSES)
    with pytest.MonkeyPatch.context() as patch:
        forget_settings(patch)
        patch.syspath_prepend(folder)
        manager.cache_clear()
        yield folder
    for module in ("joules", "losses"):
        sys.modules.pop(module, None)
    manager.cache_clear()
    gin.clear_config()


@pytest.fixture
def project(done: Path) -> Path:
    """A project in which all stages ran, with a latency table and a search of one epoch; the current folder."""
    write_table(done / "table.json")
    set_params(done, search={"epochs": 1, "warmup_epochs": 0})
    return done


def write_table(path: Path, **changes: object) -> None:
    """A latency table of the space: a millisecond for every eight of its embedding's dimensions."""
    space = create_space("autoformer_nano", num_classes=10, image_size=8, in_channels=1, relative_position=True)
    (row,) = (row for row in space.rows if row.choice == "embed_dim")
    table = LatencyTable(
        space="autoformer_nano",
        choices=options_of(space),
        input_shape=(1, 8, 8),
        largest=cost_of_largest(space),
        batch_size=4,
        machine=Machine("abacus", 2, "2.0"),
        tables={"embed_dim": [option / 8 for option in row.options]},
    )
    table.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def later(*lines: str) -> None:
    """What gin/stages/discretize.gin has in addition."""
    with Path("gin/stages/discretize.gin").open("a") as file:
        file.write("\n".join(("", *lines, "")))


# The budget of a later stage


IMPOSSIBLE = {
    "a table": (
        '{"latency": 3.5}',
        "has at most 3.5 ms latency: the smallest has 4 ms. Raise the limit of latency",
    ),
    "no table": (
        '{"joules": 20}',
        "was found that has at most 20 J joules: the smallest has 22.058 J. Raise the limit of joules",
    ),
    "a count": ('{"params": 1000}', "has at most 1,000 params: the smallest has 22,058. Raise the limit of params"),
    "two": ('{"latency": 4, "params": 22058, "macs": 354879}', "has at most 354,879 MACs: the smallest has 354,880"),
    "negative": ('{"latency": -1}', "limits['latency'] is -1, expected a positive number"),
    "zero": ('{"latency": 0}', "limits['latency'] is 0, expected a positive number"),
    "words": ('{"latency": "fast"}', "limits['latency'] is 'fast', expected a positive number"),
    "unknown": ('{"latancy": 1}', "unknown objective 'latancy'. Did you mean 'latency'?"),
    "no names": ("5", "discretize.limits is 5, expected numbers by name, such as {'latency': 2.5}"),
}


@pytest.mark.parametrize("limits, message", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_limit_that_nothing_meets_is_refused_before_the_search(project, refused, limits, message):
    table = "create_objective.table = 'table.json'" if "latency" in limits else ""
    later(f"discretize.limits = {limits}", table)
    assert message in refused("search")
    assert not Path("out/search/supernet.safetensors").exists()


@pytest.mark.parametrize("key, most", [("max_params", 1000), ("max_macs", 10), ("max_params", 0), ("max_macs", -5)])
def test_so_is_a_budget_of_params_yaml(project, refused, key, most):
    set_params(project, discretize={key: most})
    expected = (
        f"at most {most:,} {key[4:].replace('macs', 'MACs')}"
        if most > 0
        else f"{key} is {most}, expected a whole number of at least 1"
    )
    assert expected in refused("search")


def test_a_target_in_an_objective_of_a_plugin_is_a_limit_of_discretize(project, refused, capsys):
    content = safetensors.torch.load_file(MIXTURE)
    save_weights(MIXTURE, content, {**weights_metadata(MIXTURE), "targets": '{"latency": 4.5}'})
    assert "needs the option 'table'" in refused("discretize")
    discretize.main([*arguments(project, "discretize"), "create_objective.table = 'table.json'"])
    assert "discretize: at most 4.5 ms latency, the target of the search" in capsys.readouterr().out
    found = Architecture.from_json(ARCHITECTURE.read_text())
    assert found.choices["embed_dim"] / 8 <= 4.5
    told = json.loads(Path("metrics/discretize.json").read_text())
    assert told["latency"] == pytest.approx(found.choices["embed_dim"] / 8)
    assert (told["limit_latency"], told["unit_latency"]) == (4.5, "ms")


def test_an_objective_of_a_target_that_discretize_cannot_make_is_refused_before_the_search(project, refused):
    target = ("target.objective = 'latency'", "target.share = 0.8", "create_objective.table = 'table.json'")
    assert "after the search, discretize would fail: objective 'latency'" in refused("search", *target)


LATER = [
    ({"retrain": {"mode": "finetun"}}, "", "retrain.mode is 'finetun', expected 'scratch'"),
    ({"retrain": {"batch_size": 10**5}}, "", "batch size 100000 is larger than"),
    ({}, "retrain.epoch = 3", "configuration: retrain has no parameter 'epoch'. Did you mean 'epochs'?"),
    ({}, "retrain.optimizer = @torch.optim.SGD\nSGD.lr = -1.0", "retrain.optimizer"),
    ({}, "evaluate.batch = 3", "configuration: evaluate has no parameter 'batch'"),
    ({"retrain": {"mode": "inherit", "epochs": 0}}, "", "retrain.epochs is 0"),
    ({}, "retrain.epochs = 1\ncreate_dataset.cutuot = 16", "dataset 'digits' of tanglenas"),
    (
        {"retrain": {"mode": "finetune"}},
        "retrain.epochs = 1\ncreate_space.patch_size = 4",
        "the space is of another size than in the search, and retrain.mode 'finetune' takes",
    ),
    ({"discretize": {"candidates": 0}}, "", "discretize.candidates is 0"),
    ({"discretize": {"method": "race"}}, "discretize.fill = 0.9\nrace.propose = 2.0", "race.propose is 2.0"),
    ({"discretize": {"method": "rase"}}, "", "unknown discretize.method 'rase'. Did you mean 'race'?"),
    ({"retrain": {"mode": "inherit"}, "discretize": {"method": "race"}}, "", "retrain.mode is 'inherit'"),
]


@pytest.mark.parametrize("params, line, message", LATER)
def test_what_a_later_stage_would_refuse_is_refused_before_the_search(project, refused, params, line, message):
    set_params(project, **params)
    stage = line.partition(".")[0] or [*params][-1]
    with open(f"gin/stages/{stage}.gin", "a") as file:
        file.write(f"\n{line}\n")
    weights = Path("out/search/supernet.safetensors")
    weights.unlink(missing_ok=True)
    assert f"after the search, {stage} would fail: {message}" in refused("search")
    assert not weights.exists()


def test_a_later_stage_that_finds_its_modules_by_itself_is_not_refused(project, refused):
    with open("gin/stages/retrain.gin", "a") as file:
        file.write("\nretrain.loss = @losses_of_src.loss\n")
    assert "after the search, retrain would fail" in refused("search")
    pipeline = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(
        pipeline.replace("python -m pipelines.retrain", "PYTHONPATH=src python -m pipelines.retrain")
    )
    set_params(project, discretize={"max_params": 10})  # refused, too, and first
    assert "discretize would fail" in refused("search")
    set_params(project, discretize={"max_params": None}, search={"epochs": 0})
    assert "search.epochs is 0" in refused("search")


def test_a_recipe_without_its_file_is_refused_before_the_search(project, refused):
    Path("gin/demo/retrain.gin").unlink()
    assert "retrain would fail: gin/demo/retrain.gin is missing" in refused("search")


def test_what_later_stages_do_by_themselves_is_not_refused(project, refused):
    """Other sizes of the data, and a method of the project's own."""
    for stage in ("retrain", "evaluate"):
        with open(f"gin/stages/{stage}.gin", "a") as file:
            file.write("\ncreate_dataset.image_size = 16\ncreate_space.image_size = 16\n")
    set_params(project, discretize={"method": "mine"}, search={"epochs": 0})
    assert "unknown discretize.method 'mine'" in refused("search")
    Path("pipelines").mkdir()
    Path("pipelines/discretize.py").write_text('methods = {**methods, "mine": random}\n')
    assert "search.epochs is 0" in refused("search")


def test_a_limit_is_given_once(project, refused):
    set_params(project, discretize={"max_params": 50_000})
    message = refused("discretize", 'discretize.limits = {"params": 40_000}')
    assert "discretize.limits['params'] is 40000, and discretize.max_params is 50000: leave one out" in message


@pytest.mark.exhaustive
def test_a_search_that_passes_keeps_its_own_config_and_results(project):
    before = {path.name: path.read_bytes() for path in Path("out/search").iterdir()}
    set_params(project, search=SMALL["search"])  # those of the search that wrote them
    later('discretize.limits = {"latency": 6}', "create_objective.table = 'table.json'")
    search.main(arguments(project, "search"))
    assert {path.name: path.read_bytes() for path in Path("out/search").iterdir()} == before
    assert b"drnas" in before["operative.gin"] and b"discretize" not in before["operative.gin"]


@pytest.mark.parametrize("change", [{"space": "autoformer_t"}, {"dataset": "fashion_mnist"}])
@pytest.mark.part(2)
@pytest.mark.exhaustive
def test_a_budget_for_another_space_or_dataset_is_no_matter(project, change):
    command = arguments(project, "search")
    set_params(project, discretize={"max_params": 1000}, **change)
    search.main(command)
    assert Path("out/search/supernet.safetensors").exists()


def test_a_pipeline_that_someone_wrote_anew_has_no_arguments_to_look_at(project):
    assert 'SPACE = "autoformer_nano"' in arguments(project, "discretize")
    for text in (
        "stages: {}",
        "stages: {discretize: {cmd: './mine.sh ${space}'}}",
        "stages: {discretize: {cmd: 'python -m pipelines.discretize ${nothing}'}}",
        "stages: {",
        "stages: {discretize: {cmd: [a, b]}}",
    ):
        Path("dvc.yaml").write_text(text)
        assert stage_arguments("discretize") is None
    shutil.copy(ROOT / "dvc.yaml", project)
    Path("gin/stages/discretize.gin").unlink()
    assert stage_arguments("discretize") is None and stage_arguments("search") is not None
    Path("dvc.yaml").unlink()
    assert stage_arguments("discretize") is None


# Tables


TABLES = {
    "another space": ({"space": "gpt_nano"}, "was measured for the space 'gpt_nano', but here it is 'autoformer_nano'"),
    "other inputs": ({"input_shape": [3, 32, 32]}, "was measured for the input shape (3, 32, 32), but here it is (1"),
    "other options": (
        {"choices": {"embed_dim": [8]}},
        "was measured for the choices {'embed_dim': [8]}, but here it is",
    ),
    "another version": ({"format": 1}, "table.json is a latency table of format 1, but this version reads 2: build it"),
    "damage": ({"tables": {"": [-1]}}, "table.json is a damaged latency table: a time that is no finite number"),
}


@pytest.mark.parametrize("changes, message", TABLES.values(), ids=TABLES)
def test_a_table_of_something_else_is_refused_before_the_search_and_by_discretize(project, refused, changes, message):
    write_table(project / "table.json", **changes)
    bindings = ('discretize.limits = {"latency": 6}', "create_objective.table = 'table.json'")
    assert message in refused("discretize", *bindings)
    later(bindings[1])
    target = ("target.objective = 'latency'", "target.share = 0.8", bindings[1])
    assert message in refused("search", *target)
    later(bindings[0])
    assert message in refused("search")


def test_a_table_that_is_not_given_or_not_there(project, refused):
    limits = 'discretize.limits = {"latency": 6}'
    assert "needs the option 'table': pass create_objective('latency', table=...), or bind create_objective.table" in (
        refused("discretize", limits)
    )
    missing = refused("discretize", limits, "create_objective.table = 'none.json'")
    assert "latency table none.json: No such file or directory. Make one with `tanglenas latency build`" in missing


@pytest.mark.exhaustive
def test_the_machine_that_a_table_is_from_is_told(project, capsys):
    table = "create_objective.table = 'table.json'"
    discretize.main([*arguments(project, "discretize"), 'discretize.limits = {"latency": 6}', table])
    assert "discretize: latency in ms, of batches of 4 on abacus, 2 threads, torch 2.0\n" in capsys.readouterr().out
    later(table)
    search.main([*arguments(project, "search"), "target.objective = 'latency'", "target.share = 0.8", table])
    assert "search: latency in ms, of batches of 4 on abacus, 2 threads, torch 2.0\n" in capsys.readouterr().out


# What is found


@pytest.mark.parametrize(
    "bindings, exact",
    [
        (("discretize.max_params = 40_000",), True),
        (('discretize.limits = {"latency": 6}', "create_objective.table = 'table.json'"), True),
        (('discretize.limits = {"joules": 40}',), False),
        (("discretize.method = 'random'",), None),
    ],
)
@pytest.mark.exhaustive
def test_discretize_tells_whether_the_architecture_is_known_to_be_the_most_probable(project, capsys, bindings, exact):
    discretize.main([*arguments(project, "discretize"), "discretize.method = 'argmax'", *bindings])
    metrics = json.loads(Path("metrics/discretize.json").read_text())
    assert metrics.get("exact") is exact and isinstance(metrics["most_probable"], bool)
    assert metrics["params"] <= (40_000 if "40" in bindings[0] else 10**6)
    said = "discretize: a local search found the architecture within the budget" in capsys.readouterr().out
    assert said == (exact is False)


# Objectives that fail


FAILURES = {
    "unbound": "the objective 'joules' failed on 'autoformer_nano': RuntimeError: the meter is off",
    "raising": "'joules' failed on the architecture embed_dim=48 depth=2 num_heads=2,2 mlp_ratio=2,2: KeyError: 'rais",
    "nan": "ValueError: its cost is nan, expected a finite number of at least 0",
    "negative": "ValueError: its cost is -37.21, expected a finite number of at least 0",
}


@pytest.mark.parametrize("mode, message", FAILURES.items(), ids=FAILURES)
def test_an_objective_that_fails_is_one_sentence_with_its_name(project, refused, mode, message):
    bindings = ('discretize.limits = {"joules": 40}', f'create_objective.mode = "{mode}"')
    assert message in refused("discretize", *bindings)
    assert message in refused("search", "target.objective = 'joules'", "target.share = 0.8", bindings[1])
    later(*bindings)
    assert message in refused("search")


def test_options_of_an_objective_are_checked(project, refused):
    limits = 'discretize.limits = {"joules": 40}'
    assert "takes no option 'mood'. Did you mean 'mode'?" in refused("discretize", limits, "create_objective.mood = 1")
    assert "create_objective.mode is 1, expected a quoted string" in refused(
        "discretize", limits, "create_objective.mode = 1"
    )


def test_options_reach_the_objectives_that_take_them(project, refused):
    options = ("create_objective.table = 'table.json'", "create_objective.mode = 'fine'")
    with configured([*arguments(project, "search"), *options]):
        targets = [configurables.target(name, share=0.8) for name in ("params", "latency", "joules")]
        assert [type(target.objective).__name__ for target in targets] == ["Params", "Latency", "Joules"]
    assert "takes no option 'mood'" in refused("search", "create_objective.mood = 1")


def test_an_error_in_the_constructor_of_a_space_is_told_with_its_place(project, refused, joules):
    message = refused("search", 'SPACE = "fallen"')
    place = rf"KeyError: 'fallen' \({re.escape(str(joules))}/joules.py:\d+, in __init__\)"
    assert re.search(rf"'fallen' cannot be made with num_classes=10, .*: {place}\. Correct what gin binds", message)


# Losses


@pytest.mark.exhaustive
def test_a_loss_that_is_no_number_is_told_with_its_step_and_the_state_before_it_is_kept(project, refused, capsys):
    sys.modules.pop("losses", None)
    bindings = ("search.loss = @losses.loss", "search.checkpoint_every = 3")
    message = refused("search", *bindings)
    assert re.match(r"search: architecture_loss is not finite by step 5 of \d+: training diverged\. Lower the", message)
    assert not Path("out/search/supernet.safetensors").exists()
    search.main([*arguments(project, "search"), *bindings])  # the module counts on: the loss is a number again
    assert "search: resuming at step 3 of" in capsys.readouterr().out
    assert Path("out/search/supernet.safetensors").exists()


# What a run depends on


def identity(*bindings: str) -> str:
    """What the search's checkpoints go by."""
    with open_stage("search", [*arguments(Path.cwd(), "search"), *bindings]) as run:
        return run.pipeline_id


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    "bindings, module",
    [
        (("target.objective = 'joules'",), "joules"),
        (("search.targets = [@mine/target()]", "mine/target.objective = 'joules'"), "joules"),
        (('discretize.limits = {"joules": 40}',), "joules"),
        (("discretize.cost = 'joules'",), "joules"),
        (('DATASET = "numbers"',), "joules"),
        (("search.loss = @losses.loss",), "losses"),
    ],
)
@pytest.mark.part(3)
def test_the_code_that_a_config_names_is_in_the_fingerprint_of_a_run(project, joules, bindings, module):
    plain, before = identity(), identity(*bindings)
    assert identity(*bindings) == before
    edit(joules / f"{module}.py")
    assert identity(*bindings) != before
    assert identity() == plain


@pytest.mark.parametrize("parameter", ["create_objective.table", "benchmark.path"])
def test_the_tables_that_a_config_names_are_in_the_fingerprint_of_a_run(project, parameter):
    binding = f"{parameter} = 'table.json'"
    plain, before = identity(), identity(binding)
    edit(project / "table.json")
    assert identity(binding) != before
    assert identity() == plain


def test_a_run_has_the_fingerprints_of_its_data_and_of_the_files_that_it_read_as_parameters(project):
    def found(*bindings: str) -> dict[str, str]:
        with configured([*arguments(project, "search"), *(bindings or ["benchmark.path = 'table.json'"])]):
            _, _, dataset = create()
            assert stage_contents(dataset, "")["dataset.fingerprint"] == dataset.fingerprint[:12]
            return stage_contents(dataset, "")

    before = found()
    assert found() == found("POOL = 'table.json'", "benchmark.path = %POOL") == before
    edit(project / "table.json")
    assert found()["benchmark.fingerprint"] != before["benchmark.fingerprint"]
    scoped = ["search.targets = [@one/target()]", "one/create_objective.table = 'table.json'"]
    latency = found(*scoped)
    edit(project / "table.json")
    assert found(*scoped) != latency
    assert set(latency) == {"dataset.fingerprint", "create_objective.fingerprint"}
    with configured(arguments(project, "search")):
        dataset = create()[2]
        assert set(stage_contents(dataset, "")) == {"dataset.fingerprint"}
        assert stage_contents(dataset, "0123456789abcdef")["weights.fingerprint"] == "0123456789ab"
