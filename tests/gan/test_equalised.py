"""Layers with an equalised learning rate: their constants, variances and second derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.gan.equalised import EqualisedConv2d, EqualisedLinear, ModulatedConv2d
from pipeline.gan.resample import smooth


@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("up", [False, True])
def test_the_modulated_convolution_can_be_differentiated_twice(demodulate, up):
    torch.manual_seed(0)
    layer = ModulatedConv2d(2, 2, 3 if up else 1, 2, demodulate, up).double()
    x, w = torch.randn(2, 2, 2, 3).double().requires_grad_(), torch.randn(2, 2).double().requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, w: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, w))

    assert torch.autograd.gradcheck(run, (x, w, *values))
    assert torch.autograd.gradgradcheck(run, (x, w, *values))


@pytest.mark.parametrize("up", [False, True])
def test_a_demodulated_layer_gives_one_variance_whatever_the_style(up):
    """Of white features: 1. Where it doubles the size a pixel gets a quarter of the kernel, and the filter
    has Σ (4 · FILTER)² = 25/16."""
    torch.manual_seed(0)
    layer = ModulatedConv2d(16, 400, 3, 8, up=up)
    for size in (0.1, 1.0, 10.0):
        out = layer(torch.randn(4, 16, 12, 12), size * torch.randn(4, 8))[:, :, 3:-3, 3:-3]
        assert out.var().item() == pytest.approx(25 / 64 if up else 1, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "options", "shape", "gain"),
    [
        (EqualisedLinear, {"multiplier": 0.01}, (), 0.01 / math.sqrt(30)),
        (EqualisedConv2d, {"kernel": 3}, (4, 4), 1 / math.sqrt(270)),
        (EqualisedConv2d, {"kernel": 3, "down": True}, (4, 4), 1 / math.sqrt(270)),
    ],
)
def test_weight_gain_is_the_constant_that_the_layer_multiplies_its_kernel_by(kind, options, shape, gain):
    """What `penalty.on=effective` counts. At first a layer's effective kernel is N(0, 1/inputs)."""
    torch.manual_seed(0)
    layer, inputs = kind(30, 50, **options), torch.randn(3, 30, *shape)
    assert layer.weight_gain == pytest.approx(gain)
    effective = layer.weight_gain * layer.weight.detach()
    assert effective.std().item() == pytest.approx(gain / options.get("multiplier", 1), rel=0.1)
    with torch.no_grad():
        out = layer(inputs)
        if isinstance(layer, EqualisedLinear):
            expected = F.linear(inputs, effective)
        else:
            x = smooth(inputs, border=2) if layer.down else inputs
            expected = F.conv2d(x, effective, stride=1 + layer.down, padding=0 if layer.down else 1)
    torch.testing.assert_close(out, expected)
