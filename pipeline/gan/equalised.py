"""Layers with an equalised learning rate (Karras et al. 2018, section 4.1), one of them modulated.

The stored kernel starts standard normal, and the layer multiplies it by the constant `weight_gain`, 1/√inputs
of an output: all layers then learn at one pace under Adam. With a learning rate multiplier m the stored
kernel starts as N(0, 1/m²) and `weight_gain` is m/√inputs, so that the layer learns m times as fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.gan.resample import smooth

_TINY = 1e-8


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


class EqualisedConv2d(nn.Module):
    """[N, inputs, H, W] → [N, outputs, H, W]; down: → [N, outputs, H/2, W/2], filtered first."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True, down: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.weight_gain = 1 / math.sqrt(inputs * kernel**2)
        self.down = down
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight * self.weight_gain
        if self.down:
            return F.conv2d(smooth(x, border=2), kernel, self.bias, stride=2)
        return F.conv2d(x, kernel, self.bias, padding=kernel.shape[-1] // 2)


class ModulatedConv2d(nn.Module):
    """A convolution whose kernel k depends on the image's latent (Karras et al. 2020, StyleGAN2, eq. 1, 3):

        k'_oip = s_i · k_oip;   demodulate: k''_oip = k'_oip / √(Σ_ip k'_oip² + 1e-8);   s linear in w, 1 + …

    x [N, inputs, H, W] and w [N, w_dim] → [N, outputs, H, W]; up: → [N, outputs, 2H, 2W], filtered after it.
    The kernels of single images are never formed: a kernel that is scaled in its inputs is the same kernel on
    scaled features, and one that is scaled in its outputs gives scaled features. All images then share one
    convolution, which takes no memory for each of them and can be differentiated twice like any other.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, w_dim: int, demodulate: bool = True, up: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.weight_gain = 1 / math.sqrt(inputs * kernel**2)
        self.style = EqualisedLinear(w_dim, inputs, bias=1.0)
        self.demodulate, self.up = demodulate, up
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale = self.style(w) * self.weight_gain
        x = self._convolve(x * scale.to(x.dtype)[:, :, None, None])
        if not self.demodulate:
            return x
        squares = F.linear(scale.square(), self.weight.square().sum((2, 3)))
        return x * (squares + _TINY).rsqrt().to(x.dtype)[:, :, None, None]

    def _convolve(self, x: Tensor) -> Tensor:
        if not self.up:
            return F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)
        x = F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)
        return 4 * smooth(x, border=1)  # zeros between the pixels, which the convolution has put there
