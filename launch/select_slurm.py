"""The trials of `shardgan select --slurm`: a job array, and a job that collects what they found."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch import slurm
from launch.select_trials import Launch, Say, Trial
from pipeline.config import UserError
from pipeline.credentials import redacted


def submit(todo: Sequence[Trial], launch: Launch, gpus: int, jobs: int, folder: Path, say: Say) -> None:
    """Hand in a job per trial, `jobs` at once, and one that runs this command with --collect after them.

    Raises UserError while those of an earlier call are in the queue, or with what Slurm has against them.
    """
    noted = folder / "slurm" / "job"
    before = noted.read_text().split() if noted.exists() else []
    for job in before:
        if now := slurm.state(job):
            raise UserError(f"Job {job} of this selection is {now}. `scancel {' '.join(before)}` ends it.")
    data = todo[0].settings.data
    resources = slurm.Resources(
        gpus=gpus,
        procs=launch.procs,
        cpus=launch.procs * (1 + data.workers),
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
    noted.write_text(f"{array.job} {array.gather}\n")
    say(
        f"Submitted: {len(todo)} trials as job {array.job}, {jobs} at once; job {array.gather} collects what "
        f"they find in {folder}. Logs: {folder / 'slurm'}."
    )
