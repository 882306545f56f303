"""Shared by all tests: one thread, a fixed seed, and examples that are the same in every run."""

import pytest
import torch
from hypothesis import HealthCheck, settings

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
settings.load_profile("tanglenas")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
