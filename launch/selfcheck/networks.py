"""Networks of the parity matrix beside our own: with parameters that do not train, with tied ones, with a
latent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
