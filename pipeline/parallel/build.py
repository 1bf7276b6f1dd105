"""From two plain networks to two players under the strategy the launcher chose."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pipeline.parallel.batch import BatchShape
from pipeline.parallel.ddp import ReplicatedEngine
from pipeline.parallel.ema import Ema
from pipeline.parallel.engine import Engine, PlayerSettings
from pipeline.parallel.ranks import Ranks


def build_players(
    networks: tuple[nn.Module, nn.Module],
    players: tuple[PlayerSettings, PlayerSettings],
    ranks: Ranks,
    batch: BatchShape,
    examples: tuple[tuple[torch.Tensor | None, ...], tuple[torch.Tensor | None, ...]],
) -> tuple[Engine, Engine, Ema]:
    """(G, D), whole on the CPU and equal on all ranks → their engines, and G_ema. Collective.

    examples: small inputs of each player, on the device.
    """
    whole_G = copy.deepcopy(networks[0]).to(ranks.device)
    G, D = (
        ReplicatedEngine(network, player, ranks, batch, example)
        for network, player, example in zip(networks, players, examples, strict=True)
    )
    return G, D, Ema(G, whole_G)
