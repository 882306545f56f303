"""The kernels of the weighted layer norm, run by Triton's interpreter, which needs no GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tanglenas_engine.elastic import fused_norm
from tanglenas_engine.elastic.norm import weighted_layer_norm

CASES = [(48, True, True), (64, True, False), (5, False, False)]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels need Triton")
@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_kernels_compute_what_the_operations_of_torch_do():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compare(width: int, has_weight: bool, has_bias: bool) -> None:
    torch.manual_seed(0)
    coverage = torch.rand(width).sort(descending=True).values
    leaves = [
        torch.randn(3, 4, width),
        coverage,
        *(torch.randn(width) if has else None for has in (has_weight, has_bias)),
    ]
    given = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    expected = weighted_layer_norm(*leaves, 1e-5)
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, given, dy)
    x, coverage, weight, bias = (None if leaf is None else leaf.detach() for leaf in leaves)
    y, mean, scale = fused_norm.forward(x, coverage, weight, bias, 1e-5)
    found = fused_norm.backward(dy, x, coverage, weight, mean, scale, 1e-5)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-5)
    chosen = (one for one, leaf in zip(found, leaves, strict=True) if leaf is not None)
    for one, other in zip(chosen, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    for case in CASES:
        compare(*case)
