"""What a user may bring: plain modules that know nothing of ShardGAN. Wide, so that DDP cuts their gradients
into several buckets, and shallow, so that they are fast."""

from __future__ import annotations

import torch
from torch import nn


class Painter(nn.Module):
    """Two layers, 2.4 MB of weights: DDP's first bucket is full at 1 MB."""

    def __init__(self, *, z_dim: int, size: int, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.shape = (channels, size, size)
        self.layers = nn.Sequential(
            nn.Linear(z_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, channels * size * size), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        return self.layers(z).view(-1, *self.shape)


class Critic(nn.Module):
    def __init__(self, *, size: int, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * size * size, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )

    def forward(self, x: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        return self.layers(x).flatten()
