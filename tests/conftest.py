"""Shared by all tests: one thread, a fixed seed, equal examples in every run, and what `make test` leaves out."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "tanglenas",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=10,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fast", settings.get_profile("tanglenas"), max_examples=5)
settings.register_profile("all", settings.get_profile("tanglenas"), max_examples=30)
# For people who look for more: `pytest --hypothesis-profile thorough tests/pipeline/test_fuzz.py` takes new examples.
settings.register_profile("thorough", settings.get_profile("tanglenas"), max_examples=1000, derandomize=False)
settings.load_profile("tanglenas")

TESTS = Path(__file__).parent
SLOW = (
    "attack/",
    "cli/test_doctor.py",
    "cli/test_export.py",
    "cli/test_init.py",
    "cli/test_predict.py",
    "first_party/datasets/test_text.py",
    "first_party/objectives/",
    "first_party/test_darts.py",
    "first_party/test_transformers.py",
    "pipeline/",
    "project/",
    "runtime/test_checkpoint.py",
    "runtime/test_distributed.py",
    "stages/test_discretize.py",
    "training/test_compile.py",
)
"""What `make test-fast` leaves out, by the start of its path: whole pipelines, processes, and what takes longest."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the files that are slow as a whole out of a run without slow tests: importing them takes seconds."""
    inside = collection_path.is_relative_to(TESTS) and collection_path.relative_to(TESTS).as_posix() + "/"
    return True if "not slow" in config.option.markexpr and inside and inside.startswith(SLOW) else None


# What loads torch is imported below: the process that hands out the tests to workers collects none.


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test as slow by its file, or by the space or optimizer that is its parameter."""
    from left_out import is_other

    if item.path.relative_to(TESTS).as_posix().startswith(SLOW) or is_other(item):
        item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test` leaves out of each table."""
    from left_out import mark

    mark(items)


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.set_num_threads(1)  # tiny tensors gain nothing from threads
    torch.manual_seed(0)
