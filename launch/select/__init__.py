"""`shardgan select`: train every candidate on every fold, and choose by their scores."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from launch.installed import config_path
from launch.processes import STRATEGIES, check_strategy
from launch.select.choice import RULES
from pipeline.config import UserError
from pipeline.errors import expanded

if TYPE_CHECKING:
    from launch.select.candidates import Arm
    from launch.slurm.jobs import Resources


@click.command()
@click.argument("config", type=click.Path())
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--grid",
    multiple=True,
    metavar="KEY=V1,V2,…",
    help="Values to try; 1e-6:1e-2:5 is a log-spaced range. With --search: KEY=LOW..HIGH.",
)
@click.option("--arms", type=click.Path(), help="Instead: a YAML file of `name: [key=value, …]`.")
@click.option(
    "--search",
    type=click.Choice(["tpe"]),
    help="Instead of every value: candidates that optuna's TPE proposes, by the scores of those before.",
)
@click.option(
    "--trials",
    "count",
    type=click.IntRange(min=2),
    help="Candidates of a --search, λ = 0 among them; each is trained on every fold and seed.",
)
@click.option(
    "--folds", type=click.IntRange(min=2), default=3, show_default=True, help="Each is held out in turn."
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Seeds per fold.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Trials at a time.")
@click.option(
    "--strategy", type=click.Choice(STRATEGIES), default="single", show_default=True, help="Of each trial."
)
@click.option(
    "--procs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes of each trial."
)
@click.option("--mixed_precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Compile each trial, as in `shardgan train`.")
@click.option("--slurm", is_flag=True, help="Trials as a Slurm job array, --jobs at once, each on one node.")
@click.option(
    "--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="GPUs of each --slurm trial."
)
@click.option("--time", "limit", help="Limit of each --slurm job, which requeues itself until done.")
@click.option("--partition", help="For --slurm. Default: the cluster's.")
@click.option("--account", help="For --slurm. Default: yours.")
@click.option(
    "--rule",
    type=click.Choice(RULES),
    default=RULES[0],
    show_default=True,
    help="For a grid over one λ: by differences in pairs of one fold and seed, or by means alone.",
)
@click.option("--collect", is_flag=True, help="Train nothing; table and report of what is done.")
def select(
    config: str,
    settings: tuple[str, ...],
    grid: tuple[str, ...],
    arms: str | None,
    search: str | None,
    count: int | None,
    folds: int,
    seeds: int,
    jobs: int,
    strategy: str,
    procs: int,
    mixed_precision: str,
    compiled: bool,
    slurm: bool,
    gpus: int,
    limit: str | None,
    partition: str | None,
    account: str | None,
    rule: str,
    collect: bool,
) -> None:
    """Choose λ (or anything else) by cross-validation.

    The data are cut into folds. Each candidate is trained on all but one of them and scored on that one, for
    every fold and seed. In a grid over one λ, the largest close enough to the best is chosen (--rule);
    otherwise the best mean. Each trial is a run of its own under OUT/NAME/trials, scored up to five times, of
    which the last counts. The same command again resumes. The results are in OUT/NAME: report.md, pictures,
    table.json, table.csv, and best.yaml, ready to train.
    """
    from launch.select.choice import SEARCHED
    from launch.select.search import search as new_search
    from launch.select.selection import Selection
    from launch.select.trials import LaunchOptions, trials
    from launch.slurm.jobs import Resources

    if bool(grid) == bool(arms):
        raise UserError("Give the candidates by either --grid (once or more) or --arms.")
    check_strategy(strategy, procs)
    if (search is None) != (count is None) or (search and arms):
        raise UserError("A search needs --search tpe, --trials N, and --grid KEY=LOW..HIGH once or more.")
    where = Resources(gpus=gpus, time=limit, partition=partition, account=account)
    _check_used(where, slurm or collect)
    launch, typed = LaunchOptions(strategy, procs, mixed_precision, compiled), config
    config = config_path(config)
    candidates = [] if search else _candidates(grid, arms)
    with nullcontext(config) if collect else as_it_is(config, settings, candidates) as config:
        searched = None
        if search and count:
            base, searched = new_search(config, settings, grid, count, jobs, folds, seeds)
            found, rule = searched.read(), SEARCHED
        else:
            base, found = trials(config, settings, candidates, folds, seeds)
        selection = Selection(base, found, launch, (config, settings), click.echo, rule, searched)
        if collect:
            selection.collect()
        elif slurm:
            selection.submit(where, jobs, {typed: config} | ({arms: arms} if arms else {}))
        else:
            selection.train(jobs)


def _check_used(where: Resources, slurm: bool) -> None:
    """Raises UserError for resources that nothing is asked for."""
    given = {"gpus": where.gpus, "time": where.time, "partition": where.partition, "account": where.account}
    if (options := [f"--{name}" for name, value in given.items() if value]) and not slurm:
        raise UserError(f"{' and '.join(options)}: for jobs. Add --slurm to submit them, or leave it out.")


def _candidates(grid: tuple[str, ...], arms: str | None) -> list[Arm]:
    from launch.select import candidates as select_candidates

    return select_candidates.grid(grid) if arms is None else select_candidates.arms(Path(arms))


@contextmanager
def as_it_is(config: str, settings: tuple[str, ...], candidates: Sequence[Arm]) -> Iterator[str]:
    """A copy of a config file while trials are trained from it: someone may edit the file meanwhile."""
    from launch.select.trials import load_base

    load_base(config, settings, candidates)  # its messages name the file
    with TemporaryDirectory(prefix="shardgan-") as folder:
        yield shutil.copyfile(expanded(config), str(Path(folder, Path(config).name)))
