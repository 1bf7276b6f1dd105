"""`shardgan submit`: check a training, and hand it to Slurm with the code and config as they are now."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.processes import STRATEGIES

if TYPE_CHECKING:
    from launch.slurm.jobs import Resources
    from pipeline.config import Config


@click.command()
@click.argument("config", type=click.Path())
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(min=1), required=True)
@click.option("--gpus", type=click.IntRange(min=0), required=True, help="Per node; 0: train on CPUs.")
@click.option("--procs", type=click.IntRange(min=1), help="Processes per node. Default: one per GPU, else 1.")
@click.option(
    "--cpus", type=click.IntRange(min=1), help="CPUs per node. Default: those processes and loaders need."
)
@click.option("--strategy", type=click.Choice(STRATEGIES), help="Default: ddp (one process: single).")
@click.option("--mixed_precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--time", help="Limit of one stretch, as sbatch takes it; the job requeues itself until DONE.")
@click.option("--partition", help="Default: the cluster's.")
@click.option("--account", help="Default: yours.")
@click.option("--dry-run", is_flag=True, help="Print the batch file; write and submit nothing.")
def submit(
    config: str,
    settings: tuple[str, ...],
    nodes: int,
    gpus: int,
    procs: int | None,
    cpus: int | None,
    strategy: str | None,
    mixed_precision: str,
    time: str | None,
    partition: str | None,
    account: str | None,
    dry_run: bool,
) -> None:
    """Train CONFIG on a Slurm cluster; the same command again resumes a run that is not DONE.

    Everything is looked at first, as by `shardgan doctor`. Further options of sbatch go by its own variables
    (SBATCH_QOS, SBATCH_CONSTRAINT, …), those of the job by SHARDGAN_*: see slurm/train.sbatch.
    """
    from launch.slurm import jobs as slurm
    from pipeline import config as configs
    from pipeline.run.folder import finished, under_a_free_name

    resolved = under_a_free_name(configs.load(config, settings))
    procs = procs or gpus or 1
    if gpus and procs > gpus:
        raise configs.UserError(f"--procs {procs} need a GPU each, but --gpus is {gpus}.")
    cpus = _enough(cpus, procs, resolved.data.workers)
    resources = slurm.Resources(
        nodes, gpus, procs, cpus, strategy, mixed_precision, time, partition, account
    )  # fmt: skip
    run = (Path(resolved.run.out) / str(resolved.run.name)).absolute()
    if finished(run, resolved):
        click.echo(f"{run} is finished (its DONE file says so). Nothing to submit.")
        return
    _refuse_twice(run)
    slurm.refuse_credentials([str(resolved.data.train)])
    folder = _free_folder(run / "slurm")
    batch = slurm.render(str(resolved.run.name), folder, ["train.sbatch", f"{folder}/config.yaml"], resources)
    if not dry_run:
        slurm.check(batch)
    _examine(resolved, run, resources)
    if dry_run:
        click.echo(batch.text, nl=False)
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(configs.dump(resolved), "utf-8")
    slurm.keep(folder, [resolved.data])
    job = slurm.submit(folder, batch)
    (run / "slurm" / "job").write_text(f"{job}\n")
    _tell(job, run, folder, resources)


def _enough(cpus: int | None, procs: int, workers: int) -> int:
    """CPUs per node to ask for; a warning if the user's are few."""
    needed = procs * (1 + workers)
    if cpus is not None and cpus < needed:
        click.echo(
            f"warning: --cpus {cpus} for {procs} processes with {workers} loaders each (data.workers), which "
            f"wait for each other: {needed} are needed.",
            err=True,
        )
    return cpus or needed


def _examine(settings: Config, run: Path, resources: Resources) -> None:
    """What `shardgan doctor` finds, told if it matters. A run that has begun had its data read before."""
    from rich.console import Console

    from launch.doctor.checks import bar, examine, job_of
    from launch.doctor.finding import fails, show
    from pipeline.parallel.batch import batch_shape
    from pipeline.run.folder import check_same
    from pipeline.train import prepare_data

    if (run / "metrics.jsonl").exists():
        check_same(settings, run)
        batch_shape(settings.data, resources.nodes * resources.procs)
        prepare_data(settings, announce=False)
        return
    job = job_of(settings, resources.nodes, resources.procs, resources.strategy, resources.precision)
    click.echo("Looking at everything first; all shards are read …", err=True)
    with bar() as progress:
        found = examine(job, progress)
    remarkable = [finding for finding in found if finding.verdict != "ok"]
    if remarkable:
        show(remarkable, Console(stderr=True))
    if fails(found):
        sys.exit(2)


def _refuse_twice(run: Path) -> None:
    """Two jobs must not write one run."""
    from launch.slurm import jobs as slurm
    from pipeline.config import UserError

    try:
        job = (run / "slurm" / "job").read_text().strip()
    except OSError:
        return
    state = slurm.state(job)
    if state is not None:
        raise UserError(
            f"{run} is in the queue already, as job {job} ({state}). Stop that first (scancel --batch "
            f"--signal=TERM {job}), or give this one another run.name."
        )


def _free_folder(parent: Path) -> Path:
    """One for each submission, numbered."""
    number = 1
    while (parent / str(number)).exists():
        number += 1
    return parent / str(number)


def _tell(job: str, run: Path, folder: Path, resources: Resources) -> None:
    strategy = resources.strategy or ("single" if resources.nodes * resources.procs == 1 else "ddp")
    log = folder / f"{job}.log"
    click.echo(
        f"Job {job}: {run.name}, {strategy} on {resources.nodes} nodes x {resources.procs} processes\n"
        f"  run     {run}\n"
        f"  log     {log}\n"
        f"  follow  tail -F {log}\n"
        f"          squeue --jobs {job} --start\n"
        f"  stop    scancel --batch --signal=TERM {job}     saves first; the same command continues"
    )
