"""What each strategy holds on a rank and sends, by theory: fp32, Adam, one round per update.

G and D are numbers of parameters, world the number of ranks, shards that of the ranks that share one copy of
a player under hsdp (default: all).
"""

from __future__ import annotations


def held(strategy: str, world: int, G: int, D: int, shards: int | None = None) -> dict[str, float]:
    """Bytes on one rank while a player steps: Rajbhandari et al. 2020 (ZeRO), section 5, and G_ema.

    Adam has two moments. Gradients are those of the player that steps, but DDP's buckets and ZeRO 3's flat
    gradients hold both players'. ZeRO's masters are a copy of its parameters even where both are fp32. FSDP2
    keeps both players gathered in a turn, and so does hsdp, with a part of 1/shards for 1/world.
    """
    both, larger = 4 * (G + D), 4 * max(G, D)
    part = 1 if strategy in ("single", "ddp") else 1 / (shards or world)
    weights = 1 + part if strategy in ("zero1", "zero2", "fsdp2", "hsdp") else 1.0
    gradients = larger * part
    if strategy == "zero3":
        weights = 2 * part
    if strategy == "zero3" or (strategy == "ddp" and world > 1):
        gradients = both * part
    return {
        "weights": both * weights,
        "optimizer": 2 * both * part,
        "G_ema": 4 * G * part,
        "gradients": gradients,
    }


def sent(strategy: str, world: int, G: int, D: int, twice: bool = False, shards: int | None = None) -> float:
    """Bytes that one rank sends per update, with collectives as rings.

    DDP: an all-reduce of each gradient. ZeRO 1 and 2: a reduce and a gather of each player. FSDP2: a reduce
    of each, and a gather for every turn it takes part in; hsdp does that within a copy, and sends
    `over_copies` besides. ZeRO 3 gathers for every pass instead: G forward in D's turn, forward and backward
    in its own; D twice each way in its own turn, once in G's. But where gradient penalties differentiate D's
    passes twice, it gathers D once for all of them.
    """
    sharing = shards or world
    fsdp2 = (3, 3)
    times_G, times_D = {"fsdp2": fsdp2, "hsdp": fsdp2, "zero3": (4, 4 if twice else 7)}.get(strategy, (2, 2))
    within = 4 * (times_G * G + times_D * D) * (sharing - 1) / sharing
    return within + (over_copies(world, G, D, sharing) if strategy == "hsdp" else 0)


def over_copies(world: int, G: int, D: int, shards: int) -> float:
    """Of what hsdp sends, the bytes to other copies, and so to other nodes: an all-reduce of the gradients of
    a rank's parts."""
    copies = world // shards
    return 2 * 4 * (G + D) / shards * (copies - 1) / copies
