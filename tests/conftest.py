"""Shared by all tests: one thread, a fixed seed, equal examples in every run, and what `make test-fast` leaves out."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny import ALL

from tanglenas_engine.plugins import manager

# Tiny tensors gain nothing from threads.
torch.set_num_threads(1)

settings.register_profile(
    "tanglenas",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fast", settings.get_profile("tanglenas"), max_examples=5)
# For people who look for more: `pytest --hypothesis-profile thorough tests/pipeline/test_fuzz.py` takes new examples.
settings.register_profile("thorough", settings.get_profile("tanglenas"), max_examples=1000, derandomize=False)
settings.load_profile("tanglenas")

TESTS = Path(__file__).parent
SLOW = (
    "attack/",
    "cli/test_doctor.py",
    "cli/test_export.py",
    "cli/test_init.py",
    "first_party/datasets/test_text.py",
    "first_party/objectives/",
    "first_party/test_darts.py",
    "pipeline/",
    "project/",
    "runtime/test_checkpoint.py",
    "runtime/test_distributed.py",
    "stages/test_discretize.py",
    "training/test_compile.py",
)
"""What `make test-fast` leaves out, by the start of its path: whole pipelines, processes, and what takes longest."""

FEW = {"vit", "autoformer_nano", "gpt_nano", "nb201_nano", "drnas", "spos"}
"""The spaces of the tables of invariants, and an optimizer of each family, that `make test-fast` keeps."""

OTHERS = {*ALL, *manager().names("optimizer")} - FEW


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test as slow by its file, or by the space or optimizer that is its parameter."""
    path = item.path.relative_to(TESTS).as_posix()
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if path.startswith(SLOW) or OTHERS.intersection(value for value in given if isinstance(value, str)):
        item.add_marker("slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that have a slow test, so that no worker is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
