"""Objectives: what they say of a space, and searches that are drawn to a target."""

from functools import partial

import pytest
import torch
from spaces import Convolutional, random_mixture, vit
from tiny import DISTINCT, tiny

from tanglenas_engine import Objective, create_objective, create_optimizer
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.optimizers.optimizer import Optimizer
from tanglenas_engine.plugins import manager
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.spaces.cost import METRICS, Additive
from tanglenas_engine.stages.search import search
from tanglenas_engine.testing import check_resume, random_data

SPLITS = ("weights", "architecture", "validation")
STRATEGIES = ("alternating", "simultaneous")
LEARNING = [name for name in manager().names("optimizer") if create_optimizer(name).learns_architecture]
SAMPLED = [name for name in manager().names("optimizer") if name not in LEARNING]


class Energy(Objective):
    """What a joule per option would be."""

    name, unit = "energy", "J"

    def terms(self, space):
        return Additive(
            {(row,): [0.5 * (len(row.options) - i) for i in range(len(row.options))] for row in space.rows[:1]}
        )


class Broken(Energy):
    """One whose answers a test breaks."""

    def __init__(self, measured=None, expected=None):
        self.measured, self.expectations = measured, expected

    def measure(self, architecture):
        return self.measured() if self.measured else super().measure(architecture)

    def expectation(self, mixture):
        return self.expectations(super().expectation(mixture)) if self.expectations else super().expectation(mixture)


def searched(optimizer="darts", space=None, samples=8, **options):
    """The result of a search, of four steps by default, and its optimizer."""
    torch.manual_seed(0)
    space = space or vit()
    optimizer = create_optimizer(optimizer) if isinstance(optimizer, str) else optimizer
    defaults = {"epochs": 2, "batch_size": 4, "architecture_optimizer": partial(torch.optim.Adam, lr=0.05)}
    return search(space, optimizer, random_data(space, SPLITS, samples), **{**defaults, **options}), optimizer


# What they say


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.part(2)
def test_counts_are_the_costs_of_the_space(name, metric):
    space = tiny(name)
    objective = create_objective(metric).bind(space)
    architecture = space.sample()
    assert objective.name == metric and objective.unit
    assert objective.cost(architecture) == getattr(space.cost(architecture), metric)
    weights = random_mixture(space)[1]
    expected = objective.expected(space.mixture(weights))
    assert expected.equal(getattr(space.expected_cost(weights), metric)) and expected.requires_grad


def test_a_table_is_an_objective():
    space = vit()
    objective = Energy().bind(space)
    row = space.rows[0]
    for i, option in enumerate(row.options):
        chosen = {**space.largest().choices, row.choice: option}
        assert objective.cost(space.architecture(**chosen)) == 0.5 * (2 - i)
    weights = random_mixture(space)[1]
    one, half = weights[row.choice].tolist()
    assert float(objective.expected(space.mixture(weights)).detach()) == pytest.approx(one + half / 2)


# Drawing a search


@pytest.mark.parametrize("penalty, share", [("hinge", 0.35), ("log", 0.6), ("log", 0.8), ("multiplier", 0.35)])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.part(6)
@pytest.mark.exhaustive
def test_a_search_lands_on_its_target(strategy, penalty, share):
    space = vit()
    weight = 0.1 if penalty == "multiplier" else 1.0
    target = Target(create_objective("macs"), share=share, penalty=penalty, weight=weight)
    rate = partial(torch.optim.Adam, lr=0.02, betas=(0.5, 0.999))
    result, _ = searched(
        "darts", space, 40, epochs=25, targets=[target], strategy=strategy, architecture_optimizer=rate
    )
    wanted = share * space.cost(space.largest()).flops
    assert target.limit == pytest.approx(wanted)
    uniform = space.mixture({count: torch.full((rows, count), 1 / count) for count, rows in space.stacks.items()})
    before, after = (float(space.expected_cost(m).flops) / wanted for m in (uniform, result.mixture))
    assert abs(before - 1) > 0.1
    # One penalty holds it there, the others let it go on to cheaper ones: a multiplier is 0 then.
    assert after > (0.97 if penalty == "log" else 0.5) and after < 1.03
    if penalty != "log":
        assert before > 1 and (after > 0.97 or penalty == "hinge" or float(target.multiplier) == 0)
    assert result.history[-1]["expected_macs"] == float(space.expected_cost(result.mixture).flops)


def test_a_multiplier_grows_above_the_target_and_falls_below_it_down_to_0():
    space = vit()
    limit = space.cost(space.largest()).macs / 2
    target = Target(create_objective("macs"), value=limit, penalty="multiplier", weight=0.5, rate=0.25).bind(space)
    large, small = (space.one_hot(one) for one in (space.largest(), space.smallest()))
    assert float(target.charge(large)) == 0.5 and float(target.multiplier) == 0.75
    assert float(target.charge(large)) == 0.75 and float(target.multiplier) == 1.0
    below = space.cost(space.smallest()).macs / limit - 1
    assert float(target.charge(small)) == pytest.approx(below)
    assert float(target.multiplier) == pytest.approx(1 + 0.25 * below)
    for _ in range(20):
        target.charge(small)
    assert float(target.multiplier) == 0
    assert float(target.bind(space).multiplier) == 0.5  # another search starts anew


@pytest.mark.exhaustive
def test_a_search_with_a_multiplier_resumes_exactly():
    target = Target(create_objective("macs"), share=0.35, penalty="multiplier")
    check_resume(partial(create_optimizer, "darts"), vit, targets=[target], warmup_epochs=0)


@pytest.mark.parametrize(
    "optimizer, strategy",
    [(name, s) for name in LEARNING for s in STRATEGIES if s == "alternating" or create_optimizer(name).simultaneous],
)
@pytest.mark.part(2)
def test_a_target_adds_the_gradient_of_its_penalty_for_every_optimizer(optimizer, strategy):
    """With plain gradient steps, two searches of one step differ by just that gradient."""
    ends = {}
    for weight in (None, 2.0, 6.0):
        target = [Target(create_objective("params"), share=0.3, weight=weight)] if weight else []
        _, searcher = searched(
            optimizer, epochs=1, batch_size=8, strategy=strategy, targets=target, band=None,
            architecture_optimizer=partial(torch.optim.SGD, lr=0.5),
        )  # fmt: skip
        ends[weight] = {count: alpha.detach().clone() for count, alpha in searcher.alphas.items()}
    space = vit()
    start = create_optimizer(optimizer)
    start.bind(space, 0)
    start.set_progress(0.0)
    limit = 0.3 * space.cost(space.largest()).params
    charge = (space.expected_cost(start.expected()).params / limit - 1).clamp_min(0)
    assert charge > 0
    gradients = torch.autograd.grad(charge, list(start.alphas.values()))
    for (count, plain), gradient in zip(ends[None].items(), gradients, strict=True):
        assert gradient.any()
        for weight in (2.0, 6.0):
            moved = plain - ends[weight][count]
            assert moved.allclose(0.5 * weight * gradient, atol=1e-5), (optimizer, weight)


def test_two_targets_add_up_and_one_without_a_target_only_reports():
    both, _ = searched(targets=[Target(create_objective("macs"), share=0.3), Target(Energy(), value=0.6)])
    row = both.history[-1]
    assert row["penalty_macs"] > 0 and row["penalty_energy"] > 0
    assert 0.5 < row["expected_energy"] < 1 and row["energy"] in (0.5, 1.0)
    reported, _ = searched(targets=[Target(Energy())])
    plain, _ = searched()
    row = reported.history[-1]
    assert row.pop("energy") in (0.5, 1.0) and 0.5 < row.pop("expected_energy") < 1
    assert row == plain.history[-1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_penalty_waits_for_the_end_of_the_warm_up(strategy):
    result, _ = searched(targets=[Target(create_objective("macs"), share=0.3)], strategy=strategy, warmup_epochs=1)
    assert ["penalty_macs" in row for row in result.history] == [False, True]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.exhaustive
def test_a_search_with_a_target_that_is_killed_ends_like_one_that_is_not(strategy):
    targets = [Target(create_objective("macs"), share=0.3), Target(Energy(), value=0.6, penalty="log")]
    check_resume(partial(create_optimizer, "drnas"), vit, (1, 3), strategy=strategy, targets=targets)


# Refusals


@pytest.mark.parametrize("optimizer", SAMPLED)
def test_sampled_supernets_refuse_a_target_without_a_band(optimizer):
    with pytest.raises(TangleNASError) as caught:
        searched(optimizer, targets=[Target(create_objective("macs"), share=0.5)], band=None)
    assert f"{optimizer} has no architecture parameters that a target for macs could draw" in str(caught.value)
    assert "leave the target out, or give the band a range" in str(caught.value)
    assert searched(optimizer, targets=[Target(create_objective("macs"))])[0].history


def test_targets_that_nothing_meets_are_refused_before_training():
    space = vit()
    space.name = "thumbnail"
    least, most = (space.cost(extreme).flops for extreme in (space.smallest(), space.largest()))
    low, high = Target(create_objective("macs"), value=least - 1), Target(create_objective("macs"), value=most + 1)
    with pytest.raises(TangleNASError) as caught:
        searched(space=space, targets=[low], loss=None)
    assert (
        f"the target for macs is {least - 1:,} multiply-accumulates, but no architecture of 'thumbnail' has less than "
        f"{least:,}: raise the target" in str(caught.value)
    )
    with pytest.raises(TangleNASError, match=f"but no .* of 'thumbnail' has more than {most:,}: lower the ta"):
        searched(space=space, targets=[high], loss=None)
    for value in (least, most):
        assert Target(create_objective("macs"), value=value).bind(space).limit == value
    with pytest.raises(TangleNASError, match=r"the target for energy is 0\.4 J, but no .* less than 0\.5"):
        Target(Energy(), share=0.4).bind(space)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"value": 5, "share": 0.5}, "given twice, as the value 5 and as the share 0.5 of the largest: leave one out"),
        ({"value": 0}, "the target for energy is 0, expected a positive number"),
        ({"value": -3}, "the target for energy is -3, expected a positive number"),
        ({"value": float("nan")}, "the target for energy is nan, expected a positive number"),
        ({"share": 0}, "the target's share for energy is 0, expected a positive number"),
        ({"share": 60}, "the target's share for energy is 60, expected a share of the largest network's, above 0"),
        ({"weight": 0}, "the weight of the target for energy is 0, expected a positive number"),
        ({"penalty": "hinges"}, "unknown penalty of the target for energy 'hinges'. Did you mean 'hinge'?"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(TangleNASError) as caught:
        Target(Energy(), **options)
    assert message in str(caught.value)


def test_one_target_for_each_objective():
    with pytest.raises(TangleNASError, match=r"search\.targets has two for 'energy': give one for each objective"):
        searched(targets=[Target(Energy(), value=0.6), Target(Energy(), value=0.7)])


def fails():
    raise KeyError("no entry")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"measured": fails}, "'energy' failed on the architecture embed_dim=8 .*: KeyError: 'no entry'"),
        ({"measured": lambda: float("nan")}, "'energy' failed on .*: its cost is nan, expected a finite number"),
        ({"measured": lambda: -1.0}, "its cost is -1.0, expected a finite number of at least 0"),
        ({"measured": lambda: "much"}, "the objective 'energy' failed .*: ValueError: could not convert string"),
        ({"expected": lambda value: fails()}, "the objective 'energy' failed on a mixture: KeyError: 'no entry'"),
        ({"expected": lambda value: 3.0}, "failed on a mixture: .*its expectation is 3.0, expected a tensor with one"),
        ({"expected": lambda value: value * float("inf")}, "'energy' cannot draw a search: its expect.* inf"),
        ({"expected": lambda value: value.detach()}, "under the uniform mixture is 0.75, without a gradient"),
    ],
)  # fmt: skip
def test_objectives_that_fail_are_named(options, message):
    with pytest.raises(TangleNASError, match=message):
        searched(targets=[Target(Broken(**options), value=0.6)])


def test_an_objective_that_says_nothing_is_named():
    class Empty(Objective):
        name = "empty"

    with pytest.raises(TangleNASError, match=r"'empty' failed .*neither terms\(space\) nor measure\(architecture\)"):
        searched(targets=[Target(Empty(), value=1)])

    class Elsewhere(Energy):
        def terms(self, space):
            raise TangleNASError("the table is of the space 'darts'")

    with pytest.raises(
        TangleNASError, match="the objective 'energy' failed on 'AutoFormer': the table is of the space"
    ):
        searched(targets=[Target(Elsewhere(), value=1)])


def test_an_objective_that_breaks_amid_a_search_is_named_with_the_step(tmp_path):
    calls = []

    def later(value):
        calls.append(value)
        return value * (1 if len(calls) <= 4 else float("nan"))  # once for the uniform mixture, then every step

    target = Target(Broken(expected=later), value=0.6)
    with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
        with pytest.raises(TangleNASError, match="search: penalty_energy is not finite by step 3 of 8"):
            searched(targets=[target], epochs=4, checkpoints=checkpoints)
        state = checkpoints.load()
    assert state["position"] == 2
    assert all(alpha.isfinite().all() for alpha in state["optimizer"]["alphas"].values())


# Other people's


@pytest.mark.exhaustive
def test_an_optimizer_needs_nothing_for_targets_but_its_expected_mixture():
    class Mine(Optimizer):
        def sample(self, step, stream):
            return self.expected()

        def expected(self):
            return self.space.mixture({count: (2 * alpha).softmax(1) for count, alpha in self.alphas.items()})

    target = Target(create_objective("params"), share=0.5, penalty="log")
    plain, drawn = (searched(Mine(), Convolutional(), epochs=20, targets=targets)[0] for targets in ([], [target]))
    wanted = 0.5 * Convolutional().cost(Convolutional().largest()).params
    assert target.limit == wanted
    misses = [abs(result.history[-1]["expected_params"] - wanted) for result in (plain, drawn)]
    assert misses[1] < 0.03 * wanted < misses[0]
