"""`shardgan selfcheck`: does every strategy train here, with these versions, what plain torch trains?

Each strategy is started as in earnest, by `accelerate launch`, and runs all cases of the parity matrix
(launch/parity.py); launch/plain.py trains them in one process without any of our engines. The tests judge
by the same comparison.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch import workers
from launch.train import STRATEGIES, cores

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from launch.parity import Case

    Trained = tuple[dict[str, torch.Tensor], list[dict[str, float]]]

COLUMNS = ("loss", "penalty", "gradient", "parameters", "EMA", "resume")
WEIGHTS = 1e-6  # largest error of any weight after all updates, absolute
VALUES = 1e-5  # of any chart, relative, but never stricter than a tenth of that absolutely
_RESUMED = "resumed/"
# Strategy → a DeepSpeed config with which even the smallest parameter is partitioned, as theirs are.
PARTITION_ALL = {"zero3": Path(__file__).parent / "deepspeed" / "zero3-partition-all.json"}


@click.command()
@click.option("--strategies", help="With commas between them. Default: all six.")
@click.option("--procs", type=click.IntRange(min=1), help="Default: one per GPU; on a CPU 2.")
def selfcheck(strategies: str | None, procs: int | None) -> None:
    """Train small GANs under every strategy and compare with plain torch, to float32's rounding.

    Prints the worst error of each strategy and exits 1 if any is beyond rounding: paste the table into bug
    reports.
    """
    import torch
    from rich.console import Console

    from pipeline.config import UserError

    chosen = strategies.split(",") if strategies else list(STRATEGIES)
    if unknown := set(chosen) - set(STRATEGIES):
        raise UserError(f"--strategies {','.join(sorted(unknown))}: there are {', '.join(STRATEGIES)}.")
    gpus = torch.cuda.device_count()
    if gpus and (procs or 1) > gpus:
        raise UserError(f"--procs {procs}, but this machine has {gpus} GPUs.")
    procs = procs or gpus or 2
    console, table, failures, missed = Console(), _table(), [], False
    with tempfile.TemporaryDirectory(prefix="shardgan-selfcheck-") as folder:
        for strategy in chosen:
            world = 1 if strategy == "single" else procs
            out = Path(folder) / strategy
            out.mkdir()
            with console.status(f"{strategy}, {world} process{'es' * (world > 1)} …"):
                module = ["launch.parity", str(out)]
                deepspeed = PARTITION_ALL.get(strategy)
                ended = workers.launch(strategy, world, module, on_cpu=not gpus, deepspeed=deepspeed)
                errors = (
                    judge(out, strategy, world, "cuda" if gpus else "cpu") if ended.returncode == 0 else {}
                )
            if ended.returncode:
                failures.append(f"{strategy} failed:\n{(ended.stdout + ended.stderr)[-3000:]}")
            missed |= any(error > tolerance(column) for column, error in errors.items())
            table.add_row(strategy, str(world), *_cells(errors))
    console.print(table)
    click.echo(_versions(procs))
    for failure in failures:
        click.echo(failure, err=True)
    sys.exit(1 if failures or missed else 0)


def judge(out: Path, strategy: str, world: int, device: str) -> dict[str, float]:
    """Column → the worst error over all cases that a launch wrote to `out`."""
    from launch import parity

    worst = dict.fromkeys(COLUMNS, 0.0)
    for case in parity.cases(world, strategy):
        for column, _, error in differences(read(out, case.name), expected(case, device)):
            worst[column] = max(worst[column], error)
    return worst


def read(folder: Path, case: str) -> Trained:
    """What a launch wrote of a case."""
    from safetensors.torch import load_file

    return load_file(folder / f"{case}.safetensors"), json.loads((folder / f"{case}.json").read_text())


@lru_cache
def expected(case: Case, device: str = "cpu") -> Trained:
    """What plain torch makes of a case; trained once."""
    from launch import parity, plain

    if device != "cpu":
        parity.ieee()
    return plain.train(case, device)


def differences(trained: Trained, reference: Trained) -> Iterator[tuple[str, str, float]]:
    """(column, what, error) of everything that was trained; nan and what is missing are infinitely wrong."""
    (weights, rows), (true_weights, true_rows) = trained, reference
    unbroken = {name for name in weights if not name.startswith(_RESUMED)}
    if len(rows) != len(true_rows) or unbroken != true_weights.keys():
        yield "parameters", "other weights, or another number of updates", math.inf
        return
    for name, tensor in true_weights.items():
        yield "EMA" if name.startswith("G_ema") else "parameters", name, _apart(weights[name], tensor)
        if f"{_RESUMED}{name}" in weights:
            yield "resume", name, _apart(weights[f"{_RESUMED}{name}"], weights[name])
    for update, (row, true_row) in enumerate(zip(rows, true_rows, strict=True), start=1):
        for chart, value in true_row.items():
            error = abs(row.get(chart, math.inf) - value) / (abs(value) + 0.1)
            yield _column(chart), f"{chart} in update {update}", error if math.isfinite(error) else math.inf


def tolerance(column: str) -> float:
    """The largest error that is rounding."""
    return WEIGHTS if column in ("parameters", "EMA", "resume") else VALUES


def _column(chart: str) -> str:
    if chart.startswith("Gradients/"):
        return "gradient"
    return "penalty" if chart.endswith("_penalty") else "loss"


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    error = float((a.double() - b.double()).abs().max())
    return error if math.isfinite(error) else math.inf


def _cells(errors: dict[str, float]) -> list[str]:
    if not errors:
        return ["[red]failed[/red]"] * len(COLUMNS)
    return [
        f"[green]{error:.0e} ✓[/green]" if error <= tolerance(column) else f"[red]{error:.0e} ✗[/red]"
        for column, error in errors.items()
    ]


def _table() -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title="Worst error against plain torch", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("strategy", "procs", *COLUMNS):
        table.add_column(name, no_wrap=True)
    return table


def _versions(procs: int) -> str:
    import torch

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "accelerate", "deepspeed")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores()} cores"
    return f"python {platform.python_version()}, {', '.join(versions)}; {device}; world {procs}"
