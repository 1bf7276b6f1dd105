"""norm: sync_batch is batch normalisation of all ranks' images of a round."""

from __future__ import annotations

import json

import pytest
import torch
from launches import LAUNCHED

from pipeline.gan.sync_batch_norm import SyncBatchNorm2d

BOUNDS = {"torch.float64": 1e-12, "torch.float32": 2e-6}


@pytest.mark.parametrize("name", LAUNCHED)
def test_passes_and_their_derivatives_are_those_of_one_process(launched, name):
    """Logits, R1's gradient, which is a first backward, and what the second leaves at images, parameters."""
    record = json.loads((launched(name) / "sync_norm.json").read_text())
    for dtype, bound in BOUNDS.items():
        assert len(record[dtype]) == 19
        assert {what: error for what, error in record[dtype].items() if not error <= bound} == {}
    assert record["same statistics"]
    assert record["calls in eval"] == []


def shared(dtype: torch.dtype = torch.float32) -> SyncBatchNorm2d:
    """As on each of two ranks that have the same images."""
    norm = SyncBatchNorm2d(3).to(dtype)
    norm.share(2, lambda values: values)
    return norm


def test_its_derivatives_are_those_of_differences():
    norm, given = shared(torch.float64), torch.Generator().manual_seed(0)
    x, scale, shift = (
        torch.randn(shape, generator=given, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 2, 2), (3,), (3,))
    )

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, scale, shift))
    assert torch.autograd.gradgradcheck(function, (x, scale, shift))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_returns_what_it_is_given(dtype):
    x = torch.randn(4, 3, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    out = shared(torch.float64 if dtype == torch.float64 else torch.float32)(x)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert not out.is_contiguous()


def test_statistics_are_wide_whatever_the_images_are():
    """In bf16 neither the mean of 4,096 numbers near 100 nor their variance would be right."""
    x = (torch.randn(16, 3, 16, 16) + 100).bfloat16()
    norm = shared()
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.double().mean((0, 2, 3)).float())
    var = x.double().var((0, 2, 3), correction=0) * 8192 / 8191  # of twice as many
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var.float(), rtol=1e-5, atol=0)


def test_a_mean_far_from_zero_costs_no_digit_of_the_variance():
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 3000
    norm = shared()
    norm(x)
    var = x.double().var((0, 2, 3), correction=0) * 8192 / 8191
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var.float(), rtol=1e-5, atol=0)
