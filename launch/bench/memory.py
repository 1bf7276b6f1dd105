"""`shardgan bench memory`: what each strategy holds per rank and sends per update, beside theory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import click
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook

from launch.bench import pair, table
from launch.bench.meter import Traffic, footprint
from launch.bench.pair import Found
from pipeline.gan.frozen import sizes
from pipeline.gan.networks import build_D
from pipeline.parallel import theory
from pipeline.parallel.batch import batch_shape
from pipeline.run.stats import Stats
from pipeline.step import train_step

_MIB = 2**20
_UPDATES = 3  # the first ones allocate, and some strategies learn the order of the layers from them
_HELD = ("weights", "optimizer", "G_ema", "gradients")


@click.command("memory")
@pair.options(images=1)
@click.argument("settings", nargs=-1)
def command(settings: tuple[str, ...], **options: Any) -> None:
    """MiB per rank of weights, optimizer state, G_ema and gradients, and MiB sent per rank and update.

    Trains a residual pair, or a config's pair, for three updates on made-up images, under the penalties in
    SETTINGS (penalty.r2.gamma=1). Prints a line of JSON per launch, then a table: measured, and theory in
    brackets.
    """
    found = pair.measure("launch.bench.memory", more=settings, **options)
    table.show(
        f"MiB per rank; {pair.title(found)} in fp32",
        (*_HELD, "held in all", "sent per update"),
        map(_row, found),
        "Measured (theory). Held while a player steps, activations gone; gradients: with buckets and "
        "everything else.",
    )


def held(found: Found) -> dict[str, float]:
    """Bytes on one rank at the moment of D's or G's step, whichever holds more.

    Gradients: all that is neither weights, optimizer nor average, so buckets as well.
    """
    steps = found["at_step_D"], found["at_step_G"]
    names = {"gradients": "other"}
    return {name: max(step[names.get(name, name)] for step in steps) for name in _HELD}


def in_theory(found: Found) -> tuple[dict[str, float], float]:
    """Bytes held and sent by one rank, by theory."""
    strategy, world, shards = found["strategy"], found["world"], found["shards"]
    trained = found["parameters_G"], found["parameters_D"]
    config = pair.config_of(found["settings"])
    with FakeTensorMode():
        _, frozen = sizes(build_D(config, 0))
    rounds = batch_shape(config.data, world).rounds
    update = theory.update_of(config, rounds, frozen)
    moments = theory.moments_of(config.optim.G), theory.moments_of(config.optim.D)
    due = theory.held(strategy, world, *trained, shards, moments)
    due["weights"] += theory.frozen(strategy, world, frozen, shards)
    return due, theory.sent(strategy, world, *trained, update, shards)


def _row(found: Found) -> list[str]:
    measured, (due, sent) = held(found), in_theory(found)
    cells = [(measured[name], due[name]) for name in _HELD]
    cells += [(sum(measured.values()), sum(due.values())), (sum(found["sent"].values()), sent)]
    name = f"{found['strategy']} x{found['world']}"
    if found["strategy"] == "hsdp":
        name = f"hsdp {found['world'] // found['shards']}x{found['shards']}"
    return [name, *(f"{mine / _MIB:.1f} ({theirs / _MIB:.1f})" for mine, theirs in cells)]


# In a rank


def main(out: Path, settings: list[str]) -> None:
    """Measure under the launcher's strategy; the main rank writes OUT."""
    ranks, gan, reals, found = pair.begin(settings)
    stats = Stats(ranks.device)
    for update in range(_UPDATES - 1):
        train_step(gan, reals, update * gan.batch_size, stats)
    at_step: list[dict[str, int]] = []  # of D, once or more, then of G
    hook = register_optimizer_step_pre_hook(lambda *_: at_step.append(footprint(gan)))
    with Traffic() as traffic:
        train_step(gan, reals, (_UPDATES - 1) * gan.batch_size, stats)
    hook.remove()
    found |= {"at_rest": footprint(gan), "at_step_D": at_step[0], "at_step_G": at_step[-1]}
    found |= {"sent": traffic.sent, "calls": traffic.calls, "losses": stats.reduce(ranks, {}).values}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["peak"] = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else peak
    pair.end(ranks, out, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
