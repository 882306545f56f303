"""Tests of the contract that TangleNAS has with a space and an optimizer."""

from tanglenas_engine import create_optimizer, create_space
from tanglenas_engine.testing import check_finds, check_optimizer, check_space


def test_the_space():
    check_space(lambda: create_space("example"))


def test_the_optimizer():
    check_optimizer(lambda: create_optimizer("example"), lambda: create_space("example"))


def test_the_optimizer_finds_what_is_planted():
    check_finds(lambda: create_optimizer("example"), ["kernel_large", "width_small", "depth_large"])
