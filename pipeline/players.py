"""A config's networks as engines, under whatever strategy the launcher chose: the Gan that is trained."""

from __future__ import annotations

from functools import partial

import torch

from pipeline.config import Config
from pipeline.gan.draws import Draws
from pipeline.gan.losses import adversarial
from pipeline.gan.networks import build_D, build_G
from pipeline.gan.penalised import penalised_names
from pipeline.gan.schedules import at
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.build import build_players
from pipeline.parallel.engine import PlayerSettings
from pipeline.parallel.ranks import Ranks
from pipeline.run.state import State
from pipeline.step import Gan


def build(settings: Config, state: State, ranks: Ranks, batch: BatchShape) -> Gan:
    """The two players, G_ema, and what they play for."""
    ranks.progress.doing = "building the networks"
    networks = (build_G(settings, state.num_classes), build_D(settings, state.num_classes))
    players = tuple(
        PlayerSettings(name, optimizer, penalty, penalised_names(network, settings.penalty.on))
        for name, optimizer, penalty, network in (
            ("G", settings.optim.G, settings.penalty.G, networks[0]),
            ("D", settings.optim.D, settings.penalty.D, networks[1]),
        )
    )
    data = settings.data
    draws = Draws(settings.run.seed, settings.G.z_dim, state.label_frequencies)
    c = torch.zeros(2, dtype=torch.int64, device=ranks.device) if state.num_classes else None
    z = torch.zeros(2, settings.G.z_dim, device=ranks.device)
    images = torch.zeros(2, data.channels, data.size, data.size, device=ranks.device)
    G, D, G_ema = build_players(networks, (players[0], players[1]), ranks, batch, ((z, c), (images, c)))
    return Gan(
        G=G,
        D=D,
        G_ema=G_ema,
        losses=adversarial(settings.loss.kind),
        draws=draws,
        at=partial(at, settings),
        batch_size=data.batch_size,
        D_steps=settings.loss.D_steps,
    )
