"""The trials of `shardgan select --slurm`: an array of jobs, and a job that collects their scores."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.select import files
from launch.select.local import Say
from launch.select.trials import LaunchOptions, Trial
from launch.slurm import jobs as slurm
from launch.slurm.jobs import Resources
from pipeline.config import UserError


def refuse_queued(folder: Path) -> None:
    """Raises UserError while trials of an earlier call are in the queue: two jobs must not train one."""
    file = folder / "slurm" / "job"
    if queued := slurm.queued(file):
        raise UserError(
            f"Job {queued[0]} of this selection is {queued[1]}. `scancel {file.read_text().strip()}` ends "
            "it; --collect shows what is done."
        )


def submit(
    todo: Sequence[Trial], launch: LaunchOptions, resources: Resources, jobs: int, folder: Path, say: Say
) -> None:
    """Submit one job per trial, `jobs` at once, and one that runs this command with --collect after them.

    Raises UserError with Slurm's reason if it refuses one.
    """
    for name in ("WANDB_RUN_ID", "WANDB_NAME"):  # jobs inherit them, and all trials would be one run there
        os.environ.pop(name, None)
    resources = replace(
        resources,
        procs=launch.procs,
        cpus=launch.procs * (1 + todo[0].config.data.workers),
        strategy=launch.strategy,
        precision=launch.precision,
    )
    command = [word for word in sys.argv[1:] if word != "--slurm"]
    job, collecting = _submit_array(todo, folder, resources, jobs, [*command, "--collect"])
    files.write(folder / "slurm" / "job", f"{job} {collecting}\n")
    say(
        f"Submitted: {len(todo)} trials as job {job}, {jobs} at once; job {collecting} collects their scores "
        f"in {folder}. Logs: {folder / 'slurm'}."
    )


def _submit_array(
    todo: Sequence[Trial], folder: Path, resources: Resources, throttle: int, collect: Sequence[str]
) -> tuple[str, str]:
    """The ids of the array and of the job after it, which runs `shardgan` with the words of `collect`."""
    words = [word for trial in todo for word in trial.arguments]
    slurm.refuse_credentials(words)
    if broken := next((word for word in words if "\n" in word), None):
        raise UserError(f"{broken!r} has a line break, and a list of runs has one run per line. Remove it.")
    name, place = folder.name, (folder / "slurm").absolute()
    runs, array = place / "runs.txt", f"1-{len(todo)}%{throttle}"
    batch = slurm.render(name, place, ["array.sbatch", str(runs)], resources, array=array)
    one = Resources(time=resources.time, partition=resources.partition, account=resources.account)
    line = ["node.sh", "python", "launch.cli", *collect]
    after = slurm.render(f"{name}-collect", place, line, one)
    for each in (batch, after):
        slurm.check(each)
    files.write(runs, "".join(f"{shlex.join(trial.arguments)}\n" for trial in todo))
    slurm.keep(place, {str(trial.config.data.train): trial.config.data for trial in todo}.values())
    job = slurm.submit(place, batch)
    try:
        return job, slurm.submit(place, after, f"--dependency=afterany:{job}", name="collect.sbatch")
    except UserError as error:
        slurm.cancel(job)
        raise UserError(
            f"{error} That was the job that collects; the trials, job {job}, are cancelled."
        ) from None


def failures(trials: Sequence[Trial], folder: Path) -> dict[str, str]:
    """Of the trials submitted last, those whose log ends with an error: name → its first error."""
    jobs, runs = folder / "slurm" / "job", folder / "slurm" / "runs.txt"
    if not (jobs.exists() and runs.exists()):
        return {}
    job, found = jobs.read_text().split()[0], {}
    names = [
        next((word.partition("=")[2].strip("'") for word in words if word.startswith("run.name='")), "")
        for words in map(shlex.split, runs.read_text("utf-8").splitlines())
    ]
    for trial in trials:
        if trial.done or trial.name not in names:
            continue
        log = runs.with_name(f"{job}_{names.index(trial.name) + 1}.log")
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        lines = [line for line in lines if line.strip()]
        errors = [line for line in lines if re.match(r"(\S+: )?error: ", line)]
        if errors and errors[-1] == lines[-1]:  # else it may be training, or wait to be resumed
            found[trial.name] = f"{errors[0]} ({log})"
    return found
