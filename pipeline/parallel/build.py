"""From two plain networks to two players under the launcher's strategy."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pipeline.gan.penalised import check_penalty
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
    for network, player in zip(networks, players, strict=True):
        check_penalty(player.name, network, player.penalty, player.penalised)
    whole_G = copy.deepcopy(networks[0], _copies(networks[0])).to(ranks.device)  # before a strategy wraps it
    G, D = (
        _engine(network, player, ranks, batch, example)
        for network, player, example in zip(networks, players, examples, strict=True)
    )
    return G, D, Ema(G, whole_G)


def _copies(network: nn.Module) -> dict[int, torch.Tensor]:
    """For copy.deepcopy, which fails on its own for tensors without memory (launch/doctor/memory.py)."""
    copies: dict[int, torch.Tensor] = {id(b): b.detach().clone() for b in network.buffers()}
    return copies | {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in network.parameters()}


def _engine(
    network: nn.Module,
    player: PlayerSettings,
    ranks: Ranks,
    batch: BatchShape,
    example: tuple[torch.Tensor | None, ...],
) -> Engine:
    # Imported only where needed: FSDP alone takes half as long as torch, DeepSpeed longer.
    if ranks.strategy == "fsdp2":
        from pipeline.parallel.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(network, player, ranks, batch)
    if ranks.strategy.startswith("zero"):
        from pipeline.parallel.zero import ZeroEngine

        return ZeroEngine(network, player, ranks, batch)
    return ReplicatedEngine(network, player, ranks, batch, example)
