"""`shardgan select`: train every candidate on every fold, and choose with the evidence on the table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.train import STRATEGIES
from pipeline.config import UserError

if TYPE_CHECKING:
    from launch.select_table import Table
    from launch.select_trials import Trial
    from pipeline.config import Config


@click.command()
@click.argument("config", type=click.Path())
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--grid", multiple=True, metavar="KEY=V1,V2,…", help="Values to try; 1e-6:1e-2:5 is a log-spaced range."
)
@click.option(
    "--arms", type=click.Path(path_type=Path), help="Instead: a YAML file of `name: [key=value, …]`."
)
@click.option(
    "--folds", type=click.IntRange(min=2), default=3, show_default=True, help="Parts held out in turn."
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Trainings of each fold."
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Trials at a time.")
@click.option(
    "--strategy", type=click.Choice(STRATEGIES), default="single", show_default=True, help="Of each trial."
)
@click.option(
    "--procs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes of each trial."
)
@click.option("--mixed_precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--slurm", is_flag=True, help="Trials as a Slurm job array, --jobs at once, each on one node.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="Of a --slurm trial.")
@click.option("--collect", is_flag=True, help="Train nothing; table and report of what is done.")
def select(
    config: str,
    settings: tuple[str, ...],
    grid: tuple[str, ...],
    arms: Path | None,
    folds: int,
    seeds: int,
    jobs: int,
    strategy: str,
    procs: int,
    mixed_precision: str,
    slurm: bool,
    gpus: int,
    collect: bool,
) -> None:
    """Choose λ (or anything else) by cross-validation.

    The data are cut into folds; each candidate is trained on all but one of them and scored on that one, for
    every fold and seed. Each trial is a run of its own under OUT/NAME/trials, and the same command again
    continues where it was stopped. What comes out is in OUT/NAME: report.md, curve.png, table.json,
    table.csv, and best.yaml, ready to train.
    """
    from launch import select_table, select_trials

    if bool(grid) == bool(arms):
        raise UserError("Give the candidates, either by --grid (once or more) or by --arms.")
    if strategy == "single" and procs > 1:
        raise UserError(f"--procs {procs}: single is one process; choose another --strategy.")
    candidates = select_trials.grid(grid) if arms is None else select_trials.arms(arms)
    base, trials = select_trials.trials(config, settings, candidates, folds, seeds)
    select_table.table(base, trials, {})  # refuses what cannot be compared
    folder = Path(base.run.out) / str(base.run.name)
    launch = select_trials.Launch(strategy, procs, mixed_precision)
    todo = [] if collect else [trial for trial in trials if not trial.done]
    failures = {trial.name: "not done" for trial in trials if not trial.done} if collect else {}
    click.echo(
        f"{base.run.name}: {len(candidates)} candidates x {folds} folds x {seeds} seeds = {len(trials)} "
        f"trials of {base.run.total_kimg:g} kimg, {sum(trial.done for trial in trials)} of them done"
    )
    if slurm and todo:
        from launch.select_slurm import submit

        submit(todo, launch, gpus, jobs, folder, click.echo)
        return
    lock = select_trials.hold(folder, click.echo)
    ended = _teller(base, trials, failures, folder)
    completed = select_trials.run(todo, launch, jobs, folder, lock, ended)
    found = select_table.table(base, trials, failures)
    select_table.write(folder, found, base, trials)
    _conclude(folder, found, trials, (config, settings))
    if not completed:
        click.echo("Stopped; the same command continues.")
    os.close(lock)
    if found.minimum is None and completed:
        raise click.ClickException("No trial could be finished; their logs are in " + str(folder / "logs"))


def _teller(
    base: Config, trials: Sequence[Trial], failures: dict[str, str], folder: Path
) -> Callable[[Trial, str], None]:
    """What to do when a trial has ended: note what went wrong, bring the table up to date, say so."""
    from launch import select_table

    started = time.monotonic()

    def ended(trial: Trial, problem: str) -> None:
        if problem:
            failures[trial.name] = problem
        now = select_table.table(base, trials, failures)
        select_table.write(folder, now, base, trials)
        click.echo(_progress(trial, problem, now, len(trials), time.monotonic() - started))

    return ended


def _conclude(
    folder: Path, found: Table, trials: Sequence[Trial], given: tuple[str, tuple[str, ...]]
) -> None:
    """Tell, draw and write what is known by now."""
    from launch import select_report

    select_report.show(found)
    if found.minimum is not None:
        files = select_report.write(folder, found, trials, *given)
        click.echo("\n".join(str(file) for file in files))


def _progress(trial: Trial, problem: str, now: Table, total: int, seconds: float) -> str:
    done = [o for row in now.rows for o in row.outcomes]
    ended = len(done) + sum(len(row.failures) for row in now.rows)
    scores = [f"{now.score} {o.score:.4f}" for o in done if o.trial == trial]
    return f"[{ended}/{total}] {trial.name}: {problem or ', '.join(scores)}  after {seconds / 60:.1f} min"
