"""The Dirac-GAN (Mescheder et al. 2018): G puts all its mass on one point θ, D(x) = ψx, the data is at 0.

Each player is a single number: in any world but one, some ranks own nothing of it.
"""

from __future__ import annotations

import torch
from torch import nn

from launch.selfcheck import parity
from pipeline import config
from pipeline.data.stream import Batch
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.ranks import Ranks
from pipeline.players import build
from pipeline.run.stats import Stats
from pipeline.step import train_step

STEP = 0.5  # h, of both players' SGD
UPDATES = 20
SHRINKS = {  # game → its settings and the radius that an update leaves of 1, near the origin
    "free": ((), 1.0),
    "l2-of-D": (("penalty.D.l2=0.1",), 0.9**0.5),
    "l2-of-both": (("penalty.G.l2=0.05", "penalty.D.l2=0.1"), (0.95 * 0.9) ** 0.5),
    "r1": (("penalty.r1.gamma=0.2", "penalty.r1.interval=1"), 0.9**0.5),  # R1(γ) is L2(γ/2) on D
    "r1-r2": (
        ("penalty.r1.gamma=0.1", "penalty.r1.interval=1", "penalty.r2.gamma=0.1", "loss.kind=relativistic"),
        0.9**0.5,  # R1 + R2 is L2(γ) on D
    ),
}
_START = 1e-3  # so near the origin that the game is linear to 1e-6


class Point(nn.Module):
    """G: every latent becomes the one pixel θ."""

    def __init__(self, *, z_dim: int, size: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([_START]))

    def forward(self, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        return self.theta.expand(len(z)).view(-1, 1, 1, 1).clone()  # a view would outlive its parameter


class Slope(nn.Module):
    """D: ψ times the pixel."""

    def __init__(self, *, size: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.psi = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        return images.flatten() * self.psi


def train(ranks: Ranks, game: str) -> list[tuple[float, float]]:
    """(θ, ψ) at the start and after each update."""
    settings = config.load(
        None,
        [
            "data.train=none", "data.size=1", "data.channels=1", "data.batch_size=12",
            "G.z_dim=1", "G.kind=dirac:Point", "D.kind=dirac:Slope", "loss.kind=minimax",
            "penalty.on=all",
            *(f"optim.{player}.{key}" for player in "GD" for key in ("kind=sgd", f"lr={STEP}")),
            *SHRINKS[game][0],
        ],
    )  # fmt: skip
    batch = batch_shape(settings.data, ranks.world)
    gan, stats, nimg = build(settings, ranks, batch), Stats(ranks.device), 0
    grey = Batch(torch.zeros(batch.local, 1, 1, 1), None)  # floats are as the networks see them
    path = [_point(parity.whole(gan))]
    for _ in range(UPDATES):
        nimg = train_step(gan, iter([grey]), nimg, stats)
        path.append(_point(parity.whole(gan)))
    return path


def _point(weights: parity.Tensors) -> tuple[float, float]:
    return float(weights["G/theta"]), float(weights["D/psi"])
