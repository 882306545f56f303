"""The contract of plugins, as checks to call from their own tests. A check that fails raises an AssertionError.

from tanglenas_engine import create_space
from tanglenas_engine.testing import check_finds, check_optimizer, check_space

def test_it_is_an_optimizer():
    check_optimizer(MyOptimizer, lambda: create_space("autoformer_nano"))

def test_it_finds_what_is_best_by_construction():
    check_finds(MyOptimizer)

def test_it_is_a_space():
    check_space(MySpace)

`tanglenas plugins check NAME` runs the checks on an installed plugin and prints the result of each.
"""

from .datasets import check_batches, check_dataset, check_pool
from .objectives import check_expectation, check_measure, check_objective, check_slope
from .optimizers import (
    check_gradients,
    check_optimizer,
    check_resume,
    check_sampling,
    check_stages,
    random_data,
    same,
)
from .planted import TRUTHS, Finding, Truth, check_finds, find
from .spaces import (
    check_architectures,
    check_corners,
    check_costs,
    check_learning,
    check_search,
    check_space,
    check_standalone,
)

__all__ = [
    "TRUTHS",
    "Finding",
    "Truth",
    "check_architectures",
    "check_batches",
    "check_corners",
    "check_costs",
    "check_dataset",
    "check_expectation",
    "check_finds",
    "check_gradients",
    "check_learning",
    "check_measure",
    "check_objective",
    "check_optimizer",
    "check_pool",
    "check_resume",
    "check_sampling",
    "check_search",
    "check_slope",
    "check_space",
    "check_stages",
    "check_standalone",
    "find",
    "random_data",
    "same",
]
