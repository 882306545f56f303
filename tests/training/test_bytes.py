"""Bytes of a step: those that it keeps for backward, and the most that it allocates."""

import torch
from torch import nn

from tanglenas_engine.training.bytes import peak_bytes, saved_bytes


def test_saved_bytes_count_every_storage_once_and_no_parameter():
    layer, x = nn.Linear(100, 10), torch.randn(5, 100, requires_grad=True)

    def step():
        h = x * 1.0  # 2,000 bytes, kept by both products
        (layer(h) * layer(h.view(5, 100))).sum().backward()  # each keeps the other's 200 bytes

    assert saved_bytes(step, {p.untyped_storage().data_ptr() for p in layer.parameters()}) == 2400
    assert saved_bytes(step, set()) == 2400 + 4000


def test_the_peak_counts_what_lives_at_one_time_and_the_profiler_says_nothing(capfd):
    def step():
        for _ in range(3):
            torch.zeros(1000, 1000)  # 4,000,000 bytes, freed before the next

    assert 4_000_000 <= peak_bytes(step, torch.device("cpu")) < 8_000_000
    assert capfd.readouterr() == ("", "")
