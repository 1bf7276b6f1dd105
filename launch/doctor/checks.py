"""All that doctor checks: functions from a job to findings, here and in a file by what they look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from rich import progress
from rich.console import Console

from launch.doctor import data, memory, networks, place, surroundings
from launch.doctor.finding import Finding, Job, Machine, ok, warning, would_fail
from launch.doctor.forecast import Costs
from launch.processes import ACCELERATE_FILES, default_procs, shards
from pipeline.config import Config, UserError
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.compilation import Compilation, check_compilation
from pipeline.parallel.gpus import gpus, on_gpu
from pipeline.parallel.launched import arithmetic, emulated
from pipeline.run.folder import check_same, finished, refuse_running
from pipeline.run.resume import to_continue_from
from pipeline.wording import counted, in_kimg

Progress = Callable[[int, int], None]  # (bytes read, bytes to read)

# distributed_type; the others: DEEPSPEED
_TYPES = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "hsdp": "FSDP"}


def job_of(
    config: Config,
    nodes: int = 1,
    gpus: int | None = None,
    strategy: str | None = None,
    precision: str = "no",
    machine: Machine = Machine(),  # noqa: B008 (frozen)
    compiled: bool = False,
) -> Job:
    """A job with the defaults of `shardgan train`."""
    gpus = gpus or default_procs(strategy, config.data.batch_size)
    strategy = strategy or ("single" if nodes * gpus == 1 else "ddp")
    return Job(config, nodes, gpus, strategy, precision, machine, compiled)


def examine(
    job: Job, progress: Progress = lambda done, total: None, read: bool = True
) -> tuple[list[Finding], Costs | None]:
    """All checks that need no other process; also returns what training costs, if that can be known.

    progress: called while shards are read. read: every byte of them.
    """
    index, of_data = data.examine(job, progress, read)
    players, flops, of_networks = networks.examine(job, index)
    found = [*_config(job), *launcher(job), *compilation(job), *_batch(job), *of_data, *of_networks]
    costs = None
    if players is not None:
        num_classes = index.num_classes if index is not None and job.config.data.conditional else 0
        active = memory.traced(job, num_classes)
        found += memory.examine(job, players, active)
        found += place.space(job, players, index)
        costs = Costs(players, flops, active if isinstance(active, int) else None)
    return [*found, *surroundings.examine(job), *place.examine(job)], costs


def _config(job: Job) -> Iterator[Finding]:
    """Whether the run can begin or be resumed; the config has been read."""
    config = job.config
    folder = Path(config.run.out) / str(config.run.name)
    if not config.run.resume or not folder.exists():
        yield ok("config", f"valid; a new run of {in_kimg(config.run.total_kimg)} kimg in {folder}")
        return
    try:
        check_same(config, folder)
        if finished(folder, config):
            yield warning(
                "config", f"{folder} is finished", "Raise run.total_kimg, or give another run.name."
            )
            return
        _, damaged = to_continue_from(folder)
    except UserError as error:
        yield would_fail("config", str(error))
        return
    try:
        refuse_running(folder)
    except UserError as error:
        yield warning("config", str(error), "Until then it would be refused.")
    else:
        yield ok("config", f"valid; the run in {folder} would be resumed")
    for complaint in damaged:
        yield warning("checkpoints", complaint, "An older one would be used.")


def launcher(job: Job) -> Iterator[Finding]:
    """The strategy's Accelerate file, and processes that it can start."""
    path = ACCELERATE_FILES / f"{job.strategy}.yaml"
    here = 0 if job.machine.remote else gpus()
    try:
        kind = yaml.safe_load(path.read_text())["distributed_type"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        yield would_fail("launcher", f"{path} cannot be read: {error}", "Restore the file.")
        return
    if kind != _TYPES.get(job.strategy, "DEEPSPEED"):
        text = f"{path} says distributed_type {kind}, which is not {job.strategy}"
        yield would_fail("launcher", text, "Restore the file.")
    elif job.strategy == "single" and job.world > 1:
        text = f"single is one process, not {job.world}"
        yield would_fail("launcher", text, "Choose another --strategy.")
    elif undivided := _undivided(job):
        yield would_fail("launcher", undivided)
    elif 0 < here < job.gpus and job.nodes == 1:
        text = f"{job.gpus} processes, but this machine has {counted(here, 'GPU')}"
        yield warning("launcher", text, "Lower --gpus, unless another machine is meant.")
    else:
        copies = f" of {job.world // job.shards} x {job.shards} ranks" if job.strategy == "hsdp" else ""
        device = torch.device("cuda" if here else "cpu")
        precision = arithmetic(job.precision, device)
        yield ok("launcher", f"{job.strategy}{copies}, precision {precision}: {path.name}")
        if job.nodes == 1 and job.machine == Machine() and (slow := emulated(job.precision, device)):
            yield warning("precision", slow, "Unless another machine is meant.")


def _undivided(job: Job) -> str:
    """Why hsdp cannot divide the world; empty if it can, and for others."""
    try:
        shards(job.strategy, job.world, job.gpus)
    except UserError as error:
        return str(error)
    return ""


def compilation(job: Job) -> Iterator[Finding]:
    """Whether this machine can compile the networks, if they are to be."""
    if not job.compiled:
        return
    how = Compilation("inductor")
    try:
        check_compilation(how, job.strategy, 1, on_gpu())
        yield ok("compiling", f"{how}, one block after another, in the first updates")
    except UserError as error:
        yield would_fail("compiling", str(error))


def _batch(job: Job) -> Iterator[Finding]:
    """How the global batch is divided over ranks and rounds, and which rank is on which node."""
    try:
        yield ok("batch", str(batch_shape(job.config.data, job.world)))
        yield ok("rank map", "\n".join(_rank_map(job)))
    except UserError as error:
        yield would_fail("batch", str(error))


def _rank_map(job: Job) -> Iterator[str]:
    """A line per node, by its name inside an allocation; of many nodes, the first three and the last."""
    names = place.allocated()
    for node in range(job.nodes):
        if node < 3 or node == job.nodes - 1:
            first, last = node * job.gpus, (node + 1) * job.gpus - 1
            name = names[node] if node < len(names) else f"node {node}"
            yield f"{name}: {f'rank {first}' if first == last else f'ranks {first} to {last}'}"
        elif node == 3:
            yield "…"


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress bar for the bytes of the shards, on stderr if that is a terminal."""
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
