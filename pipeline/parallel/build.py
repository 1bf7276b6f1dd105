"""From a plain network to a player under the launcher's strategy."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.gan.penalised import check_penalty
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.batch_norm import synchronise
from pipeline.parallel.compiled import CompiledBlocks
from pipeline.parallel.ddp import ReplicatedEngine
from pipeline.parallel.engine import Engine, PlayerSettings
from pipeline.parallel.ranks import Ranks


def build_engine(
    network: nn.Module,
    player: PlayerSettings,
    ranks: Ranks,
    batch: BatchShape,
    example: tuple[torch.Tensor | None, ...],
) -> Engine:
    """A network, whole on the CPU and equal on all ranks → its engine. Collective.

    example: small inputs of the network, on the device. Raises UserError for a penalty that covers nothing.
    """
    check_penalty(player.name, network, player.penalty, player.penalised)
    synchronise(network, ranks.world)
    engine = _wrapped(network, player, ranks, batch, example)
    if ranks.compilation is not None:
        engine.compiled = CompiledBlocks(network, ranks.compilation)
    return engine


def _wrapped(
    network: nn.Module,
    player: PlayerSettings,
    ranks: Ranks,
    batch: BatchShape,
    example: tuple[torch.Tensor | None, ...],
) -> Engine:
    # Imported only where needed: FSDP alone takes half as long as torch, DeepSpeed longer.
    if ranks.strategy in ("fsdp2", "hsdp"):
        from pipeline.parallel.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(network, player, ranks, batch)
    if ranks.strategy.startswith("zero"):
        from pipeline.parallel.zero import ZeroEngine

        return ZeroEngine(network, player, ranks, batch)
    return ReplicatedEngine(network, player, ranks, batch, example)
