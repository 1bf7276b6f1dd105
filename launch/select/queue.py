"""The trials of `shardgan select --slurm`: an array of jobs, and a job that collects their scores.

Of a search, for each batch of candidates, one after the other.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import yaml

from launch.select import files
from launch.select.local import Say
from launch.select.trials import LaunchOptions, Trial
from launch.slurm import jobs as slurm
from launch.slurm.jobs import Resources
from pipeline.config import UserError

_COPIES = ("config.yaml", "arms.yaml")
_RESUMABLE = re.compile(  # slurm/train.sbatch's own words, and Slurm's when it ends a job
    r"error: (this cluster does not requeue:|requeued \d+ times and )"
    r"|slurmstepd: error: \*\*\* JOB .* CANCELLED AT "
)


def refuse_queued(folder: Path) -> None:
    """Raises UserError while trials of an earlier call are in the queue: two jobs must not train one."""
    file = folder / "slurm" / "job"
    if queued := slurm.queued(file):
        raise UserError(
            f"Job {queued[0]} of this selection is {queued[1]}. `scancel {file.read_text().strip()}` ends "
            "it; --collect shows what is done."
        )


def submit(
    todo: Sequence[Trial],
    launch: LaunchOptions,
    resources: Resources,
    jobs: int,
    folder: Path,
    say: Say,
    named: Mapping[str, str],
    later: Sequence[int] = (),
) -> None:
    """Submit one job per trial, `jobs` at once, and one that runs this command with --collect after them.

    named: words of the command that name files → those files. Jobs read copies, as someone may edit them
    before. later: of a search, how many trials each batch has that is still to be proposed. They wait in the
    queue as arrays of jobs; the collecting job before each proposes it and lists its trials. So no node has
    to submit. Raises UserError with Slurm's reason if it refuses a job.
    """
    for name in ("WANDB_RUN_ID", "WANDB_NAME"):  # jobs inherit them, and all trials would be one run there
        os.environ.pop(name, None)
    resources = replace(
        resources,
        procs=launch.procs,
        cpus=launch.procs * (1 + todo[0].config.data.workers),
        strategy=launch.strategy,
        precision=launch.precision,
        compiled=launch.compiled,
    )
    sizes = [len(todo), *later]
    ids = _submit_arrays(todo, sizes, folder, resources, jobs, named)
    say(
        f"Submitted: {sum(sizes)} trials as job{'s' if later else ''} {', '.join(ids[::2])}, {jobs} at once; "
        f"job {ids[-1]} collects their scores in {folder}. Logs: {folder / 'slurm'}."
    )


def _submit_arrays(
    todo: Sequence[Trial],
    sizes: Sequence[int],
    folder: Path,
    resources: Resources,
    throttle: int,
    named: Mapping[str, str],
) -> list[str]:
    """The ids of each array, and of the job after it, which runs this command with --collect."""
    name, place = folder.name, (folder / "slurm").absolute()
    texts = {file: Path(file).read_text("utf-8") for file in named.values()}
    slurm.refuse_credentials([word for trial in todo for word in trial.arguments])
    slurm.refuse_credentials([line for text in texts.values() for line in text.splitlines()])
    copies = {file: str(place / copy) for file, copy in zip(texts, _COPIES, strict=False)}
    runs = _lines(todo, copies)
    collect = [_word(word, named, copies) for word in sys.argv[1:] if word != "--slurm"]
    collect.append(f"run.name={name}")  # which else would be that of the copied config
    arrays = [
        slurm.render(
            name, place, ["array.sbatch", str(place / _runs(number))], resources, array=f"1-{size}%{throttle}"
        )
        for number, size in enumerate(sizes)
    ]
    # With a GPU too: some clusters let no job without one into such a partition.
    one = Resources(
        gpus=min(1, resources.gpus),
        time=resources.time,
        partition=resources.partition,
        account=resources.account,
    )
    line = ["node.sh", "python", "launch.cli", collect[0], "--collect", *collect[1:]]  # "--" may be in it
    after = slurm.render(f"{name}-collect", place, line, one)
    for each in (arrays[0], after):
        slurm.check(each)
    for old in place.glob("runs*.txt"):
        old.unlink()
    for file, text in texts.items():
        files.write(Path(copies[file]), text)
    files.write(place / _runs(0), runs)
    slurm.keep(place, {str(trial.config.data.train): trial.config.data for trial in todo}.values())
    ids: list[str] = []
    try:
        for number, array in enumerate(arrays):
            for job, file in ((array, f"job{number or ''}.sbatch"), (after, "collect.sbatch")):
                wait = [f"--dependency=afterany:{ids[-1]}"] if ids else []
                with slurm.undisturbed():
                    ids.append(slurm.submit(place, job, *wait, name=file))
                    slurm.record(place / "job", ids)
    except BaseException as error:
        for job_id in ids:
            slurm.cancel(job_id)
        if not isinstance(error, UserError):
            raise
        cancelled = f" What was submitted before it, job {', '.join(ids)}, is cancelled." if ids else ""
        raise UserError(f"{error}{cancelled}") from None
    return ids


def is_collecting(folder: Path) -> bool:
    """Whether this process is one of the jobs that collect."""
    return os.environ.get("SLURM_JOB_ID") in _ids(folder)[1::2]


def listed_before(folder: Path) -> set[str]:
    """In a job that collects: the trials of the arrays before it, all of whose tasks have ended."""
    number = _ids(folder)[1::2].index(os.environ["SLURM_JOB_ID"])
    files = (folder / "slurm" / _runs(array) for array in range(number + 1))
    return {name for file in files for name in _names(file)}


def write_next(todo: Sequence[Trial], folder: Path) -> None:
    """In a job that collects: list the trials of the array after it, if there is one. Raises UserError."""
    number = _ids(folder).index(os.environ["SLURM_JOB_ID"]) // 2 + 1
    if todo and number < len(_ids(folder)[::2]):
        files.write(folder / "slurm" / _runs(number), _lines(todo))


def failures(trials: Sequence[Trial], folder: Path) -> dict[str, str]:
    """Of the trials submitted last, those whose log ends with an error: name → its first error."""
    found: dict[str, str] = {}
    for number, job in enumerate(_ids(folder)[::2]):
        runs = folder / "slurm" / _runs(number)
        for place, name in enumerate(_names(runs), 1):
            found.pop(name, None)  # of an earlier array
            if problem := _problem(runs.with_name(f"{job}_{place}.log")):
                found[name] = problem
    return {trial.name: found[trial.name] for trial in trials if not trial.done and trial.name in found}


def _names(runs: Path) -> list[str]:
    """Of the trials of an array, task by task."""
    lines = runs.read_text("utf-8").splitlines() if runs.exists() else []
    # The last run.name of a line is the trial's.
    named = [[w.partition("=")[2] for w in shlex.split(line) if w.startswith("run.name=")] for line in lines]
    return [str(yaml.safe_load(names[-1])) if names else "" for names in named]


def _problem(log: Path) -> str:
    """The first error in a log that ends with one; else it may be training, or wait to be resumed, as it does
    when it was out of time."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    lines = [line for line in lines if line.strip()]
    errors = [line for line in lines if re.match(r"(\S+: )?error: ", line)]
    failed = errors and errors[-1] == lines[-1] and not _RESUMABLE.match(lines[-1])
    return f"{errors[0]} ({log})" if failed else ""


def _ids(folder: Path) -> list[str]:
    """Of the jobs submitted last: an array and the job that collects after it, and so on."""
    file = folder / "slurm" / "job"
    return file.read_text().split() if file.exists() else []


def _runs(number: int) -> str:
    """The file that lists the trials of an array."""
    return f"runs-{number + 1}.txt" if number else "runs.txt"


def _word(word: str, named: Mapping[str, str], copies: Mapping[str, str]) -> str:
    """A word of the command line; the copy of a file instead of its name."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{copies[named[value]]}" if value in named else word


def _lines(todo: Sequence[Trial], copies: Mapping[str, str] = MappingProxyType({})) -> str:
    """A line for each trial, as array.sbatch reads them. Raises UserError."""
    words = [word for trial in todo for word in trial.arguments]
    if broken := next((word for word in words if "\n" in word), None):
        raise UserError(f"{broken!r} has a line break, and a list of runs has one run per line. Remove it.")
    return "".join(f"{shlex.join([copies.get(c, c), *rest])}\n" for c, *rest in (t.arguments for t in todo))
