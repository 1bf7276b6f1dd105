"""A real Slurm cluster of two nodes on this machine: a head, n1 and n2.

Each is a machine of its own as far as Slurm and the jobs can tell: own network, host name, processes, hosts
file and disk (one folder); all else is shared, like a cluster's file system. Needs root and Debian's
`slurm-wlm munge`, and leaves nothing behind outside its folder.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare")
ADDRESSES = {"head": "10.77.0.1", "n1": "10.77.0.11", "n2": "10.77.0.12"}
DEADLINE = 280.0  # seconds within which anything here ends, also on a busy machine; never waited for
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")

Seen = dict[str, str]  # what Slurm says of a job
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

SLURM_CONF = """
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2,sched_min_interval=0
KillWait={kill_wait}
SlurmdTimeout=10
MinJobAge=3600
MaxArraySize=30
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeAddr={n1} CPUs=8 Gres=gpu:4
NodeName=n2 NodeAddr={n2} CPUs=6 Gres=gpu:4
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0 PreemptMode=OFF
PartitionName=urgent Nodes=n1,n2 PriorityTier=9 PreemptMode=OFF Hidden=YES
PartitionName=spare Nodes=n1,n2 PreemptMode=REQUEUE Hidden=YES
PartitionName=gentle Nodes=n1,n2 PreemptMode=REQUEUE GraceTime=100 Hidden=YES
"""


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    absent = [name for name in NEEDED if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"Slurm is not installed: no {', '.join(absent)} (apt-get install slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "a cluster of network namespaces needs root"
    command = ["unshare", "--net", "--pid", "--fork", "true"]
    probe = subprocess.run(command, check=False, capture_output=True, text=True)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Machine:
    """Namespaces with one command running in them; the command is process 1, and ends everything with it."""

    def __init__(self, name: str, folder: Path, script: str) -> None:
        self.name, self.folder = name, folder
        local = folder / f"local-{name}"
        local.mkdir(exist_ok=True)
        mounts = (f"{folder}/hosts /etc/hosts", f"{local} {folder}/local")
        ready = "; ".join([f"hostname {name}", *(f"mount --bind {mount}" for mount in mounts)])
        with (folder / f"{name}.out").open("ab") as out:
            self._holder = subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "bash", "-c", f"{ready}; ip link set lo up; echo ready; read; {script}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True,
                env=_environment(folder), preexec_fn=_die_with_parent,  # noqa: PLW1509
            )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n", (folder / f"{name}.out").read_text()
        holder = self._holder.pid
        self.pid = int(Path(f"/proc/{holder}/task/{holder}/children").read_text())

    def start(self) -> None:
        """The network is there: run the command."""
        assert self._holder.stdin is not None
        self._holder.stdin.write("\n")
        self._holder.stdin.flush()

    def enter(self) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid"]

    def kill(self) -> None:
        """The machine loses power."""
        if self._holder.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._holder.wait()


class Cluster:
    """Two nodes, n1 and n2, with 8 CPUs and 4 (pretended) GPUs each, and a head to submit from."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # short: it holds unix sockets
        self.local = self.folder / "local"  # a disk that every node has its own of
        self.machines: dict[str, _Machine] = {}
        for name in ("local", "state"):
            (self.folder / name).mkdir()
        hosts = [f"{address} {name}" for name, address in ADDRESSES.items()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        conf = SLURM_CONF.format(folder=self.folder, kill_wait=8, **ADDRESSES)
        (self.folder / "slurm.conf").write_text(conf)
        gpus = [self.folder / f"gpu{n}" for n in range(4)]
        for gpu in gpus:
            gpu.touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._munged = subprocess.Popen(
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
             f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log",
             f"--seed-file={self.folder}/munge.seed"],
            env=_environment(self.folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,  # noqa: PLW1509
        )  # fmt: skip
        _until((self.folder / "munge.socket").exists, "munged")
        head = self._boot("head", "exec slurmctld -D")
        self._inside(head, "ip", "link", "add", "bridge", "type", "bridge")
        self._inside(head, "ip", "addr", "add", f"{ADDRESSES['head']}/24", "dev", "bridge")
        self._inside(head, "ip", "link", "set", "bridge", "up")
        head.start()
        for name in ("n1", "n2"):
            self.boot(name)
        self.until_up()

    # Machines

    def boot(self, name: str) -> None:
        """Switch a node on."""
        node, head = self._boot(name, f"exec slurmd -D -N {name}"), self.machines["head"]
        self._inside(head, "ip", "link", "delete", name, check=False)  # what a dead node left behind
        cable = ["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0"]
        self._inside(head, *cable)
        self._inside(head, "ip", "link", "set", name, "master", "bridge", "up")
        # Moved from outside: only there do process numbers mean the same.
        subprocess.run(
            ["nsenter", f"--target={head.pid}", "--net", "ip", "link", "set", "eth0", "netns", str(node.pid)],
            check=True, env=_environment(self.folder),
        )  # fmt: skip
        self._inside(node, "ip", "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
        self._inside(node, "ip", "link", "set", "eth0", "up")
        node.start()

    def until_up(self) -> None:
        _until(lambda: self.idle_or_busy() == 2, "both nodes being up", lambda: self.run("sinfo").stdout)

    def idle_or_busy(self) -> int:
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").stdout.split()
        return sum(state in ("idle", "mixed", "allocated", "completing") for state in lines)

    def processes(self, name: str) -> list[str]:
        """Command lines on a node, other than Slurm's own."""
        pid = self.machines[name].pid
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                same = (entry / "ns/pid").readlink() == Path(f"/proc/{pid}/ns/pid").readlink()
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            if same and line and not line.startswith(("slurmd", "slurmstepd")):
                found.append(f"{entry.name} {line}")
        return found

    def close(self) -> None:
        for machine in reversed(self.machines.values()):
            machine.kill()
        self._munged.kill()
        self._munged.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Commands, as typed on the head

    def run(
        self, *command: str, cwd: Path | None = None, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [*self.machines["head"].enter(), f"--wd={cwd or self.folder}", *command],
            check=False,
            env=_environment(self.folder) | environment, capture_output=True, text=True, timeout=DEADLINE,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
        return ended

    def clients(self) -> Path:
        """A folder with Slurm's commands for a PATH outside, as if this process ran on the head."""
        folder = self.folder / "clients"
        folder.mkdir(exist_ok=True)
        for name in ("sbatch", "scancel", "squeue", "sinfo"):
            enter = " ".join([shutil.which("nsenter") or "", *self.machines["head"].enter()[1:]])
            command = f'{enter} --wd="$PWD" {shutil.which(name, path=_PATH)} "$@"'
            (folder / name).write_text(
                f"#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf PATH={_PATH} exec {command}\n"
            )
            (folder / name).chmod(0o755)
        return folder

    def sbatch(self, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
        """Submit; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **environment).stdout.strip()

    def job(self, job: str) -> Seen:
        """What `scontrol show job` knows."""
        ended = self.run("scontrol", "-o", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(.*?)(?: (?=\S+=)|\n|$)", ended.stdout))

    def until(self, job: str, happened: Callable[[Seen], bool]) -> Seen:
        """Come back as soon as a job is seen in a condition; fails if it ends without."""
        seen: Seen = {}

        def report() -> str:
            log = Path(seen.get("StdOut", "/nowhere"))
            return f"{seen}\n{log.read_text(errors='replace') if log.is_file() else 'no log'}"

        def look() -> bool:
            nonlocal seen
            seen = self.job(job)
            found = happened(seen)
            assert found or seen["JobState"] not in ENDED, f"job {job} has ended:\n{report()}"
            return found

        _until(look, f"job {job}", report)
        return seen

    def ended(self, job: str) -> Seen:
        """Wait for the end of a job for good (not one that is requeued)."""
        return self.until(job, lambda seen: seen["JobState"] in ENDED)

    def _boot(self, name: str, script: str) -> _Machine:
        self.machines[name] = _Machine(name, self.folder, script)
        return self.machines[name]

    def _inside(self, machine: _Machine, *command: str, check: bool = True) -> None:
        ended = subprocess.run(
            [*machine.enter(), *command],
            check=False,
            env=_environment(self.folder),
            capture_output=True,
            text=True,
        )
        assert not check or ended.returncode == 0, f"{command}: {ended.stderr}"


def _environment(folder: Path) -> dict[str, str]:
    keep = {name: os.environ[name] for name in ("HOME", "LANG", "USER", "LOGNAME") if name in os.environ}
    return {"PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf"), "LC_ALL": "C.UTF-8"} | keep


def _until(happened: Callable[[], bool], what: str, report: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < end, f"{what}: not within {DEADLINE:g} s\n{report()}"
        time.sleep(0.1)
