"""What `shardgan bench memory` and `bench penalty` train: a residual pair or a config's, on made-up images.

The command starts a module of ours on each strategy's processes and reads the JSON that their main rank
wrote.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import torch

from launch.installed import config_path
from launch.processes import STRATEGIES, launch, parse_strategies, reasons
from pipeline.config import Config, UserError, load
from pipeline.data.stream import Batch
from pipeline.gan.resnet import Discriminator
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.gpus import on_gpu
from pipeline.parallel.launched import read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.players import Gan, build
from pipeline.wording import counted, in_millions

Found = dict[str, Any]

NO_CONFIG = "-"


def options(images: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a command that measures the pair, to be passed on to `measure`."""
    sizes = click.Choice(["32", "64", "128", "256"])
    found = (
        click.option("--strategies", default=",".join(STRATEGIES), show_default=True, metavar="S,…"),
        click.option(
            "--procs",
            default="2",
            show_default=True,
            metavar="N,…",
            help="Except for single; hsdp: as on two nodes.",
        ),
        click.option(
            "--params",
            type=click.FloatRange(1, 1e12),
            default=50e6,
            show_default=True,
            help="Of each player, at least.",
        ),
        click.option("--size", type=sizes, default="32", show_default=True),
        click.option(
            "--images", type=click.IntRange(1), default=images, show_default=True, help="Per process."
        ),
        click.option("--config", metavar="CONFIG", help="Train its networks, in place of the residual pair."),
    )

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(found):
            command = option(command)
        return command

    return decorated


def measure(
    module: str,
    *arguments: str,
    strategies: str,
    procs: str,
    params: float,
    size: str,
    images: int,
    config: str | None,
    more: Sequence[str] = (),
) -> list[Found]:
    """Launch `python -m module OUT *arguments SETTINGS… *more` under each strategy; returns the JSON in OUT.

    Prints each as a line; what is running goes to stderr. Raises UserError with the processes' errors
    if they fail.
    """
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", procs):
        raise UserError(f"--procs {procs}: give numbers from 1, with commas between them.")
    found = []
    for strategy, world in launches(strategies, [int(n) for n in procs.split(",")]):
        click.echo(f"{strategy} on {world} …", err=True)
        batch = images * world
        path = config_path(config) if config else NO_CONFIG
        pair = _as_made_up(batch) if config else settings(params, int(size), batch)
        found.append(_measured(strategy, world, [module, *arguments], [path, *pair, *more]))
        click.echo(json.dumps(found[-1]))
    return found


def launches(strategies: str, worlds: list[int]) -> list[tuple[str, int]]:
    """(strategy, processes) from a comma list of strategies: `single` once, the others in every world."""
    return [(s, n) for s in parse_strategies(strategies) for n in ([1] if s == "single" else worlds)]


def settings(parameters: float, size: int, batch: int) -> list[str]:
    """Settings of a residual pair with at least `parameters` in each player."""
    width = 8
    with torch.device("meta"):
        while (
            sum(p.numel() for p in Discriminator(size=size, channels=3, width=width).parameters())
            < parameters
        ):
            width = max(width + 8, int(width * 1.1) // 8 * 8)
    return [
        *("data.train=none", f"data.size={size}", f"data.batch_size={batch}"),
        *(f"{player}.{key}" for player in "GD" for key in ("kind=resnet", f"width={width}")),
        *("D.norm=none", "loss.kind=hinge", "penalty.l2=1e-6"),
    ]


def _as_made_up(batch: int) -> list[str]:
    """Settings of a config whose networks are trained on made-up images without labels, in one round."""
    rounds = ("data.batch_gpu=null", f"data.batch_size={batch}", "loss.D_steps=1")
    return ["data.train=none", "data.conditional=false", *rounds]


def config_of(pair: Sequence[str]) -> Config:
    """The config that is trained. pair: its file, if any, and the settings, as `Found` has them."""
    path, *settings = pair
    return load(None if path == NO_CONFIG else path, settings)


def title(found: list[Found]) -> str:
    return " and ".join(f"{p} {in_millions(found[0][f'parameters_{p}'])}" for p in "GD") + " parameters"


def _measured(strategy: str, world: int, module: list[str], pair: list[str]) -> Found:
    with tempfile.TemporaryDirectory(prefix="shardgan-") as folder:
        out = Path(folder) / "out.json"
        line = [module[0], str(out), *module[1:], *pair]
        ended = launch(strategy, world, line, on_cpu=not on_gpu())
        if ended.returncode or not out.exists():
            why = "\n".join(reasons(ended.stdout + ended.stderr))
            raise UserError(f"{strategy} on {counted(world, 'process')} failed ({ended.returncode}):\n{why}")
        found: Found = json.loads(out.read_text())
        return found


# In a rank


def begin(pair: list[str]) -> tuple[Ranks, Gan, Iterator[Batch], Found]:
    """Meet the others and build the pair: (ranks, players, this rank's endless batches, first findings)."""
    ranks = Ranks(read_launch(), timedelta(seconds=600))
    config = config_of(pair)
    shape, size = batch_shape(config.data, ranks.world), config.data.size
    gan = build(config, ranks, shape)
    images = torch.randint(0, 256, (shape.local, config.data.channels, size, size), dtype=torch.uint8)
    shards = ranks.shards if ranks.strategy == "hsdp" else None
    found: Found = {"strategy": ranks.strategy, "world": ranks.world, "shards": shards, "settings": pair}
    for engine in (gan.G, gan.D):
        found[f"parameters_{engine.player.name}"] = sum(f.shape.numel() for f in engine.fragments)
    return ranks, gan, itertools.repeat(Batch(images, None)), found


def end(ranks: Ranks, out: Path, found: Found) -> None:
    if ranks.main:
        out.write_text(json.dumps(found))
    ranks.leave()
