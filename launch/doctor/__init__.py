"""`shardgan doctor`: what would go wrong, said before an allocation is spent on finding out.

Each check is a function from a job to findings, in a file by what it looks at; `examine` runs them all, here
and before a job is submitted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.processes import ACCELERATE_FILES, STRATEGIES, default_procs

if TYPE_CHECKING:
    from rich.console import Console

    from launch.doctor.finding import Finding, Job
    from pipeline.config import Config

Progress = Callable[[int, int], None]  # (bytes read, bytes to read)

_TYPES = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}  # distributed_type; the others: DEEPSPEED


@click.command()
@click.argument("config", type=click.Path())
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--gpus", type=click.IntRange(1), help="Processes per node. Default: as `shardgan train`.")
@click.option("--strategy", type=click.Choice(STRATEGIES), help="Default: ddp (one process: single).")
@click.option("--mixed_precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--live", is_flag=True, help="Start the processes, too: do they meet, and see the same?")
def doctor(
    config: str,
    settings: tuple[str, ...],
    nodes: int,
    gpus: int | None,
    strategy: str | None,
    mixed_precision: str,
    live: bool,
) -> None:
    """Look at everything about a training that can be known before it starts.

    Reads all shards, builds the networks without memory, and trains nothing. With --live it also starts the
    processes, here or on the nodes of the Slurm allocation that it is called in, compares what they see and
    measures how fast they talk. Exit status 2 if something would fail.
    """
    from rich.console import Console

    from launch.doctor.finding import would_fail
    from pipeline import config as configs

    console = Console()
    try:
        resolved = configs.load(config, settings)
    except configs.UserError as error:
        found = [would_fail("config", str(error))]
    else:
        job = job_of(resolved, nodes, gpus, strategy, mixed_precision)
        with bar() as progress:
            found = examine(job, progress)
        if live:
            from launch.doctor import live as doctor_live

            found += doctor_live.examine(job, config, settings)
    show(found, console)
    sys.exit(2 if fails(found) else 0)


def job_of(
    settings: Config,
    nodes: int = 1,
    gpus: int | None = None,
    strategy: str | None = None,
    precision: str = "no",
) -> Job:
    """A job with the defaults of `shardgan train` where nothing is said."""
    from launch.doctor.finding import Job

    gpus = gpus or default_procs(strategy)
    return Job(settings, nodes, gpus, strategy or ("single" if nodes * gpus == 1 else "ddp"), precision)


def examine(job: Job, progress: Progress = lambda done, total: None) -> list[Finding]:
    """All checks that need no other process. `progress` hears how far the shards are read."""
    from launch.doctor import data as doctor_data
    from launch.doctor import memory as doctor_memory
    from launch.doctor import networks as doctor_networks
    from launch.doctor import place as doctor_place
    from launch.doctor import surroundings as doctor_surroundings

    index, data = doctor_data.examine(job, progress)
    players, networks = doctor_networks.examine(job, index)
    found = [*_config(job), *_launcher(job), *_batch(job), *data, *networks]
    if players is not None:
        num_classes = index.num_classes if index is not None and job.config.data.conditional else 0
        found += [*doctor_memory.examine(job, players, num_classes), *doctor_place.space(job, players, index)]
    return [*found, *doctor_surroundings.examine(job), *doctor_place.examine(job)]


def fails(found: Sequence[Finding]) -> bool:
    return any(finding.verdict == "would fail" for finding in found)


def show(found: Sequence[Finding], console: Console) -> None:
    """The findings as a table, and how many of them matter."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warning": "yellow", "would fail": "bold red"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("found, and → what to do", overflow="fold")
    for finding in found:
        text = Text(finding.text)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", "bold")
        table.add_row(finding.check, Text(finding.verdict, styles[finding.verdict]), text)
    console.print(table)
    count = {verdict: sum(f.verdict == verdict for f in found) for verdict in styles}
    outcome = "This would fail." if count["would fail"] else "Nothing found that would fail."
    warnings = f" {count['warning']} warning{'s' * (count['warning'] != 1)}." if count["warning"] else ""
    console.print(f"\n{outcome}{warnings}", markup=False, highlight=False)


def _config(job: Job) -> Iterator[Finding]:
    """That it can be read, or this would not be reached; and what an earlier start of the same run left."""
    from launch.doctor.finding import ok, warning, would_fail
    from pipeline.config import UserError
    from pipeline.run.folder import check_same, finished

    settings = job.config
    folder = Path(settings.run.out) / str(settings.run.name)
    if not settings.run.resume or not folder.exists():
        yield ok("config", f"valid; a new run of {settings.run.total_kimg:g} kimg in {folder}")
        return
    try:
        check_same(settings, folder)
    except UserError as error:
        yield would_fail("config", str(error))
        return
    if finished(folder, settings):
        yield warning("config", f"{folder} is finished", "Raise run.total_kimg, or give another run.name.")
    else:
        yield ok("config", f"valid; the run in {folder} would be resumed")


def _launcher(job: Job) -> Iterator[Finding]:
    """The Accelerate file of the strategy, and processes that it can start."""
    import torch
    import yaml

    from launch.doctor.finding import ok, warning, would_fail
    from pipeline.wording import counted

    path = ACCELERATE_FILES / f"{job.strategy}.yaml"
    try:
        kind = yaml.safe_load(path.read_text())["distributed_type"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        yield would_fail("launcher", f"{path} cannot be read: {error}", "Restore the file.")
        return
    if kind != _TYPES.get(job.strategy, "DEEPSPEED"):
        text = f"{path} says distributed_type {kind}, which is not {job.strategy}"
        yield would_fail("launcher", text, "Restore the file.")
    elif job.strategy == "single" and job.world > 1:
        remedy = "Choose another --strategy."
        yield would_fail("launcher", f"single is one process, not {job.world}", remedy)
    elif 0 < torch.cuda.device_count() < job.gpus and job.nodes == 1:
        text = f"{job.gpus} processes, but this machine has {counted(torch.cuda.device_count(), 'GPU')}"
        yield warning("launcher", text, "Lower --gpus, unless another machine is meant.")
    else:
        yield ok("launcher", f"{job.strategy}, precision {job.precision}: {path.name}")


def _batch(job: Job) -> Iterator[Finding]:
    """How the global batch lies over ranks and rounds, and which rank is where."""
    from launch.doctor.finding import ok, would_fail
    from pipeline.config import UserError
    from pipeline.parallel.batch import batch_shape

    try:
        shape = batch_shape(job.config.data, job.world)
    except UserError as error:
        yield would_fail("batch", str(error))
        return
    yield ok("batch", str(shape))
    yield ok("rank map", "\n".join(_rank_map(job)))


def _rank_map(job: Job) -> Iterator[str]:
    """Which ranks are on which node: by its name, inside an allocation; of many nodes some."""
    from launch.doctor.place import allocated

    names = allocated()
    for node in range(job.nodes):
        if node < 3 or node == job.nodes - 1:
            first, last = node * job.gpus, (node + 1) * job.gpus - 1
            name = names[node] if node < len(names) else f"node {node}"
            yield f"{name}: {f'rank {first}' if first == last else f'ranks {first} to {last}'}"
        elif node == 3:
            yield "…"


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress bar for the bytes of the shards, on stderr, if that is a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("reading shards"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
