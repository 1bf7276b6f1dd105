"""`shardgan bench memory`: what each strategy holds per rank and sends per update, beside what it should."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from launch.processes import STRATEGIES
from launch.workers import Found, launches, measure, resnet_pair, show_progress

_MIB = 2**20
_HELD = ("weights", "optimizer", "G_ema", "gradients")


@click.command("memory")
@click.option("--strategies", default=",".join(STRATEGIES), show_default=True, metavar="S,…")
@click.option("--procs", default="2", show_default=True, metavar="N,…", help="Worlds; single is one process.")
@click.option("--params", type=float, default=50e6, show_default=True, help="Of each player, at least.")
@click.option("--size", type=click.Choice(["32", "64", "128", "256"]), default="32", show_default=True)
@click.option("--images", type=click.IntRange(1), default=1, show_default=True, help="Per process.")
def command(strategies: str, procs: str, params: float, size: str, images: int) -> None:
    """MiB per rank of weights, optimizer state, G_ema and gradients, and MiB sent per rank and update.

    Trains a residual pair for three updates on made-up images. Prints a line of JSON per launch, then a
    table: measured, and in brackets what theory says.
    """
    found = []
    for strategy, world in launches(strategies, [int(n) for n in procs.split(",")]):
        show_progress(strategy, world)
        settings = resnet_pair(params, int(size), images, world)
        found.append(measure(strategy, world, "launch.bench.memory_worker", settings))
        click.echo(json.dumps(found[-1]))
    _report(found, Console(width=110))


def held(found: Found) -> dict[str, float]:
    """Bytes on one rank at the moment of D's or G's step, whichever holds more."""
    steps = found["at_step_D"], found["at_step_G"]
    names = {
        "gradients": "other"
    }  # all that is neither weights, optimizer nor average: gradients and buckets
    return {name: max(step[names.get(name, name)] for step in steps) for name in _HELD}


def held_in_theory(found: Found) -> dict[str, float]:
    """Bytes of fp32 numbers on one rank: Rajbhandari et al. 2020 (ZeRO), section 5, with G_ema beside it.

    Adam's two moments; the gradient of the player that steps, but DDP's buckets and ZeRO 3's flat gradients
    keep both players'. ZeRO's masters are a copy of its parameters also where both are fp32. FSDP2 keeps both
    players gathered in a turn.
    """
    G, D, n = 4 * found["parameters_G"], 4 * found["parameters_D"], found["world"]
    both, larger, strategy = G + D, max(G, D), found["strategy"]
    part = 1 if strategy in ("single", "ddp") else 1 / n
    weights = {"zero1": 1 + part, "zero2": 1 + part, "zero3": 2 * part, "fsdp2": 1 + part}.get(strategy, 1)
    gradients = both if strategy == "ddp" and n > 1 else both * part if strategy == "zero3" else larger * part
    return {
        "weights": both * weights,
        "optimizer": 2 * both * part,
        "G_ema": G * part,
        "gradients": gradients,
    }


def sent_in_theory(found: Found) -> float:
    """Bytes that one rank sends per update, collectives as rings.

    DDP: an all-reduce of each gradient. ZeRO 1 and 2: a reduce and a gather of each player. FSDP2: a reduce
    of each, a gather for every turn it takes part in. ZeRO 3: the same, but a gather for every pass: G
    forward in D's turn, forward and backward in its own; D twice each way in its own turn, once in G's.
    """
    G, D, n = 4 * found["parameters_G"], 4 * found["parameters_D"], found["world"]
    each = {"fsdp2": (3, 3), "zero3": (4, 7)}.get(found["strategy"], (2, 2))
    return float((each[0] * G + each[1] * D) * (n - 1) / n)


def _report(found: list[Found], console: Console) -> None:
    sizes = " and ".join(f"{p} {found[0][f'parameters_{p}'] / 1e6:.1f} M" for p in "GD")
    table = Table(title=f"MiB per rank; {sizes} parameters in fp32, Adam")
    table.add_column()
    for heading in (*_HELD, "held in all", "sent per update"):
        table.add_column(heading, justify="right")
    for f in found:
        measured, theory = held(f), held_in_theory(f)
        cells = [(measured[name], theory[name]) for name in _HELD]
        cells.append((sum(measured.values()), sum(theory.values())))
        cells.append((sum(f["sent"].values()), sent_in_theory(f)))
        row = (f"{mine / _MIB:.1f} ({due / _MIB:.1f})" for mine, due in cells)
        table.add_row(f"{f['strategy']} x{f['world']}", *row)
    console.print(table)
    console.print(
        "Measured (theory). Held while a player steps, activations gone; gradients: with buckets and "
        "everything else."
    )
