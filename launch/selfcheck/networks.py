"""Networks of the parity matrix beside our own: with parameters that do not train, with tied ones, with
a latent, with equalised learning rates, and one with all that networks of users do besides."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.gan import dcgan


class FrozenGenerator(dcgan.Generator):
    """Its first layer does not train."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.project.requires_grad_(False)


class FrozenDiscriminator(dcgan.Discriminator):
    """Its first block does not train."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.blocks[0].requires_grad_(False)


class OwnGenerator(dcgan.Generator):
    """A plain one."""


class OwnDiscriminator(nn.Module):
    """What networks of users do: it looks at images through features that another training has made, in eval
    mode with their statistics (Projected GANs), has constants drawn by NumPy, a mask with infinities, a
    kernel of five axes that is not contiguous, a buffer that each pass replaces and one that comes in the
    first, and takes images apart with `view`."""

    scale: Tensor
    mask: Tensor
    constants: Tensor
    seen: Tensor

    def __init__(self, *, channels: int, **_: Any) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(channels)
        norm.running_mean, norm.running_var = torch.full((channels,), 0.3), torch.full((channels,), 2.0)
        self.features = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), norm, nn.SiLU())
        self.features.requires_grad_(False).eval()
        self.kernel = nn.Parameter(0.2 * torch.randn(1, 5, channels, 4, 4).mT)  # not contiguous
        self.to_logit = nn.Linear(5 * 7 * 7, 1)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("constants", torch.from_numpy(numpy.random.randn(5 * 7 * 7)).float())
        self.register_buffer("mask", torch.full((7, 7), -torch.inf).triu(1))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.ones((), device=x.device), persistent=False)
        rows = F.silu(F.conv2d(x + self.features(x), self.kernel[0], stride=4)) @ self.mask.softmax(1)
        flat = rows.view(len(x), -1) + self.constants
        logits: Tensor = self.to_logit(F.silu(flat)).flatten() * self.scale * self.seen
        self.scale = 0.9 * self.scale + 0.1
        return logits


class Threefold(nn.Module):
    """One kernel used three times: by a layer that is called twice, and by another layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.twice = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.again = nn.Conv2d(channels, channels, 3, padding=1)
        self.again.weight = self.twice.weight
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.again(self.activation(self.twice(self.activation(self.twice(x)))))
        return out


class TiedGenerator(dcgan.Generator):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.finish = Threefold(arguments["channels"])

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        out: Tensor = self.finish(super().forward(z, c))
        return out


class TiedDiscriminator(dcgan.Discriminator):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.begin = Threefold(arguments["channels"])

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(self.begin(x), c)


class LatentGenerator(dcgan.Generator):
    """Maps z to a latent of two layers, for path length regularisation: the first makes images, of which the
    second sets the contrast."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        z_dim = arguments["z_dim"]
        self.mapping = nn.Sequential(nn.Linear(z_dim, z_dim), nn.SiLU(), nn.Linear(z_dim, 2 * z_dim))
        self.contrast = nn.Linear(z_dim, arguments["channels"])

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        self.latent = self.mapping(z).unflatten(1, (2, -1))
        images: Tensor = super().forward(self.latent[:, 0], c)
        return torch.tanh(images * self.contrast(self.latent[:, 1])[:, :, None, None].exp())


class Equalised(nn.Module):
    """A linear layer, or a convolution of `kernel` pixels, that stores weights N(0, 1/m²) and computes with
    m/√fan_in times those (Karras et al. 2018, section 4.1; 2019, app. C)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 0, stride: int = 1, m: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *[kernel] * 2 * (kernel > 0)) / m)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.weight_gain = m / self.weight[0].numel() ** 0.5
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_gain * self.weight
        if weight.ndim == 2:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, self.stride, padding=1)


class EqualisedGenerator(nn.Module):
    """Its mapping learns at half the rate; its last layer is a plain one."""

    def __init__(self, *, z_dim: int, size: int, channels: int, **_: Any) -> None:
        super().__init__()
        self.start = size // 2
        self.mapping = nn.Sequential(Equalised(z_dim, z_dim, m=0.5), nn.SiLU())
        self.blocks = nn.Sequential(
            *(Equalised(z_dim, 3 * self.start**2), nn.SiLU(), nn.Unflatten(1, (3, self.start, self.start))),
            *(nn.Upsample(scale_factor=2), Equalised(3, 5, kernel=3), nn.SiLU()),
        )
        self.to_image = nn.Conv2d(5, channels, 1)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        return torch.tanh(self.to_image(self.blocks(self.mapping(z))))


class EqualisedDiscriminator(nn.Module):
    def __init__(self, *, size: int, channels: int, **_: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Equalised(channels, 5, kernel=3, stride=2), nn.SiLU()),
            *(Equalised(5, 7, kernel=3, stride=2), nn.SiLU(), nn.Flatten()),
        )
        self.to_logit = Equalised(7 * (size // 4) ** 2, 1)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        logits: Tensor = self.to_logit(self.blocks(x)).flatten()
        return logits
