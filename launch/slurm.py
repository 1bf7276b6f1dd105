"""Jobs for a Slurm cluster: rendered beside what they train, submitted, found again.

A job is a folder: `job.sbatch`, the code and the config as they were when it was submitted, later its log.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import UserError
from pipeline.credentials import scrubbed

ROOT = Path(__file__).parents[1]
_CODE = ("pipeline", "launch", "slurm")


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
        return found | ({"SHARDGAN_STRATEGY": self.strategy} if self.strategy else {})


@dataclass(frozen=True)
class ArrayJob:
    """An array of trainings, and the job that gathers what they found, if there is one."""

    job: str
    gather: str | None
    folder: Path


def render(
    name: str, folder: Path, script: str, arguments: Sequence[str], resources: Resources, **more: str
) -> str:
    """The batch file of a job in `folder`, running slurm/`script` of the code there. Raises UserError."""
    plain = re.sub(r"[^\w.+=-]", "_", name, flags=re.ASCII)
    log = f"{folder}/{'%A_%a' if 'array' in more else '%j'}.log"
    directives = {
        "job-name": plain,
        **resources.directives(),
        **more,
        "chdir": str(Path.cwd()),
        "output": log,
        "open-mode": "append",
        "signal": "B:USR1@120",
    }
    for path in (str(folder), str(Path.cwd())):
        if not path.isprintable() or {"%", "\\"} & set(path):
            raise UserError(
                f"{path!r}: Slurm gives % and \\ in the path of a log another meaning. Choose another "
                "run.name or run.out, or call from another folder."
            )
    settings = {"SHARDGAN_CODE": f"{folder}/code", **resources.environment()}
    # Python as it is here, unless told otherwise: the environment of the job is the submitter's.
    settings["SHARDGAN_VENV"] = f"${{SHARDGAN_VENV-{shlex.quote(sys.prefix)}}}"
    exports = [
        f"export {key}={value if value.startswith('${') else shlex.quote(value)}"
        for key, value in settings.items()
    ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH --{key}={_quoted(value)}" for key, value in directives.items()),
            "#SBATCH --requeue",
            *exports,
            f'exec bash "$SHARDGAN_CODE/slurm/{script}" {shlex.join(arguments)}',
            "",
        ]
    )


def check(text: str) -> None:
    """Ask Slurm whether it would take a batch file. Raises UserError if not, or if there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "There is no `sbatch` on this machine, so no Slurm to submit to. Call this on a login node of "
            "the cluster; here, `shardgan train` trains."
        )
    _sbatch("--test-only", text=text)


def keep_code(folder: Path) -> None:
    """The code as it is now, for a job in `folder`: what waits in the queue is not changed by later edits."""
    try:
        shutil.rmtree(folder / "code", ignore_errors=True)
        for name in _CODE:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "code" / name, ignore=ignored)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Set run.out.") from None


def submit(folder: Path, text: str, *options: str, name: str = "job.sbatch") -> str:
    """Write a batch file into its folder and hand it in; returns the job's id.

    Raises UserError with what Slurm has against the job.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. Set run.out.") from None
    return _sbatch("--parsable", *options, str(folder / name)).strip().split(";")[0]


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
    refuse_credentials([word for line in lines for word in line])
    folder = folder.absolute()
    array = f"1-{len(lines)}%{throttle}"
    text = render(name, folder, "array.sbatch", [f"{folder}/runs.txt"], resources, array=array)
    check(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "runs.txt").write_text("".join(f"{shlex.join(line)}\n" for line in lines))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from None
    keep_code(folder)
    job = submit(folder, text)
    if gather is None:
        return ArrayJob(job, None, folder)
    one = Resources(time=resources.time, partition=resources.partition, account=resources.account)
    text = render(f"{name}-gather", folder, "gather.sbatch", gather, one)
    then = submit(folder, text, f"--dependency=afterany:{job}", name="gather.sbatch")
    return ArrayJob(job, then, folder)


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
