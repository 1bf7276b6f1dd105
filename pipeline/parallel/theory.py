"""What each strategy holds on a rank and sends, by theory: fp32, Adam, one round per update.

G and D are numbers of parameters, world the number of ranks.
"""

from __future__ import annotations

MESSAGE = 144  # bytes beside the payload that a rank sends for a message of gloo, in three segments


def held(strategy: str, world: int, G: int, D: int) -> dict[str, float]:
    """Bytes on one rank while a player steps: Rajbhandari et al. 2020 (ZeRO), section 5, and G_ema.

    Adam has two moments. Gradients are those of the player that steps, but DDP's buckets and ZeRO 3's flat
    gradients hold both players'. ZeRO's masters are a copy of its parameters even where both are fp32. FSDP2
    keeps both players gathered in a turn.
    """
    both, larger = 4 * (G + D), 4 * max(G, D)
    part = 1 if strategy in ("single", "ddp") else 1 / world
    weights = {"zero1": 1 + part, "zero2": 1 + part, "zero3": 2 * part, "fsdp2": 1 + part}.get(strategy, 1)
    gradients = larger * part
    if strategy == "zero3" or (strategy == "ddp" and world > 1):
        gradients = both * part
    return {
        "weights": both * weights,
        "optimizer": 2 * both * part,
        "G_ema": 4 * G * part,
        "gradients": gradients,
    }


def flags(world: int) -> tuple[int, int]:
    """Messages and bytes that one rank sends per update for the flags of all ranks (polls.py), under every
    strategy. gloo announces each message of 4 bytes, and answers the announcement of another."""
    messages = (world - 1).bit_length()
    return messages, messages * (MESSAGE + 4)


def sent(strategy: str, world: int, G: int, D: int, twice: bool = False) -> float:
    """Bytes that one rank sends per update, with collectives as rings.

    DDP: an all-reduce of each gradient. ZeRO 1 and 2: a reduce and a gather of each player. FSDP2: a reduce
    of each, and a gather for every turn it takes part in. ZeRO 3 gathers for every pass instead: G forward in
    D's turn, forward and backward in its own; D twice each way in its own turn, once in G's. But where
    gradient penalties differentiate D's passes twice, it gathers D once for all of them.
    """
    times_G, times_D = {"fsdp2": (3, 3), "zero3": (4, 4 if twice else 7)}.get(strategy, (2, 2))
    return 4 * (times_G * G + times_D * D) * (world - 1) / world
