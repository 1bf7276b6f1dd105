"""Jobs for a Slurm cluster: `render` writes a batch file, `submit` hands it to Slurm, `state` finds it again.

A job is a folder: `job.sbatch`, the code and the config as they were when it was submitted, later its log.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.installed import ROOT, slurm_scripts
from launch.slurm import index_copies
from pipeline import STOP_SIGNALS, durable
from pipeline.config import Data, UserError
from pipeline.credentials import redacted, scrubbed
from pipeline.parallel.compilation import check_compiled
from pipeline.plugins import own_version
from pipeline.wording import one_line, why

_INDEX = "index"  # the index of the data, if it does not lie beside them
# Of sbatch: what a job of ours depends on, and its short options.
# fmt: off
_OURS = {
    "array", "chdir", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "signal",
    "quiet", "test-only", "wrap", "help", "usage", "version",
}
# What Slurm does not take beside an option of ours: if the user gives one of these, ours is left out.
_INSTEAD = {
    "gpus-per-node": {"gpus", "gpus-per-socket", "gpus-per-task", "gres", "tres-per-node", "tres-per-task"},
    "cpus-per-task": {"cpus-per-gpu"},
}
_LONG = {
    "a": "array", "A": "account", "C": "constraint", "c": "cpus-per-task", "D": "chdir", "d": "dependency",
    "e": "error", "G": "gpus", "J": "job-name", "L": "licenses", "N": "nodes", "n": "ntasks", "o": "output",
    "p": "partition", "q": "qos", "t": "time", "w": "nodelist", "x": "exclude",
}
# fmt: on


@dataclass(frozen=True)
class Resources:
    """What to ask Slurm for, and how to train on it. None: the cluster's default."""

    nodes: int = 1
    gpus: int = 0  # per node; 0: train on CPUs
    procs: int = 1  # per node
    cpus: int = 1  # per node
    strategy: str | None = None  # None: ddp, or single for one process
    precision: str = "no"
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.gpus and self.procs > self.gpus:
            raise UserError(f"--procs {self.procs} need a GPU each, but --gpus is {self.gpus}.")
        if self.compiled:
            check_compiled(self.strategy)

    def directives(self) -> dict[str, str]:
        """Options of sbatch."""
        asked = {
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": self.gpus or None,
            "cpus-per-task": self.cpus,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
        }
        return {name: str(value) for name, value in asked.items() if value is not None}

    def environment(self) -> dict[str, str]:
        """Variables that node.sh reads."""
        found = {"SHARDGAN_PROCS": str(self.procs), "SHARDGAN_PRECISION": self.precision}
        found |= {"SHARDGAN_STRATEGY": self.strategy} if self.strategy else {}
        found |= {"SHARDGAN_COMPILE": "inductor"} if self.compiled else {}
        # Slurm may not hide the GPUs of a node from a job that asked for none.
        return found | ({} if self.gpus else {"ACCELERATE_USE_CPU": "${ACCELERATE_USE_CPU:-1}"})


@dataclass(frozen=True)
class BatchJob:
    """A batch file, and its options for sbatch's command line: there they override the user's SBATCH_*
    variables, which override those in the file."""

    text: str
    options: tuple[str, ...]


def render(
    name: str,
    folder: Path,
    line: Sequence[str],
    resources: Resources,
    user: Mapping[str, str | None] | None = None,
    **more: str,
) -> BatchJob:
    """The batch file of a job in `folder`.

    line: a script of slurm/ and its arguments; node.sh is run as one task. user: options of sbatch that the
    user gives (`parse_options`), in place of ours. more: further options. Raises UserError.
    """
    for path in (str(folder), str(Path.cwd())):
        if not path.isprintable() or {"%", "\\"} & set(path):
            raise UserError(
                f"{path!r}: Slurm gives % and \\ in the path of a log another meaning. Choose another "
                "run.name or run.out, or call from another folder."
            )
    if ":" in str(folder):
        raise UserError(f"{folder}: Python finds no code in a path with a colon. Choose another run.name.")
    user = user or {}
    ours = resources.directives().items()
    options: dict[str, str | None] = {
        "job-name": re.sub(r"[^\w.+=-]", "_", name, flags=re.ASCII),
        **{name: value for name, value in ours if not _INSTEAD.get(name, set()) & {*user}},
        **more,
        "chdir": str(Path.cwd()),
        "output": f"{folder}/{'%A_%a' if 'array' in more else '%j'}.log",
        "open-mode": "append",
        "signal": "B:USR1@120",
        **({} if "no-requeue" in user else {"requeue": None}),
        **user,
    }
    variables = {"SHARDGAN_CODE": f"{folder}/code", "SHARDGAN_INDEX": f"{folder}/{_INDEX}"}
    # The Python of this process, unless SHARDGAN_VENV or a container brings another.
    variables |= {"VIRTUAL_ENV": sys.prefix, "SHARDGAN_PYTHON": sys.executable, **resources.environment()}
    script, *arguments = line
    # As in train.sbatch: all variables reach the step, and CPUs are counted in one way, and not as a shell
    # within another job had them.
    step = "unset SLURM_EXPORT_ENV SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK SLURM_MEM_PER_{CPU,GPU,NODE}\n"
    if script == "node.sh":
        step += "[[ ! ${SLURM_CPU_BIND-} =~ (mask|map)_ ]] || unset SLURM_CPU_BIND{,_LIST,_TYPE,_VERBOSE}\n"
        step += "exec ${SHARDGAN_SRUN:+srun --ntasks=1 $SHARDGAN_SRUN}"
    else:
        step += "exec"
    text = "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Made by shardgan {own_version()} for {getpass.getuser()}: {_this_command()}",
            *(f"#SBATCH {_option(key, value, _quoted)}" for key, value in options.items()),
            *(f"export {key}={_exported(value)}" for key, value in variables.items()),
            f'{step} bash "$SHARDGAN_CODE/slurm/{script}" {shlex.join(arguments)}',
            "",
        ]
    )
    return BatchJob(text, tuple(_option(key, value) for key, value in options.items()))


def parse_options(words: Sequence[str]) -> dict[str, str | None]:
    """Options of sbatch by name, as a user writes them: --mem=64G, --mem 64G, -C a100, --exclusive (None).

    Raises UserError for what is no option, and for options that would break the job.
    """
    found: dict[str, str | None] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else None
        elif word.startswith("-") and len(word) > 1:
            name = _LONG.get(word[1], word[1])
            found[name] = word[2:] or None
        elif name and found[name] is None:
            found[name] = word
        else:
            raise UserError(f"{word!r}, after --, is no option of sbatch, as --mem=64G.")
    for name in found:  # sbatch takes beginnings of options too
        if len(name) > 1 and any(option.startswith(name) for option in _OURS):
            raise UserError(f"--{name}, after --, would break the job. Leave it out.")
    if short := [name for name in found if len(name) == 1]:
        raise UserError(f"-{short[0]}, after --: write sbatch's long option instead.")
    return found


def _option(name: str, value: str | None, quoted: Callable[[str], str] = str) -> str:
    return f"--{name}" if value is None else f"--{name}={quoted(value)}"


def _this_command() -> str:
    """The command line of this process, in one line and without credentials."""
    return one_line(shlex.join(["shardgan", *map(redacted, sys.argv[1:])]))


def check(batch: BatchJob) -> None:
    """Ask Slurm whether it would take a batch file. Raises UserError if not, or if there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "There is no `sbatch` on this machine, so no Slurm to submit to. Call this on a login node of "
            "the cluster; here, `shardgan train` trains."
        )
    _sbatch("--test-only", *batch.options, text=batch.text)


def keep(folder: Path, data: Iterable[Data]) -> None:
    """Copy the code and what this machine's cache knows of the data to a job's folder: later edits must not
    change a job that waits. Raises UserError."""
    try:
        shutil.rmtree(folder / "code", ignore_errors=True)
        for part in (ROOT / "pipeline", ROOT / "launch", slurm_scripts()):
            to = folder / "code" / part.name.removeprefix("_")
            shutil.copytree(part, to, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Set run.out.") from None
    for one in data:
        index_copies.keep(one, folder / _INDEX)


def write(file: Path, text: str) -> None:
    """Write a file of a job, and the folders it is in. Raises UserError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"{file.parent} cannot be written: {error.strerror or error}. Set run.out.") from None


def submit(folder: Path, batch: BatchJob, *options: str, name: str = "job.sbatch") -> str:
    """Write a batch file into its folder and submit it; returns the job's id.

    Raises UserError with Slurm's reason if it refuses the job.
    """
    write(folder / name, batch.text)
    said = _sbatch("--parsable", *batch.options, *options, str(folder / name))
    if not said.split():
        raise UserError(f"sbatch named no job. Was it submitted (squeue --me)? It is {folder / name}.")
    return said.split()[-1].split(";")[0]  # after a site's greeting, before the cluster's name


def refuse_credentials(texts: Sequence[str]) -> None:
    """Raises UserError if a URL holds credentials: a job reads its settings from files."""
    if found := next((text for text in texts if scrubbed(text) != text), None):
        raise UserError(
            f"{scrubbed(found)}: a user, password or signature in a URL would be written to the files of the "
            "job. Give it by ~/.netrc or the environment, which reach the nodes."
        )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals wait until the id of a job that is being submitted is recorded: it would run unknown to us."""
    received: list[int] = []
    before = {each: signal.signal(each, lambda number, _: received.append(number)) for each in STOP_SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    for number in received:
        signal.raise_signal(number)


def record(file: Path, ids: Sequence[str]) -> None:
    """Write the ids of submitted jobs, for `queued`. They run all the same if that fails: it warns."""
    try:
        durable.write(file, f"{' '.join(ids)}\n")
    except OSError as error:
        print(
            f"warning: submitted as job {', '.join(ids)}, but {file} cannot be written: {why(error)}. Do not "
            "repeat the command while that runs: two jobs would write one folder.",
            file=sys.stderr,
        )


def queued(file: Path) -> tuple[str, str] | None:
    """The first job, of the ids in a file, that is still in the queue, and its state."""
    jobs = file.read_text().split() if file.exists() else []
    return next(((job, found) for job in jobs if (found := state(job))), None)


def state(job: str) -> str | None:
    """PENDING, RUNNING … of a job in the queue; None if it has left the queue, or without Slurm.

    Raises UserError if Slurm does not answer: to submit what is in the queue again would do harm.
    """
    if shutil.which("squeue") is None:
        return None
    ended = _call("squeue", "--noheader", "--jobs", job, "--format=%T")
    if ended.returncode and "Invalid job id" not in ended.stderr:
        raise UserError(
            f"Is job {job} still in the queue? squeue: {one_line(ended.stderr.strip())}. Try again."
        )
    return ended.stdout.split()[0] if ended.returncode == 0 and ended.stdout.split() else None


def cancel(job: str) -> None:
    _call("scancel", job)


def _quoted(value: str) -> str:
    """As sbatch reads its directives."""
    if re.fullmatch(r"[\w./:%@+=,-]+", value, flags=re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _exported(value: str) -> str:
    return value if value.startswith("${") else shlex.quote(value)


def _hint(reason: str) -> str:
    """What the cluster allows, where Slurm does not say."""
    if "artition" in reason:
        found = _call("sinfo", "--noheader", "--format=%R").stdout.split()
        return f" Partitions here: {', '.join(dict.fromkeys(found))}." if found else ""
    if "job array" in reason:
        found = re.findall(r"MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config").stdout)
        return f" Arrays here have fewer than {found[0]} jobs (MaxArraySize)." if found else ""
    return ""


def _sbatch(*arguments: str, text: str = "") -> str:
    ended = _call("sbatch", *arguments, text=text)
    if ended.returncode:
        reason = " ".join(re.sub(r"\b(sbatch|allocation failure): (error: )?", "", ended.stderr).split())
        raise UserError(f"Slurm did not take the job: {reason}.{_hint(reason)}")
    return ended.stdout


def _call(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    # Ctrl-C in a terminal reaches all processes of its session. A user's SQUEUE_STATES would hide jobs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        input=text,
        start_new_session=True,
        env=environment,
    )
