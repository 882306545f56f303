"""Bands: samples are those of the space under the condition that they are in the band."""

import itertools
import math
from collections import Counter

import pytest
import torch
from spaces import SPACES, vit
from tiny import ALL, tiny

from tanglenas_engine import Additive, Objective, create_objective, create_optimizer, search
from tanglenas_engine.derivation import proposals
from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.proposals import Proposals
from tanglenas_engine.derivation.targets import Target, band_of, bind_targets
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.progress import SilentProgress
from tanglenas_engine.spaces.cost import METRICS
from tanglenas_engine.testing import random_data


def assignments(space):
    for picks in itertools.product(*space.decisions()):
        yield {row: option for part in picks for row, option in part.items()}


def limited(space, share, metrics=("macs",)):
    """A limit on each metric, between the least and the most that the space costs."""
    ends = space.cost(space.smallest()), space.cost(space.largest())
    low, high = ({metric: getattr(cost, metric) for metric in metrics} for cost in ends)
    return {metric: int(low[metric] + share * (high[metric] - low[metric])) for metric in metrics}


def chances(space, limits, least, scores=None):
    """Return the chance of each architecture in the band, by going through all assignments."""
    found = Counter()
    for picks in assignments(space):
        weight = 1.0 if scores is None else math.exp(sum(scores[row][option] for row, option in picks.items()))
        architecture = space.architecture_of(picks)
        used = [getattr(space.cost(architecture), metric) / most for metric, most in limits.items()]
        if max(used) <= 1 and max(used) >= least:
            found[architecture.digest] += weight
    return {digest: count / found.total() for digest, count in found.items()}


def random_scores(space):
    """Return log-probabilities of every row's options."""
    generator = torch.Generator().manual_seed(2)
    return {row: torch.randn(len(row.options), generator=generator).log_softmax(0).tolist() for row in space.rows}


def have_chances(drawn, right):
    """Check samples, each by its chance."""
    drawn = Counter(one.digest for one in drawn)
    assert drawn.keys() <= right.keys()
    # Pearson's statistic has a mean of k - 1 and a variance of 2 (k - 1), and nearly that of a normal distribution.
    draws, free = drawn.total(), len(right) - 1
    chi = sum((drawn[digest] - draws * p) ** 2 / (draws * p) for digest, p in right.items())
    assert abs(chi - free) < 5 * (2 * free + sum(1 / p for p in right.values()) / draws) ** 0.5


@pytest.mark.parametrize("scored", [False, True], ids=["uniform", "scored"])
@pytest.mark.parametrize("metrics", [("macs",), ("params",), METRICS], ids="+".join)
@pytest.mark.parametrize("name", ["convolutional", "language", "stages", "deep vit"])
@pytest.mark.part(4)
@pytest.mark.slow
def test_samples_have_the_chances_that_the_whole_space_gives_them(name, metrics, scored):
    space = vit(depth=(1, 2, 3)) if name == "deep vit" else SPACES[name]()
    limits = limited(space, 0.6, metrics)
    scores = random_scores(space) if scored else None
    right = chances(space, limits, 0.7, scores)
    assert len(right) > 3
    band, generator = Band(Budget(space, limits), 0.7), torch.Generator().manual_seed(0)
    assert band.exact
    have_chances((band.sample(generator, scores) for _ in range(1000)), right)


class Weight(Objective):
    """Parameters in thousands, a cost with tables whose limits need not be whole numbers."""

    name, unit = "weight", "k"

    def terms(self, space):
        tables = space.terms("params").tables
        return Additive({rows: [value / 1000 for value in values] for rows, values in tables.items()})


def test_an_architecture_just_below_the_share_of_one_limit_has_its_chance_and_not_twice():
    space, least = vit(), 0.7
    weight = Weight().bind(space)
    ways = [(space.architecture_of(picks), weight.cost(space.architecture_of(picks))) for picks in assignments(space)]
    macs = sorted(space.cost(one).macs for one, _ in ways)
    limits = {"macs": macs[len(macs) // 2]}
    near, cost = Counter(
        way for way in ways if least * limits["macs"] <= space.cost(way[0]).macs <= limits["macs"]
    ).most_common(1)[0][0]
    limits["weight"] = cost / least * (1 + 1e-6)
    inside = [
        one.digest
        for one, cost in ways
        if space.cost(one).macs <= limits["macs"]
        and cost <= limits["weight"]
        and (space.cost(one).macs >= least * limits["macs"] or cost >= least * limits["weight"])
    ]
    band, generator = Band(Budget(space, limits, [weight]), least), torch.Generator().manual_seed(0)
    right = 600 * inside.count(near.digest) / len(inside)
    drawn = sum(band.sample(generator) == near for _ in range(600))
    assert 25 < right < 300 and abs(drawn - right) < 5 * math.sqrt(right)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.part(4)
def test_every_space_has_bands(name, share):
    space = tiny(name)
    limits = limited(space, share)
    band, generator = Band(Budget(space, limits), 0.8), torch.Generator().manual_seed(1)
    drawn = [band.sample(generator) for _ in range(8)]
    assert all(0.8 * limits["macs"] <= space.cost(one).macs <= limits["macs"] for one in drawn)
    assert all(band.holds(one) for one in drawn)


def test_scores_that_rule_the_band_out_are_left_out():
    space = vit()
    band = Band(Budget(space, limited(space, 0.7)), 0.8)
    largest = space.assignment_of(space.largest())
    scores = {row: [0.0 if i == largest[row] else -1e3 for i in range(len(row.options))] for row in space.rows}
    assert band.holds(band.sample(torch.Generator().manual_seed(0), scores))


def test_the_same_seed_draws_the_same():
    space = vit()
    band = Band(Budget(space, limited(space, 0.7)), 0.8)
    one, two = ([band.sample(torch.Generator().manual_seed(s)) for s in range(20)] for _ in range(2))
    assert one == two and len(set(one)) > 1


def test_samples_do_not_depend_on_the_order_of_limits():
    space = vit()
    limits = limited(space, 0.6, METRICS)
    bands = [Band(Budget(space, dict(order)), 0.5) for order in (limits.items(), reversed(limits.items()))]
    drawn = [[band.sample(torch.Generator().manual_seed(seed)) for seed in range(20)] for band in bands]
    assert drawn[0] == drawn[1]


class Opaque(Objective):
    """Parameters, without tables."""

    name, unit = "opaque", "parameters"

    def measure(self, architecture):
        return self.space.cost(architecture).params

    def expectation(self, mixture):
        return self.space.expected_cost(mixture).params


def opaque(space, share):
    """A budget whose cost has no tables, and the limit on the parameters that it stands for."""
    limits = limited(space, share, ("params",))
    return Budget(space, {"opaque": limits["params"]}, [Opaque().bind(space)]), limits


@pytest.mark.parametrize("scored", [False, True], ids=["uniform", "scored"])
def test_a_cost_without_tables_changes_no_chance(scored):
    space = vit()
    budget, limits = opaque(space, 0.6)
    scores = random_scores(space) if scored else None
    right = chances(space, limits, 0.8, scores)
    assert len(right) > 3
    band, generator = Band(budget, 0.8), torch.Generator().manual_seed(0)
    have_chances((band.sample(generator, scores) for _ in range(300)), right)


def test_random_candidates_for_a_cost_without_tables_have_the_chances_of_its_band():
    space = vit()
    budget, limits = opaque(space, 0.6)
    drawn = [Proposals(space, budget=budget, fill=0.9, seed=seed).fresh(1)[0] for seed in range(100)]
    have_chances(drawn, chances(space, limits, 0.9))


def test_candidates_from_a_mixture_have_its_chances_where_its_draws_hit_the_band(monkeypatch):
    space = vit()
    budget, limits = opaque(space, 0.6)
    mixture = space.mixture({count: torch.full((rows, count), 1 / count) for count, rows in space.stacks.items()})
    monkeypatch.setattr(proposals, "MIXTURE_DRAWS", 300)
    monkeypatch.setattr(Proposals, "fresh", lambda *_, **options: [])
    found = [Proposals(space, budget=budget, fill=0.8, seed=seed).first(3, mixture=mixture) for seed in range(100)]
    right = chances(space, limits, 0.8)
    rest = 1 - right.pop(found[0][0].digest, 0)  # what is most probable comes first, and is not drawn again
    have_chances((one for _, *drawn in found for one in drawn), {digest: p / rest for digest, p in right.items()})


def test_smaller_candidates_follow_when_a_band_without_tables_is_used_up():
    space = vit()
    budget, limits = opaque(space, 0.6)
    inside = chances(space, limits, 0.9)
    drawn = [one.digest for one in Proposals(space, budget=budget, fill=0.9).fresh(len(inside) + 4)]
    assert len({*drawn}) == len(inside) + 4 and {*drawn[: len(inside)]} == inside.keys()


@pytest.mark.slow
def test_moves_lead_into_a_band_without_tables_that_random_architectures_miss(monkeypatch):
    space = vit()
    monkeypatch.setattr(Band, "by_rejection", lambda *_: None)
    budget, limits = opaque(space, 0.6)
    band = Band(budget, 0.8)
    assert not band.exact
    costs = [space.cost(band.sample(torch.Generator().manual_seed(seed))).params for seed in range(10)]
    assert all(0.8 <= cost / limits["params"] <= 1 for cost in costs) and len(set(costs)) > 1


class Notes(SilentProgress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("objective", [Opaque(), Weight()], ids=["without tables", "with tables"])
def test_a_search_says_that_its_band_cannot_be_counted(objective):
    space, notes = vit(), Notes()
    searched("spos", space, Target(objective, share=0.7), band=(0.5, 1.0), progress=notes)
    told = [line for line in notes.lines if "cannot be counted" in line]
    assert len(told) == isinstance(objective, Opaque)
    for line in told:
        assert line.startswith("search: the band cannot be counted, as there are no terms of opaque: up to 300 ")
        limit = 0.7 * space.cost(space.largest()).params
        generator = torch.Generator().manual_seed(0)
        within = [0.5 * limit <= space.cost(space.sample(generator)).params <= limit for _ in range(300)]
        assert line.endswith(f"Of 300 random ones, {sum(within)} are in it") and 0 < sum(within) < 300


def test_an_empty_band_is_refused_with_its_range():
    space = vit()
    costs = sorted({space.terms("macs").cost(picks) for picks in assignments(space)})
    gap, most = max((b / a, b) for a, b in itertools.pairwise(costs))
    with pytest.raises(TangleNASError) as caught:
        Band(Budget(space, {"macs": most - 1}), 1 - (gap - 1) / 4)
    assert "holds no architecture of" in str(caught.value) and f"{most - 1:,} MACs" in str(caught.value)
    assert "widen it, or move the limit" in str(caught.value)
    with pytest.raises(TangleNASError, match="the smallest has"):
        Band(Budget(space, {"macs": costs[0] - 1}))


def searched(optimizer, space, target, **options):
    data = random_data(space, ("weights", "architecture", "validation"), samples=16)
    return search(space, create_optimizer(optimizer), data, epochs=1, batch_size=8, targets=[target], **options)


@pytest.mark.parametrize("optimizer", ["spos", "sandwich"])
def test_a_sampled_search_with_a_target_draws_within_the_band(optimizer, monkeypatch):
    space = vit(depth=(1, 2, 3))
    entered = []
    select = space.select
    monkeypatch.setattr(space, "select", lambda architecture: (entered.append(architecture), select(architecture))[1])
    limit = limited(space, 0.6)["macs"]
    result = searched(optimizer, space, Target(create_objective("macs"), value=limit), band=(0.8, 0.9))
    trained = [one for one in entered if isinstance(one, type(space.largest())) and one != space.largest()]
    assert len(trained) > 1
    assert all(0.8 * limit <= space.cost(one).macs <= 0.9 * limit for one in trained)
    assert result.targets == {"macs": limit}


def test_a_target_that_is_no_count_is_not_rounded():
    space = vit()
    largest = space.cost(space.largest()).params / 1000
    weight = Weight().bind(space)
    target = Target(weight, value=0.7 * largest)
    drawn = band_of(space, "spos", bind_targets([target], space), (0.95, 1.0))
    costs = [weight.cost(drawn.sample(torch.Generator().manual_seed(seed))) for seed in range(20)]
    assert all(0.95 * target.value <= cost <= target.value for cost in costs)


@pytest.mark.parametrize(
    "band, message",
    [
        (
            (0.01, 0.02),
            r"search.band is \(0.01, 0.02\), shares of the target: no architecture of 'AutoFormer' has at most",
        ),
        (None, "spos has no architecture parameters that a target for macs could draw, and search.band is None"),
        ((0.9, 0.8), r"search.band is \(0.9, 0.8\), expected two shares of the target, the smaller first"),
        (0.9, "search.band is 0.9, expected two shares"),
        ((0.5, 1.5), r"search.band is \(0.5, 1.5\), expected two shares"),
        ((0.9, "1"), r"search.band is \(0.9, '1'\), expected two shares"),
    ],
)
def test_a_band_is_two_shares(band, message):
    with pytest.raises(TangleNASError, match=message):
        searched("spos", vit(), Target(create_objective("macs"), share=0.6), band=band)
