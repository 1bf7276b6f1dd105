"""The Gan that is trained: a config's networks as engines, under the strategy of the launcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.gan.draws import Drawn, Draws
from pipeline.gan.losses import Adversarial, adversarial
from pipeline.gan.networks import build_D, build_G
from pipeline.gan.penalised import penalised_names
from pipeline.gan.schedules import Now, at
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.build import build_players
from pipeline.parallel.ema import Ema
from pipeline.parallel.engine import Engine, PlayerSettings
from pipeline.parallel.ranks import Ranks


@dataclass(frozen=True)
class Gan:
    """Both players, G's moving average, which is sampled, and their losses."""

    G: Engine
    D: Engine
    G_ema: Ema
    losses: Adversarial
    draws: Draws
    at: Callable[[int], Now]  # images shown so far → all that depends on progress
    batch_size: int  # global, per D update
    D_steps: int
    augment: Callable[[Tensor], Tensor] = lambda images: images  # of every image that D sees

    def latents(self, player: str, cur_nimg: int) -> Drawn:
        return self.draws.latents(player, cur_nimg, self.batch_size)


def build(
    config: Config, ranks: Ranks, batch: BatchShape, label_frequencies: list[float] | None = None
) -> Gan:
    """label_frequencies: of the training images, for fake labels; None: an unconditional Gan."""
    num_classes = len(label_frequencies or ())
    ranks.progress.doing = "building the networks"
    networks = (build_G(config, num_classes), build_D(config, num_classes))
    players = tuple(
        PlayerSettings(name, optimizer, penalty, penalised_names(network, config.penalty.on))
        for name, optimizer, penalty, network in (
            ("G", config.optim.G, config.penalty.G, networks[0]),
            ("D", config.optim.D, config.penalty.D, networks[1]),
        )
    )
    data = config.data
    draws = Draws(config.run.seed, config.G.z_dim, label_frequencies)
    c = torch.zeros(2, dtype=torch.int64, device=ranks.device) if num_classes else None
    z = torch.zeros(2, config.G.z_dim, device=ranks.device)
    images = torch.zeros(2, data.channels, data.size, data.size, device=ranks.device)
    G, D, G_ema = build_players(networks, (players[0], players[1]), ranks, batch, ((z, c), (images, c)))
    return Gan(
        G=G,
        D=D,
        G_ema=G_ema,
        losses=adversarial(config.loss.kind),
        draws=draws,
        at=partial(at, config),
        batch_size=data.batch_size,
        D_steps=config.loss.D_steps,
    )
