"""What each strategy holds on a rank and sends, by theory: fp32 weights and gradients.

G and D are numbers of parameters that train, world the number of ranks, shards that of the ranks that share
one copy of a player under hsdp (default: all).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config import Config, Optimizer
from pipeline.gan.schedules import is_used

MESSAGE = 144  # bytes beside the payload that a rank sends for a message of gloo, in three segments


def held(
    strategy: str,
    world: int,
    G: int,
    D: int,
    shards: int | None = None,
    moments: tuple[int, int] = (2, 2),
) -> dict[str, float]:
    """Bytes on one rank while a player steps: Rajbhandari et al. 2020 (ZeRO), section 5, and G_ema.

    moments: per parameter of G and of D (`moments_of`).

    Gradients are those of the player that steps, but DDP's buckets and ZeRO 3's flat gradients hold both
    players'. ZeRO's masters are a copy of its parameters even where both are fp32. FSDP2 keeps both players
    gathered in a turn, and so does hsdp, with a part of 1/shards for 1/world.
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
        "optimizer": 4 * (moments[0] * G + moments[1] * D) * part,
        "G_ema": 4 * G * part,
        "gradients": gradients,
    }


def frozen(strategy: str, world: int, parameters: int, shards: int | None = None) -> float:
    """Bytes on one rank of weights that do not train. FSDP2 keeps them gathered for the turn, as all others,
    beside the rank's part."""
    whole = 0 if strategy == "zero3" else 1
    part = 1 / (shards or world) if strategy in ("fsdp2", "hsdp", "zero3") else 0
    return 4 * parameters * (whole + part)


def moments_of(optimizer: Optimizer) -> int:
    """Numbers that an optimizer keeps per parameter."""
    return int(optimizer.momentum > 0) if optimizer.kind == "sgd" else 2


def flags(world: int) -> tuple[int, int]:
    """Messages and bytes that one rank sends per update for the flags of all ranks (polls.py), under every
    strategy. gloo announces each message of 4 bytes, and answers the announcement of another."""
    messages = (world - 1).bit_length()
    return messages, messages * (MESSAGE + 4)


@dataclass(frozen=True)
class Update:
    """What of an update decides how much is sent; of penalties that are due now and then, their share."""

    rounds: int = 1
    D_steps: int = 1
    paired: bool = False  # G's turn passes real images through D too
    twice_G: float = 0.0  # the share of G's turns whose passes are differentiated twice
    twice_D: float = 0.0
    differences: float = 0.0  # passes of D for finite differences, in a turn
    frozen: int = 0  # D's parameters that do not train, besides those that do


def update_of(config: Config, rounds: int, frozen: int = 0) -> Update:
    """A config's, with lazy penalties at their average."""
    penalty = config.penalty
    slopes = [slope for slope in (penalty.r1, penalty.r2) if is_used(slope.gamma)]
    exact = [slope.interval for slope in slopes if not slope.sigma] + [1] * (penalty.wgan_gp.weight > 0)
    due = sum(1 / interval for interval in exact)
    if len(exact) > 1:  # some turns have both
        due = 1.0 if 1 in exact else due - 1 / math.lcm(*exact)
    return Update(
        rounds,
        config.loss.D_steps,
        paired=config.loss.kind == "relativistic",
        twice_G=1 / penalty.path.interval if penalty.path.weight else 0.0,
        twice_D=due,
        differences=sum(1 / slope.interval for slope in slopes if slope.sigma),
        frozen=frozen,
    )


ONE_ROUND = Update()


def sent(
    strategy: str, world: int, G: int, D: int, update: Update = ONE_ROUND, shards: int | None = None
) -> float:
    """Bytes that one rank sends per update, in any precision, with collectives as rings.

    DDP: an all-reduce, which is a reduce and a gather, of each step's gradients. ZeRO 1 and 2: a reduce and
    a gather of each player that steps, but stage 2 reduces in every round. FSDP2: a reduce of it, and a
    gather for every turn that a player takes part in; hsdp does that within a copy, and sends `over_copies`
    besides.

    ZeRO 3 gathers for every pass of every round instead: G forward in D's turn, forward and backward in its
    own; D twice each way in its own turn, once in G's, and forward once more for each pair or finite
    difference. But what a turn differentiates twice it gathers once for all passes. For small networks this
    is the most: DeepSpeed keeps some of what it will need again soon.
    """
    rounds, turns = update.rounds, update.D_steps
    reduces_G, reduces_D, gathers_G, gathers_D = 1.0, float(turns), 1.0, float(turns)
    frozen = update.frozen if strategy in ("fsdp2", "hsdp", "zero3") else 0
    if strategy in ("fsdp2", "hsdp"):
        gathers_G = gathers_D = turns + 1.0
    elif strategy in ("zero2", "zero3"):
        reduces_G, reduces_D = rounds * reduces_G, rounds * reduces_D
    if strategy == "zero3":
        own_G = update.twice_G + (1 - update.twice_G) * rounds * 2
        own_D = update.twice_D + (1 - update.twice_D) * rounds * (4 + update.differences)
        gathers_G = rounds * turns + own_G
        gathers_D = turns * own_D + rounds * (2 + update.paired)
    numbers = reduces_G * G + reduces_D * D + gathers_G * G + gathers_D * (D + frozen)
    sharing = shards or world
    other = over_copies(strategy, world, G, D, update, sharing)
    return 4 * numbers * (sharing - 1) / sharing + other


def over_copies(strategy: str, world: int, G: int, D: int, update: Update, shards: int) -> float:
    """Of what a rank sends per update, the bytes to other copies, which are on other nodes: under hsdp an
    all-reduce of its parts of the gradients."""
    copies = world // shards if strategy == "hsdp" else 1
    return 2 * 4 * (G + update.D_steps * D) / shards * (copies - 1) / copies
