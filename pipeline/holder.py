"""The process that holds a lock: how it describes itself, and whether it is gone."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import socket
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal
from uuid import uuid4

import psutil

State = Literal["at work", "gone", "unknown"]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # containers run users without an account
        return f"uid {os.getuid()}"


def kernel() -> str:
    """Equal for all containers of a machine, until it restarts."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def pid_namespace() -> str:
    path = Path("/proc/self/ns/pid")
    return str(path.readlink()) if path.exists() else ""


def state_of(pid: int) -> tuple[str, str]:
    """(state, start) of a process: the letter that `ps` shows, "X" if there is none, "?" if it is hidden; and
    its start, which changes of the clock do not affect."""
    try:
        os.kill(pid, 0)
        if sys.platform == "linux":
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            return fields[0].decode(), fields[19].decode()
        process = psutil.Process(pid)
        state = {psutil.STATUS_STOPPED: "T", psutil.STATUS_ZOMBIE: "Z"}.get(process.status(), "S")
        return state, str(process.create_time())
    except (ProcessLookupError, psutil.NoSuchProcess):
        return "X", ""
    except (OSError, psutil.Error):
        return "?", ""


def _job() -> tuple[str, tuple[int, ...]]:
    """The Slurm job or launcher of this process, if any, and how often it was restarted."""
    env = os.environ
    counts = (env.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    restarts = tuple(int(count) if count.isdecimal() else 0 for count in counts)
    if job := env.get("SLURM_JOB_ID"):
        return f"slurm {env.get('SLURM_CLUSTER_NAME', '')} {job}", restarts
    if "TORCHELASTIC_RESTART_COUNT" in env:
        return f"launcher {socket.gethostname()} {os.getppid()}", restarts
    return "", restarts


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock."""

    place: str  # of its lock file, with links resolved
    flocked: bool  # whether it has a `flock` on that file
    token: str = field(default_factory=lambda: uuid4().hex)
    host: str = field(default_factory=socket.gethostname)
    user: str = field(default_factory=_user)
    pid: int = field(default_factory=os.getpid)
    started: str = field(default_factory=lambda: state_of(os.getpid())[1])
    kernel: str = field(default_factory=kernel)
    pids: str = field(default_factory=pid_namespace)  # in which its pid means something
    since: str = field(default_factory=lambda: datetime.now().isoformat(" ", "minutes"))
    job: tuple[str, tuple[int, ...]] = field(default_factory=_job)

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.user}) on {self.host} since {self.since}"

    @property
    def precedes_us(self) -> bool:
        """Whether it is an earlier attempt of this process's job, and so about to end."""
        job, restarts = _job()
        return bool(job) and self.job[0] == job and self.job[1] < restarts

    def state(self, lock: Path) -> State:
        """What can be seen at once of the process described in the file `lock`."""
        if self.kernel != kernel():
            return "unknown"
        if (self.host, self.pids) == (socket.gethostname(), pid_namespace()):
            state, started = state_of(self.pid)
            if state == "?" or (state == "T" and started == self.started):  # hidden, or suspended
                return "unknown"
            if state not in "ZX" and started == self.started:
                return "at work" if self.place == os.path.realpath(lock) else "unknown"  # a copied folder
            if not self.flocked:
                return "gone"
        # Its children may live a moment longer, and have the `flock` as well.
        return "gone" if self.flocked and _is_free(lock) else "unknown"


def read_holder(content: bytes) -> Holder | None:
    """The holder described in a lock file; None if the file is just being written."""
    try:
        values = json.loads(content.split(b"\n")[0])
        name, restarts = values.pop("job")
        return Holder(**values, job=(name, tuple(restarts)))
    except (ValueError, TypeError, KeyError):
        return None


def flock(file: int) -> bool:
    """Take a `flock` on an open file; False where there is none, as on Lustre and NFS of some clusters."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_free(path: Path) -> bool:
    """Whether nobody has the `flock` of a file any more; False where that cannot be known."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
