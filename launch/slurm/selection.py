"""The trials of `shardgan select --slurm`: a job array, and a job that collects what they found."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.select import files
from launch.select.run import Say
from launch.select.trials import LaunchOptions, Trial
from launch.slurm import jobs as slurm
from pipeline.config import UserError
from pipeline.credentials import redacted


def refuse_queued(folder: Path) -> None:
    """Raises UserError while trials handed in by an earlier call are in the queue: two of one name must not
    train at once."""
    noted = folder / "slurm" / "job"
    before = noted.read_text().split() if noted.exists() else []
    for job in before:
        if now := slurm.state(job):
            raise UserError(
                f"Job {job} of this selection is {now}. `scancel {' '.join(before)}` ends it; --collect "
                "shows what is done."
            )


def submit(
    todo: Sequence[Trial],
    launch: LaunchOptions,
    resources: slurm.Resources,
    jobs: int,
    folder: Path,
    say: Say,
) -> None:
    """Hand in a job per trial, `jobs` at once, and one that runs this command with --collect after them.

    Raises UserError with what Slurm has against them.
    """
    if resources.gpus and launch.procs > resources.gpus:
        raise UserError(f"--procs {launch.procs} need a GPU each, but --gpus is {resources.gpus}.")
    for name in ("WANDB_RUN_ID", "WANDB_NAME"):  # jobs inherit them, and all trials would be one run there
        os.environ.pop(name, None)
    resources = replace(
        resources,
        procs=launch.procs,
        cpus=launch.procs * (1 + todo[0].settings.data.workers),
        strategy=launch.strategy,
        precision=launch.precision,
    )
    command = [word for word in sys.argv[1:] if word != "--slurm"]
    array = slurm.submit_array(
        [[*map(redacted, trial.arguments)] for trial in todo],
        folder / "slurm",
        resources,
        name=str(folder.name),
        throttle=jobs,
        gather=["launch.cli", *map(redacted, command), "--collect"],
    )
    files.write(folder / "slurm" / "job", f"{array.job} {array.gather}\n")
    say(
        f"Submitted: {len(todo)} trials as job {array.job}, {jobs} at once; job {array.gather} collects what "
        f"they find in {folder}. Logs: {folder / 'slurm'}."
    )


def failures(trials: Sequence[Trial], folder: Path) -> dict[str, str]:
    """Of the trials that were handed in last and are not done, those whose log ends with an error."""
    noted, listed = folder / "slurm" / "job", folder / "slurm" / "runs.txt"
    if not (noted.exists() and listed.exists()):
        return {}
    job, found = noted.read_text().split()[0], {}
    names = [
        next((word.partition("=")[2].strip("'") for word in words if word.startswith("run.name='")), "")
        for words in map(shlex.split, listed.read_text("utf-8").splitlines())
    ]
    for trial in trials:
        if trial.done or trial.name not in names:
            continue
        log = listed.with_name(f"{job}_{names.index(trial.name) + 1}.log")
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        lines = [line for line in lines if line.strip()]
        told = [line for line in lines if re.match(r"(\S+: )?error: ", line)]
        if told and told[-1] == lines[-1]:  # else it may be at work, or waiting to go on
            found[trial.name] = f"{told[0]} ({log})"
    return found
