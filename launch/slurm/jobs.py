"""Jobs for a Slurm cluster: rendered beside what they train, submitted, found again.

A job is a folder: `job.sbatch`, the code and the config as they were when it was submitted, later its log.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm import index_copies
from pipeline import config
from pipeline.config import Data, UserError
from pipeline.credentials import scrubbed

ROOT = Path(__file__).parents[2]
_CODE = ("pipeline", "launch", "slurm")
_INDEX = "index"  # what is known of the data, beside them


@dataclass(frozen=True)
class Resources:
    """What to ask Slurm for, and how to train on it. None: as the cluster has it."""

    nodes: int = 1
    gpus: int = 0  # per node; 0: train on CPUs
    procs: int = 1  # per node
    cpus: int = 1  # per node
    strategy: str | None = None  # None: ddp, or single for one process
    precision: str = "no"
    time: str | None = None
    partition: str | None = None
    account: str | None = None

    def directives(self) -> dict[str, str]:
        """Options of sbatch."""
        asked = {
            "nodes": str(self.nodes),
            "ntasks-per-node": "1",
            "gpus-per-node": str(self.gpus) if self.gpus else None,
            "cpus-per-task": str(self.cpus),
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def environment(self) -> dict[str, str]:
        """What node.sh goes by."""
        found = {"SHARDGAN_PROCS": str(self.procs), "SHARDGAN_PRECISION": self.precision}
        found |= {"SHARDGAN_STRATEGY": self.strategy} if self.strategy else {}
        # Nodes may have GPUs that Slurm does not hide from who asked for none.
        return found | ({} if self.gpus else {"ACCELERATE_USE_CPU": "${ACCELERATE_USE_CPU:-1}"})


@dataclass(frozen=True)
class BatchJob:
    """A batch file, and those of its options that are ours to say: on sbatch's command line they win over
    the user's SBATCH_* variables, in the file they would lose."""

    text: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class ArrayJob:
    """An array of trainings, and the job that gathers what they found, if there is one."""

    job: str
    gather: str | None
    folder: Path


def render(
    name: str, folder: Path, script: str, arguments: Sequence[str], resources: Resources, **more: str
) -> BatchJob:
    """The batch file of a job in `folder`, running slurm/`script` of the code there. Raises UserError."""
    if not (ROOT / "slurm").is_dir():
        raise UserError(
            f"Slurm jobs need the project's folder slurm/, which is not part of what is installed in {ROOT}. "
            "Install from a checkout: bash launch/setup.sh"
        )
    ours = {
        "job-name": re.sub(r"[^\w.+=-]", "_", name, flags=re.ASCII),
        **resources.directives(),
        **more,
        "chdir": str(Path.cwd()),
        "output": f"{folder}/{'%A_%a' if 'array' in more else '%j'}.log",
    }
    directives = {**ours, "open-mode": "append", "signal": "B:USR1@120"}
    for path in (str(folder), str(Path.cwd())):
        if not path.isprintable() or {"%", "\\"} & set(path):
            raise UserError(
                f"{path!r}: Slurm gives % and \\ in the path of a log another meaning. Choose another "
                "run.name or run.out, or call from another folder."
            )
    settings = {"SHARDGAN_CODE": f"{folder}/code", "SHARDGAN_INDEX": f"{folder}/{_INDEX}"}
    # Python as it is here, unless told otherwise (SHARDGAN_VENV, or a container, which has its own).
    settings |= {"VIRTUAL_ENV": sys.prefix, **resources.environment()}
    exports = [
        f"export {key}={value if value.startswith('${') else shlex.quote(value)}"
        for key, value in settings.items()
    ]
    text = "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH --{key}={_quoted(value)}" for key, value in directives.items()),
            "#SBATCH --requeue",
            *exports,
            f'exec bash "$SHARDGAN_CODE/slurm/{script}" {shlex.join(arguments)}',
            "",
        ]
    )
    return BatchJob(text, tuple(f"--{key}={value}" for key, value in ours.items()))


def check(batch: BatchJob) -> None:
    """Ask Slurm whether it would take a batch file. Raises UserError if not, or if there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "There is no `sbatch` on this machine, so no Slurm to submit to. Call this on a login node of "
            "the cluster; here, `shardgan train` trains."
        )
    _sbatch("--test-only", *batch.options, text=batch.text)


def keep(folder: Path, data: Iterable[Data]) -> None:
    """For a job in `folder`: the code as it is now, as what waits in the queue is not changed by later edits,
    and what the cache of this machine knows of the data. Raises UserError."""
    try:
        shutil.rmtree(folder / "code", ignore_errors=True)
        for name in _CODE:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "code" / name, ignore=ignored)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Set run.out.") from None
    for one in data:
        index_copies.keep(one, folder / _INDEX)


def submit(folder: Path, batch: BatchJob, *options: str, name: str = "job.sbatch") -> str:
    """Write a batch file into its folder and hand it in; returns the job's id.

    Raises UserError with what Slurm has against the job.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(batch.text, "utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. Set run.out.") from None
    return _sbatch("--parsable", *batch.options, *options, str(folder / name)).strip().split(";")[0]


def refuse_credentials(texts: Sequence[str]) -> None:
    """Raises UserError if a URL lets someone in: what a job reads lies in files."""
    if found := next((text for text in texts if scrubbed(text) != text), None):
        raise UserError(
            f"{scrubbed(found)}: a user, password or signature in a URL would be written to the files of the "
            "job. Give it by ~/.netrc or the environment, which reach the nodes."
        )


def submit_array(
    lines: Sequence[Sequence[str]],
    folder: Path,
    resources: Resources,
    *,
    name: str,
    throttle: int,
    gather: Sequence[str] | None = None,
) -> ArrayJob:
    """One training per line (a config and its overrides), at most `throttle` at once.

    `gather` is what `python -m` is to run when all have ended, well or badly. Everything is written to
    `folder`: the list, the batch files, the code as it is now, the logs.
    """
    words = [word for line in lines for word in line]
    refuse_credentials(words)
    if broken := next((word for word in words if "\n" in word), None):
        raise UserError(f"{broken!r} has a line break, and a list of runs has one run per line. Take it out.")
    data = {str(found.train): found for found in (config.load(line[0], line[1:]).data for line in lines)}
    folder = folder.absolute()
    array = f"1-{len(lines)}%{throttle}"
    batch = render(name, folder, "array.sbatch", [f"{folder}/runs.txt"], resources, array=array)
    check(batch)
    if gather is not None:  # looked at before anything runs
        one = Resources(time=resources.time, partition=resources.partition, account=resources.account)
        after = render(f"{name}-gather", folder, "gather.sbatch", gather, one)
        check(after)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "runs.txt").write_text("".join(f"{shlex.join(line)}\n" for line in lines), "utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from None
    keep(folder, data.values())
    job = submit(folder, batch)
    return ArrayJob(job, None if gather is None else _submit_after(job, folder, after), folder)


def _submit_after(job: str, folder: Path, batch: BatchJob) -> str:
    """The job that gathers when an array has ended; without it the array does not stay either."""
    try:
        return submit(folder, batch, f"--dependency=afterany:{job}", name="gather.sbatch")
    except UserError as error:
        _call("scancel", job)
        raise UserError(
            f"{error} That was about the job that gathers; job {job}, the runs, is cancelled."
        ) from None


def state(job: str) -> str | None:
    """PENDING, RUNNING … of a job in the queue; None of one that is not, or if nobody can be asked."""
    if shutil.which("squeue") is None:
        return None
    ended = _call("squeue", "--noheader", "--jobs", job, "--format=%T")
    return ended.stdout.split()[0] if ended.returncode == 0 and ended.stdout.split() else None


def _quoted(value: str) -> str:
    """As sbatch reads its directives."""
    if re.fullmatch(r"[\w./:%@+=,-]+", value, flags=re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _partitions() -> str:
    found = _call("sinfo", "--noheader", "--format=%R").stdout.split()
    return f" Partitions here: {', '.join(dict.fromkeys(found))}." if found else ""


def _sbatch(*arguments: str, text: str = "") -> str:
    ended = _call("sbatch", *arguments, text=text)
    if ended.returncode:
        reason = " ".join(re.sub(r"\b(sbatch|allocation failure): (error: )?", "", ended.stderr).split())
        raise UserError(
            f"Slurm did not take the job: {reason}.{_partitions() if 'artition' in reason else ''}"
        )
    return ended.stdout


def _call(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, input=text)
