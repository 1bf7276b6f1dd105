"""`shardgan selfcheck`: does every strategy train here, with these versions, what plain torch trains?

`accelerate launch` starts each strategy, which runs all cases of the parity matrix (parity.py); plain.py
trains them in one process without our engines. Tests use the same comparison.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch import processes
from launch.processes import STRATEGIES
from pipeline.cores import cores
from pipeline.parallel.gpus import gpus

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from launch.selfcheck.parity import Case

    Tensors = dict[str, torch.Tensor]
    Trained = tuple[Tensors, list[dict[str, float]]]
    Difference = tuple[str, str, float]  # column, what, error

COLUMNS = ("loss", "penalty", "gradient", "parameters", "EMA", "resume")
WEIGHTS = 1e-6  # largest error of any weight after all updates, absolute; relative of weights above 1
VALUES = 1e-5  # of any chart, relative, but never stricter than a tenth of that absolutely
# In bf16 and fp16: of any chart, a few roundings of a number with 8 or 11 bits.
LOW_VALUES = {"bf16": 4 * 2.0**-8, "fp16": 4 * 2.0**-11}
# And of the weights, a part of the way they have moved. More than bits: where a gradient is nearly zero, Adam
# takes a whole step to one side or the other.
LOW_WAY = 0.05
_RESUMED = "resumed/"
_SKIP = "skip"  # a column in bf16 and fp16: is the update that overflows skipped, and no other
# Strategy → a DeepSpeed config that partitions even the smallest parameter.
PARTITION_ALL = {"zero3": Path(__file__).parents[1] / "deepspeed" / "zero3-partition-all.json"}


@click.command()
@click.option("--strategies", help="With commas between them. Default: all.")
@click.option("--procs", type=click.IntRange(min=1), help="Default: one per GPU; on a CPU 2, hsdp 4.")
@click.option("--mixed_precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
def selfcheck(strategies: str | None, procs: int | None, mixed_precision: str) -> None:
    """Train small GANs under every strategy and compare with plain torch, to float32's rounding.

    With --mixed_precision bf16 or fp16 a few cases are compared with float32, to the rounding of fewer bits;
    an update that overflows must be skipped.

    Prints the worst error of each strategy and exits 1 if any is beyond rounding: paste the table into bug
    reports.
    """
    from rich.console import Console

    chosen = processes.parse_strategies(strategies) if strategies else list(STRATEGIES)
    processes.check_gpus(procs)
    here = gpus()
    console, table, failures, missed = Console(), _table(mixed_precision), [], False
    with tempfile.TemporaryDirectory(prefix="shardgan-selfcheck-") as folder:
        for strategy in chosen:
            world = 1 if strategy == "single" else procs or here or (4 if strategy == "hsdp" else 2)
            out = Path(folder) / strategy
            out.mkdir()
            with console.status(f"{strategy}, {world} process{'es' * (world > 1)} …"):
                errors, failure = train_and_judge(
                    strategy, world, out, "cuda" if here else "cpu", mixed_precision
                )
            failures += [failure] if failure else []
            missed |= any(error > tolerance(column, mixed_precision) for column, error in errors.items())
            table.add_row(strategy, str(world), *_cells(errors, mixed_precision))
    console.print(table)
    click.echo(f"{_versions()}; mixed_precision {mixed_precision}")
    for failure in failures:
        click.echo(failure, err=True)
    sys.exit(1 if failures or missed else 0)


def train_and_judge(
    strategy: str, world: int, out: Path, device: str, precision: str
) -> tuple[dict[str, float], str | None]:
    """Train a strategy into `out` and `judge` it; or no errors, and the output of processes that failed."""
    ended = processes.launch(
        strategy,
        world,
        ["launch.selfcheck.parity" if precision == "no" else "launch.selfcheck.low_precision", str(out)],
        on_cpu=device == "cpu",
        deepspeed=PARTITION_ALL.get(strategy),
        precision=precision,
    )
    if ended.returncode:
        return {}, f"{strategy} failed:\n{(ended.stdout + ended.stderr)[-3000:]}"
    return judge(out, strategy, world, device, precision), None


def judge(out: Path, strategy: str, world: int, device: str, precision: str = "no") -> dict[str, float]:
    """Column → the worst error over all cases that a launch wrote to `out`."""
    from launch.selfcheck import low_precision, parity, plain

    low, worst = precision != "no", dict.fromkeys(columns(precision), 0.0)
    for case in low_precision.cases(world) if low else parity.cases(world, strategy):
        trained, reference = read(out, case.name), expected(case, device)
        found = list(differences(trained, reference))
        if low:
            found = [error for error in found if error[0] not in ("parameters", "EMA")]
            found += part_of_the_way(trained[0], reference[0], plain.untrained(case))
        for column, _, error in found:
            worst[column] = max(worst[column], error)
    if low:
        rows = json.loads((out / low_precision.OVERFLOW).read_text())
        worst[_SKIP] = 0.0 if low_precision.skipped_alone(rows, precision) else math.inf
    return worst


def part_of_the_way(trained: Tensors, reference: Tensors, untrained: Tensors) -> Iterator[Difference]:
    """The error of all weights of G, D and G_ema, as a part of how far they have moved."""
    for player in ("G", "D", "G_ema"):
        names = [name for name in reference if name.startswith(f"{player}/")]
        error, way = (
            sum(float((a[name].double() - reference[name].double()).square().sum()) for name in names)
            for a in (trained, untrained)
        )
        part = math.sqrt(error / way) if math.isfinite(error) else math.inf
        yield "EMA" if player == "G_ema" else "parameters", player, part


def read(folder: Path, case: str) -> Trained:
    """What a launch wrote for a case."""
    from safetensors.torch import load_file

    return load_file(folder / f"{case}.safetensors"), json.loads((folder / f"{case}.json").read_text())


@lru_cache
def expected(case: Case, device: str = "cpu") -> Trained:
    """A case trained by plain torch, once."""
    from launch.selfcheck import plain

    if device == "cpu":
        return plain.train(case, device)
    with _exact_kernels():
        return plain.train(case, device)


@contextmanager
def _exact_kernels() -> Iterator[None]:
    """On GPUs: full float32; and, inside, cuDNN's kernels chosen as pipeline/parallel/ranks.py does for the
    training that is compared: such as add in a fixed order, and not by their time."""
    import torch

    from launch.selfcheck import parity

    parity.ieee()
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def differences(trained: Trained, reference: Trained) -> Iterator[Difference]:
    """(column, what, error) of everything that was trained; infinite for NaN and for what is missing."""
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


def columns(precision: str = "no") -> tuple[str, ...]:
    return COLUMNS if precision == "no" else (*COLUMNS, _SKIP)


def tolerance(column: str, precision: str = "no") -> float:
    """The largest error that is rounding."""
    if precision != "no" and column not in ("resume", _SKIP):
        return LOW_WAY if column in ("parameters", "EMA") else LOW_VALUES[precision]
    return WEIGHTS if column in ("parameters", "EMA", "resume") else VALUES


def _column(chart: str) -> str:
    if chart.startswith("Gradients/"):
        return "gradient"
    return "penalty" if chart.endswith("_penalty") else "loss"


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    error = float(((a.double() - b.double()).abs() / b.double().abs().clamp(min=1)).max())
    return error if math.isfinite(error) else math.inf


def _cells(errors: dict[str, float], precision: str) -> list[str]:
    if not errors:
        return ["[red]failed[/red]"] * len(columns(precision))
    cells = []
    for column, error in errors.items():
        number = "" if column == _SKIP else f"{error:.0e} "
        right = error <= tolerance(column, precision)
        cells.append(f"[green]{number}✓[/green]" if right else f"[red]{number}✗[/red]")
    return cells


def _table(precision: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title="Worst error against plain torch", box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False
    )
    for name in ("strategy", "procs", *columns(precision)):
        table.add_column(name, no_wrap=True)
    return table


def _versions() -> str:
    import torch

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "accelerate", "deepspeed")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores()} cores"
    return f"python {platform.python_version()}, {', '.join(versions)}; {device}"
