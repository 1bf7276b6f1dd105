"""`shardgan submit`: check a training, and submit it to Slurm with the code and config as they are now."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.processes import STRATEGIES, shards
from pipeline.wording import counted

if TYPE_CHECKING:
    from launch.slurm.jobs import BatchJob, Resources
    from launch.training import Training
    from pipeline.config import Config


class _BeforeDashes(click.Command):
    """Leaves what follows `--` to sbatch, in ctx.obj."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.obj = args[at + 1 :]
        return super().parse_args(ctx, args[:at])


@click.command(cls=_BeforeDashes)
@click.argument("config", type=click.Path(), metavar="CONFIG|FOLDER|ZIP|RUN")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]... [-- SBATCH_OPTIONS]")
@click.option("--nodes", type=click.IntRange(min=1), required=True)
@click.option("--gpus", type=click.IntRange(min=0), required=True, help="Per node; 0: train on CPUs.")
@click.option("--procs", type=click.IntRange(min=1), help="Processes per node. Default: one per GPU, else 1.")
@click.option(
    "--cpus", type=click.IntRange(min=1), help="CPUs per node. Default: those processes and loaders need."
)
@click.option("--strategy", type=click.Choice(STRATEGIES), help="Default: ddp (one process: single).")
@click.option("--mixed_precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="As in `shardgan train`.")
@click.option(
    "--time", help="Limit of each job, as sbatch takes it; it requeues itself until the run is DONE."
)
@click.option("--partition", help="Default: the cluster's.")
@click.option("--account", help="Default: yours.")
@click.option(
    "--check",
    type=click.Choice(["full", "quick"]),
    default="full",
    show_default=True,
    help="full reads all shards on this machine; quick only their index.",
)
@click.option("--dry-run", is_flag=True, help="Print the batch file; write and submit nothing.")
@click.pass_obj
def submit(
    sbatch: list[str],
    config: str,
    settings: tuple[str, ...],
    nodes: int,
    gpus: int,
    procs: int | None,
    cpus: int | None,
    strategy: str | None,
    mixed_precision: str,
    compiled: bool,
    time: str | None,
    partition: str | None,
    account: str | None,
    check: str,
    dry_run: bool,
) -> None:
    """Train on a Slurm cluster what `shardgan train` would train here.

    The same command again resumes a run that is not DONE.

    Everything is checked first, as by `shardgan doctor`. Give further options of sbatch after --, as in
    -- --mem=64G --gpus-per-node=a100:8 --qos=high --mail-type=END, and those of the job by SHARDGAN_*
    variables: see slurm/README.md.
    """
    from launch.argument import training_of
    from launch.slurm import jobs
    from pipeline.config import load
    from pipeline.run.folder import finished, under_a_free_name

    training = training_of(config, settings, gpu=gpus > 0)
    training.explain()
    given = load(training.config, training.settings)
    resolved = under_a_free_name(given)
    procs = procs or gpus or 1
    cpus = _enough(cpus, procs, resolved.data.workers)
    asked = (strategy, mixed_precision, time, partition, account, compiled)
    resources = jobs.Resources(nodes, gpus, procs, cpus, *asked)
    run = _run_of(resolved)
    if finished(run, resolved):
        click.echo(f"{run} is finished (its DONE file says so). Nothing to submit.")
        return
    _refuse_queued(run)
    jobs.refuse_credentials([str(resolved.data.train)])
    options = jobs.parse_options(sbatch)
    _, batch = _next_job(run, resources, options)
    if not dry_run:
        jobs.check(batch)
        training.prepare()
    _examine(training, resolved, run, resources, read=check == "full")
    if dry_run:
        click.echo(batch.text, nl=False)
        return
    _submit(given, resources, options)


def _submit(given: Config, resources: Resources, options: Mapping[str, str | None]) -> None:
    """Submit what has been checked, or refuse what another has submitted meanwhile."""
    from launch.slurm import jobs
    from pipeline.config import dump
    from pipeline.lock import turn
    from pipeline.run.folder import under_a_free_name

    with turn(_run_of(given).parent / ".submit", click.echo):
        config = under_a_free_name(given)
        run = _run_of(config)
        _refuse_queued(run)
        folder, batch = _next_job(run, resources, options)
        jobs.write(folder / "config.yaml", dump(config))
        jobs.keep(folder, [config.data])
        with jobs.undisturbed():
            job = jobs.submit(folder, batch)
            jobs.record(run / "slurm" / "job", [job])
    _announce(job, run, folder / f"{job}.log", resources)


def _run_of(config: Config) -> Path:
    return (Path(config.run.out) / str(config.run.name)).absolute()


def _next_job(run: Path, resources: Resources, options: Mapping[str, str | None]) -> tuple[Path, BatchJob]:
    """The folder of a run's next job, which is not there yet, and its batch file."""
    from launch.slurm.jobs import render

    folder = next(f for n in count(1) if not (f := run / "slurm" / str(n)).exists())
    return folder, render(run.name, folder, ["train.sbatch", f"{folder}/config.yaml"], resources, options)


def _announce(job: str, run: Path, log: Path, resources: Resources) -> None:
    nodes, procs = resources.nodes, resources.procs
    strategy = resources.strategy or ("single" if nodes * procs == 1 else "ddp")
    click.echo(
        f"Job {job}: {run.name}, {strategy} on {counted(nodes, 'node')} x {counted(procs, 'process')}\n"
        f"  run     {run}\n"
        f"  log     {log}\n"
        f"  follow  tail -F {shlex.quote(str(log))}\n"
        f"          squeue --jobs {job} --start\n"
        f"  stop    scancel --batch --signal=TERM {job}     saves first; the same command resumes"
    )


def _enough(cpus: int | None, procs: int, workers: int) -> int:
    """CPUs per node to ask for; a warning if the user's are few."""
    needed = procs * (1 + workers)
    if cpus is not None and cpus < needed:
        click.echo(
            f"warning: --cpus {cpus} for {counted(procs, 'process')} with {counted(workers, 'loader')} each "
            f"(data.workers), which wait for each other: {needed} are needed.",
            err=True,
        )
    return cpus or needed


def _examine(training: Training, config: Config, run: Path, resources: Resources, read: bool) -> None:
    """Show what is not ok to `shardgan doctor`. The data of a run that has begun have been read before; on a
    dry run there may be none yet.

    read: every byte of the shards.
    """
    if not training.prepared:
        click.echo("note: not checked, as the images are not prepared yet", err=True)
        return
    from rich.console import Console

    from launch.doctor.checks import bar, examine, job_of
    from launch.doctor.finding import Machine, fails, show
    from pipeline.borrowed import environment_kept
    from pipeline.parallel.batch import batch_shape
    from pipeline.run.folder import check_same
    from pipeline.run.reals import checked_index

    if (run / "metrics.jsonl").exists():
        check_same(config, run)
        world = resources.nodes * resources.procs
        batch_shape(config.data, world)
        shards(resources.strategy, world, resources.procs)
        checked_index(config, announce=False)
        return
    how = (resources.strategy, resources.precision, Machine(remote=True))  # not on this one, for login
    job = job_of(config, resources.nodes, resources.procs, *how)
    click.echo(f"Checking everything first{'; all shards are read' if read else ''} …", err=True)
    with bar() as progress, environment_kept():  # what W&B and inductor set there is of this machine
        found, _ = examine(job, progress, read)
    if remarkable := [finding for finding in found if finding.verdict != "ok"]:
        show(remarkable, Console(stderr=True))
    if fails(found):
        sys.exit(2)


def _refuse_queued(run: Path) -> None:
    """Two jobs must not write one run."""
    from launch.slurm.jobs import queued
    from pipeline.config import UserError

    if found := queued(run / "slurm" / "job"):
        job, state = found
        raise UserError(
            f"{run} is in the queue already, as job {job} ({state}). Stop that first (scancel --batch "
            f"--signal=TERM {job}), or give this one another run.name."
        )
