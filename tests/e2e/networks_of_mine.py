"""What a user may bring: plain modules that know nothing of ShardGAN. Wide, so that DDP cuts their gradients
into several buckets, and shallow, so that they are fast."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

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


class Scaled(Critic):
    """With a parameter of no dimensions, and a buffer whose elements share memory."""

    def __init__(self, *, size: int, channels: int, num_classes: int, width: int) -> None:
        super().__init__(size=size, channels=channels, num_classes=num_classes, width=width)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("ramp", torch.linspace(0.5, 1.5, size).expand(size, size))

    def forward(self, x: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        return self.scale * super().forward(x * self.ramp, c)


class Decoder(nn.Module):
    """Latents [N, 4, 14, 14] → images [N, 1, 28, 28]: the channels are the pixels of a square of four."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return nn.functional.pixel_shuffle(latents, 2)


class Halting(Painter):
    """Waits for good where a file in the folder $HALT tells it to: `forward-1` is for rank 1's forward pass,
    `save-1` for when its buffers are asked for, which a checkpoint does."""

    def forward(self, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        _halt("forward")
        return _HaltBackward.apply(super().forward(z, c))

    def named_buffers(self, *args, **kwargs):
        _halt("save")
        return super().named_buffers(*args, **kwargs)


class _HaltBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        _halt("backward")
        return gradient


def _halt(where: str) -> None:
    asked = Path(os.environ.get("HALT", "/nowhere")) / f"{where}-{os.environ.get('RANK')}"
    if not asked.exists():
        return
    if asked.read_text() == "raise":
        _tell_pid(asked)
        raise ValueError("the paint ran out")
    for halted in itertools.count():
        if halted == 100:  # for long enough that others have heard where this rank is
            _tell_pid(asked)
        if not asked.exists():
            return
        time.sleep(0.03)


def _tell_pid(asked: Path) -> None:
    partial = asked.with_suffix(".partial-pid")
    partial.write_text(str(os.getpid()))
    partial.rename(asked.with_suffix(".pid"))
