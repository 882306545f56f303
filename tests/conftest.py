"""Shared by all tests: one thread, a fixed seed, equal examples in every run, and what `make test` leaves out."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny import ALL, DISTINCT

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

OPTIMIZERS = sorted(manager().names("optimizer"))
OTHERS = {*ALL, *OPTIMIZERS} - FEW

REPEATED = {*ALL} - {*DISTINCT}
"""Presets of a class that another preset stands for. `make test-all` has them, `make test` has one of each class."""
TURNS = 4
"""Of the pairs of a space and an optimizer, `make test` takes one of so many, each space and each optimizer in turn."""


def is_exhaustive(given: set[str]) -> bool:
    """Return whether the parameters of a test repeat what other parameters show."""
    pairs = [(DISTINCT.index(s), OPTIMIZERS.index(o)) for s in given & {*DISTINCT} for o in given & {*OPTIMIZERS}]
    return bool(given & REPEATED) or any((space + optimizer) % TURNS for space, optimizer in pairs)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the files that are slow as a whole out of a run without slow tests: importing them takes seconds."""
    inside = collection_path.is_relative_to(TESTS) and collection_path.relative_to(TESTS).as_posix() + "/"
    return True if "not slow" in config.option.markexpr and inside and inside.startswith(SLOW) else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test as slow or exhaustive by its file, or by the space or optimizer that is its parameter."""
    path = item.path.relative_to(TESTS).as_posix()
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    given = {value for value in values if isinstance(value, str)}
    if path.startswith(SLOW) or OTHERS & given:
        item.add_marker("slow")
    if is_exhaustive(given):
        item.add_marker("exhaustive")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `part` leaves out as exhaustive, and begin with files that have a slow test.

    No worker is left with a long file at the end.
    """
    seen: Counter[tuple[Path, str]] = Counter()
    for item in items:
        if marker := item.get_closest_marker("part"):
            (every,) = marker.args
            test = item.path, item.originalname
            number = seen[test]
            seen[test] += 1
            # In turn, so that each value of every parameter is taken.
            if (number + number // every) % every:
                item.add_marker("exhaustive")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
