"""Latency: blocks, their sum, the file, and the objective. Times are replaced by what can be counted."""

import json
import math

import pytest
import torch
from tiny import DISTINCT, tiny
from torch import nn

from tanglenas_engine import create_objective, create_space, elasticize
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.cost import Additive
from tanglenas_objectives import latency_measurement as measurement
from tanglenas_objectives.latency_measurement import find_blocks, measure_latency
from tanglenas_objectives.latency_table import Latency, LatencyTable, Machine, Validation


def parameters(module) -> float:
    return float(sum(p.numel() for p in module.parameters()))


@pytest.fixture
def counted(monkeypatch):
    """Every block and network takes as many milliseconds as it has parameters."""
    monkeypatch.setattr(measurement, "_timed", lambda module, calls, device, threads: lambda: parameters(module))


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.part(3)
@pytest.mark.exhaustive
def test_blocks_add_up_to_the_network(name, counted):
    space = tiny(name)
    blocks = find_blocks(space)
    measures, alike = measurement._measurements(space, blocks, 2, torch.device("cpu"), 1)
    tables = Additive(measurement._tables({place: measures[key]() for place, key in alike.items()}))
    generator = torch.Generator().manual_seed(0)
    for architecture in [space.smallest(), space.largest(), *(space.sample(generator) for _ in range(5))]:
        state = dict(space.extract(architecture).named_parameters(remove_duplicate=False))
        inside = [p.numel() for key, p in state.items() if any(key.startswith(f"{block.name}.") for block in blocks)]
        assert tables.cost(space.assignment_of(architecture)) == sum(inside)
        assert sum(inside) > 0.4 * parameters(space.standalone(architecture))


def test_numbers_of_heads_that_share_every_shape_are_measured_each():
    heads = (1, 2, 4)
    options = {"layers": (1,), "embed_dim": (8,), "num_heads": heads, "mlp_ratio": (1,), "block_size": 4}
    space = create_space("gpt", vocab_size=5, heads="partition", **options)
    measures, alike = measurement._measurements(space, find_blocks(space), 1, torch.device("cpu"), 1)
    (block,) = {block for block, _ in alike if block.name == "blocks.0"}
    assert len({key for (one, _), key in alike.items() if one is block}) == len(heads) and len(measures) >= len(heads)


def test_blocks_of_a_forward_that_needs_numbers_are_measured():
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if float(x.mean()) > -100 else x

    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), Looks(16, 16), nn.Linear(16, 3))
    space = elasticize(model, torch.randn(2, 8))
    measures, alike = measurement._measurements(space, find_blocks(space), 2, torch.device("cpu"), 1)
    assert {calls for *_, calls in alike.values()} >= {((((2, size), torch.float32),),) for size in (8, 16, 32)}
    assert all(measure() > 0 for measure in measures.values())


@pytest.mark.exhaustive
def test_no_block_is_inside_another_and_none_has_too_many_combinations():
    space = tiny("autoformer_nano")
    names = [block.name for block in find_blocks(space)]
    assert "blocks.0" in names and "blocks.0.attn" not in names and "" not in names
    for name in DISTINCT:
        blocks = find_blocks(tiny(name))
        assert all(
            torch.tensor([len(r.options) for r in b.rows]).prod() <= measurement.MOST_COMBINATIONS for b in blocks
        )
        assert not [b for b in blocks for other in blocks if b.name.startswith(f"{other.name}.")]


def test_blocks_are_called_with_what_the_architecture_gives_them():
    space = tiny("vit")
    seen = {}
    blocks = find_blocks(space)
    for number, block in enumerate(blocks):
        block.module.register_forward_pre_hook(lambda _, inputs, n=number: seen.update({n: tuple(inputs[0].shape)}))
    inputs = measurement._inputs(space, blocks, 3)
    for _ in range(10):
        architecture = space.sample()
        assignment = space.assignment_of(architecture)
        seen.clear()
        space.select(architecture)(space.example_input(3))
        for number, shape in seen.items():
            assert inputs[number][blocks[number].picks(assignment)] == (((shape, torch.float32),),)


def test_the_line_is_fitted_and_predictions_are_validated_on_other_networks(counted):
    space = tiny("toy_conv_macro")
    table = measure_latency(space, batch_size=2, threads=1, fitted=4, validated=6, repeats=1)
    assert len(table.validation.measured) == 6
    assert table.validation.relative_error < 1e-6 and table.validation.spearman > 0.99
    objective = bound(table, space)
    architecture = space.sample()
    assert objective.cost(architecture) == pytest.approx(space.cost(architecture).params)
    assert float(objective.expected(space.one_hot(architecture))) == pytest.approx(space.cost(architecture).params)


def bound(table, space) -> Latency:
    objective = Latency.__new__(Latency)
    objective.table = table
    return objective.bind(space)


@pytest.mark.exhaustive
def test_real_times_tell_a_large_network_from_a_small_one():
    wide = {"channels1": (2, 32), "channels2": (2, 32), "channels3": (2, 32), "channels4": (4, 64)}
    space = tiny("toy_conv_macro", image_size=32, **wide)
    table = measure_latency(space, batch_size=8, threads=1, fitted=2, validated=2, repeats=1)
    objective = bound(table, space)
    assert 0 < objective.cost(space.smallest()) < objective.cost(space.largest())
    assert all(time > 0 for time in table.validation.measured)


def test_a_file_is_read_as_it_was_written_and_is_an_objective(counted, tmp_path):
    space = tiny("gpt_nano")
    table = measure_latency(space, batch_size=2, threads=1, fitted=2, validated=3, repeats=1)
    table.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == table
    objective = create_objective("latency", table=str(tmp_path / "latency.json"))
    target = Target(objective, share=0.8).bind(space)
    uniform = space.mixture({n: torch.full((r, n), 1 / n, requires_grad=True) for n, r in space.stacks.items()})
    gradients = torch.autograd.grad(target.charge(uniform) + objective.expected(uniform), list(uniform.stacks.values()))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def changed(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))
    return path


@pytest.fixture
def written(counted, tmp_path):
    path = tmp_path / "latency.json"
    measure_latency(tiny("toy_conv_macro"), threads=1, fitted=0, validated=0, repeats=1).save(path)
    return path


@pytest.mark.parametrize(
    "space, options, message",
    [
        ("vit", {}, "was measured for the space 'toy_conv_macro', but here it is"),
        ("toy_conv_macro", {"image_size": 32}, "was measured for the input shape"),
        ("toy_conv_macro", {"num_classes": 100}, "was measured for the largest network .* such as -o num_classes=10"),
        ("toy_conv_macro", {"channels": [[4, 8]] * 4}, "was measured for the choices"),
    ],
)
def test_a_table_of_another_space_is_refused(written, space, options, message):
    if "channels" in options:
        with pytest.raises(TangleNASError, match=message):
            LatencyTable.load(changed(written, choices={"channels": [1, 2]})).terms(tiny(space))
        return
    with pytest.raises(TangleNASError, match=message):
        LatencyTable.load(written).terms(tiny(space, **options))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"format": 1}, "is a latency table of format 1, but this version reads 2"),
        ({"tables": {"": [float("nan")]}}, r"is no latency table \(NaN is no number in JSON\)"),
        ({"tables": {"": [-1.0]}}, "damaged latency table"),
        ({"tables": [1]}, "damaged latency table"),
        ({"machine": {}}, "damaged latency table"),
        ({"more": 1}, "damaged latency table"),
    ],
)
def test_a_damaged_table_is_refused(written, values, message):
    with pytest.raises(TangleNASError, match=message):
        LatencyTable.load(changed(written, **values))


def test_rows_that_do_not_fit_are_refused(written):
    table = LatencyTable.load(changed(written, tables={"channels[9]": [1.0]}))
    with pytest.raises(TangleNASError, match=r"has the row 'channels\[9\]'"):
        table.terms(tiny("toy_conv_macro"))
    space = tiny("toy_conv_macro")
    name = repr(space.rows[0])
    with pytest.raises(TangleNASError, match="it is damaged"):
        LatencyTable.load(changed(written, tables={name: [1.0]})).terms(space)


@pytest.mark.parametrize("text", ["", "[]", "{}", "not JSON", "[" * 100_000])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(
        TangleNASError, match=r"is no latency table( .*)?: expected the JSON that `tanglenas latency build`"
    ):
        LatencyTable.load(path)
    with pytest.raises(TangleNASError, match=r"No such file or directory\. Make one with `tanglenas latency build`"):
        LatencyTable.load(tmp_path / "none.json")


@pytest.mark.parametrize("option, value", [("batch_size", 0), ("repeats", 0), ("fitted", -1), ("threads", 0)])
def test_options_that_cannot_be(option, value):
    with pytest.raises(TangleNASError, match=f"{option} is {value}, expected a whole number"):
        measure_latency(tiny("toy_conv_macro"), **{option: value})


def test_errors_are_means_and_ranks_are_ranks():
    validation = Validation([1.0, 2.0, 3.0], [2.0, 2.0, 4.0])
    assert validation.relative_error == pytest.approx((0.5 + 0 + 0.25) / 3)
    assert validation.spearman == pytest.approx(0.866, abs=1e-3)
    assert math.isnan(Validation([2.0, 2.0], [1.0, 3.0]).spearman)
    assert Machine.here(torch.device("cpu"), 2).threads == 2
