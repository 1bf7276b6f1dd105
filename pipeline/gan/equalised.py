"""Layers with an equalised learning rate (Karras et al. 2018, section 4.1).

The stored kernel starts standard normal, and the layer multiplies it by the constant `weight_gain`, 1/√inputs
of an output: all layers then learn at one pace under Adam. With a learning rate multiplier m the stored
kernel starts as N(0, 1/m²) and `weight_gain` is m/√inputs, so that the layer learns m times as fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EqualisedLinear(nn.Module):
    """[N, inputs] → [N, outputs]. bias: where the effective bias starts; multiplier: of the learning rate."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.weight_gain = multiplier / math.sqrt(inputs)
        self.bias_gain = multiplier
        nn.init.normal_(self.weight, std=1 / multiplier)
        nn.init.constant_(self.bias, bias / multiplier)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.weight_gain, self.weight, self.bias * self.bias_gain)
