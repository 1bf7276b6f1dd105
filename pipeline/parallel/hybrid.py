"""Hybrid sharding: each copy of a player is sharded over neighbouring ranks, by default those of a node."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import UserError
from pipeline.parallel.environment import whole_number

_SHARD, _COPIES = "parallelism_config_dp_shard_size", "parallelism_config_dp_replicate_size"


def read_shards(env: Mapping[str, str], world: int) -> int:
    """The number of ranks that share one copy, by the launcher's parallelism settings and ranks per node.

    Raises UserError for settings that ask for something else, and for a world that does not divide.
    """
    for kind in ("TP", "CP", "SP"):
        if whole_number(env, f"PARALLELISM_CONFIG_{kind}_SIZE", 1) > 1:
            raise UserError(
                f"parallelism_config_{kind.lower()}_size: players can be sharded and replicated, but "
                "not divided in other ways. Leave it at 1."
            )
    shards, copies = (
        whole_number(env, f"PARALLELISM_CONFIG_DP_{kind}_SIZE", 1) for kind in ("SHARD", "REPLICATE")
    )
    return shards_of(world, whole_number(env, "LOCAL_WORLD_SIZE", world), shards, copies)


def shards_of(world: int, per_node: int, shards: int = 1, copies: int = 1) -> int:
    """How many of `world` ranks share one copy of a player.

    shards, copies: Accelerate's dp_shard_size and dp_replicate_size. 1, its default, leaves it to the other
    one, or to the number of ranks per node. Raises UserError if the world does not divide.
    """
    given = [f"{name}: {size}" for name, size in ((_SHARD, shards), (_COPIES, copies)) if size > 1]
    wanted = shards if shards > 1 else max(1, world // copies) if copies > 1 else per_node
    if wanted * (copies if copies > 1 else world // wanted) != world:
        raise UserError(
            f"hsdp: {world} processes, {per_node} on a node, cannot be divided by "
            f"{' and '.join(given) or 'equal nodes'}. Their number must be that of the copies times that of "
            f"the processes that share one ({_SHARD}; default: those of a node)."
        )
    if wanted == 1 < world:
        whose = "per copy" if copies > 1 else "per node"
        raise UserError(
            f"hsdp: one process {whose} has nothing to share. Use ddp, or fsdp2, which shards over all "
            f"{world} processes, or set {_SHARD}."
        )
    return wanted
