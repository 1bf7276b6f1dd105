"""Inside a Slurm allocation, before training: can these nodes train together? Called by slurm/node.sh.

`plan WORLD CONFIG …` runs on the first node: checks what can be checked there, writes the node's fingerprint
to a file, prints the run folder, that file, the address to meet at, a free port, the signal to stop by, and
whether the run is "finished" or "unfinished".
`check FILE CONFIG …` runs on every node and compares it with that fingerprint.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.fingerprint import REMEDIES, Fingerprint, difference, digest, fingerprint, node_name
from launch.slurm import index_copies
from pipeline.config import Config, UserError, load
from pipeline.credentials import redacted
from pipeline.durable import write
from pipeline.parallel.environment import flag
from pipeline.parallel.gpus import gpus
from pipeline.wording import counted

_SEEN_WITHIN = 5  # seconds for a shared file system to show one node what another wrote


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 with one message that names the node."""
    task, where, path, *overrides = arguments
    try:
        config = load(path, overrides)
        if task == "plan":
            print(*plan(config, int(where)), sep="\n")
        else:
            check(config, Path(where))
    except UserError as error:
        print(f"error: {node_name()}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def plan(config: Config, world: int) -> tuple[Path, Path, str, int, str, str]:
    """The run folder, this node's fingerprint in it, where to meet (address, port), the signal to stop by,
    and whether the run is finished."""
    from launch.processes import check_space, shards
    from pipeline.parallel.batch import batch_shape
    from pipeline.run.folder import check_same, finished

    if not config.run.resume:
        raise UserError(
            "run.resume=false would start over at every requeue. Give the run another run.name "
            "(`shardgan submit` does so by itself)."
        )
    batch_shape(config.data, world)
    shards(os.environ.get("SHARDGAN_STRATEGY"), world, int(os.environ.get("SHARDGAN_PROCS") or world))
    folder = (Path(config.run.out) / str(config.run.name)).absolute()
    if "\n" in str(folder):
        raise UserError("run.out and run.name must not contain a line break.")
    check_same(config, folder)
    check_space(Path(config.run.out))
    _warn_of_few_cpus(config)
    index_copies.bring(config.data)
    # Another name after each requeue: a node's cache may still show the file of the previous start.
    file = folder / "slurm" / f"nodes-{os.environ['SLURM_JOB_ID']}-{_restarts()}.json"
    try:
        write(file, json.dumps(_fingerprint(config), indent=1))
    except OSError as error:
        raise UserError(f"{file.parent} cannot be written ({error.strerror}). Set run.out.") from None
    state = "finished" if finished(folder, config) else "unfinished"
    return folder, file, _host_name(), _port(), config.run.stop_signal, state


def check(config: Config, first: Path) -> None:
    """Raises UserError if this node differs from the first, whose fingerprint is in a file, or lacks GPUs.

    Brings the index of the data that the login node knew.
    """
    head, several = os.environ.get("SHARDGAN_HEAD"), os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1"
    if head and several and not _is_known(head):
        raise UserError(
            f"no address of {head} is known here, the first node, where all nodes meet. Ask the cluster's "
            "administrators for its entry in the DNS or in /etc/hosts."
        )
    there = _read(first)
    index_copies.bring(config.data)
    here = _fingerprint(config)
    for what, remedy in REMEDIES.items():
        if text := difference(what, here, there):
            raise UserError(f"{text}. {remedy}")
    if here["procs"] != there["procs"]:
        raise UserError(
            f"{counted(int(here['procs']), 'process')} here, {there['procs']} on {there['node']}, as they "
            "were given GPUs. Ask for them by --gpus-per-node, or set SHARDGAN_PROCS."
        )
    _check_gpus(int(here["procs"]))


def _fingerprint(config: Config) -> Fingerprint:
    return fingerprint(config, _shards(config)) | {"procs": os.environ.get("SHARDGAN_PROCS", "1")}


def _read(first: Path) -> Fingerprint:
    """What the first node wrote, once the shared file system shows all of it here."""
    deadline = time.monotonic() + _SEEN_WITHIN
    while True:
        try:
            there: Fingerprint = json.loads(first.read_text())
            return there
        except ValueError:
            problem = (
                f"{first} is incomplete here {_SEEN_WITHIN} s after the first node wrote it: the shared file "
                "system lags. Submit again, or set run.out to another one."
            )
        except OSError:
            problem = (
                f"the run folder {first.parent.parent} is not the one of the first node: it must lie on a "
                "file system that all nodes share. Set run.out."
            )
        if time.monotonic() > deadline:
            raise UserError(problem)
        time.sleep(0.2)


def _check_gpus(procs: int) -> None:
    """A GPU for each process here, unless they are to train on CPUs. Raises UserError."""
    if flag(os.environ, "ACCELERATE_USE_CPU"):
        return
    import torch

    if (found := gpus()) < procs:
        raise UserError(
            f"{counted(procs, 'process')}, but torch {torch.__version__} can use {counted(found, 'GPU')} "
            "here. Ask for as many by --gpus-per-node, or lower SHARDGAN_PROCS; if they are there "
            "(`nvidia-smi -L`), install a torch that fits the node's driver (bash launch/setup.sh). "
            "ACCELERATE_USE_CPU=1 trains on CPUs."
        )


def _warn_of_few_cpus(config: Config) -> None:
    """Many clusters give one CPU to a task that asks for none."""
    cpus, procs = (int(os.environ.get(name) or 0) for name in ("SHARDGAN_CPUS", "SHARDGAN_PROCS"))
    if cpus and (needed := procs * (1 + config.data.workers)) > cpus:
        print(
            f"warning: {node_name()}: {counted(cpus, 'CPU')} for {counted(procs, 'process')} with "
            f"{counted(config.data.workers, 'loader')} each (data.workers), which wait for each other. Ask "
            f"for --cpus-per-task={needed}.",
            file=sys.stderr,
        )


def _shards(config: Config) -> str:
    """Names and sizes of the shards this node sees; those behind a URL are the same for all."""
    from pipeline.data.locate import locate

    train = str(config.data.train)
    if "://" in train:
        return digest(redacted(train))
    try:
        found = locate(train)
        return digest([[url, (found.root / url).stat().st_size] for url in found.urls])
    except (UserError, OSError) as error:
        raise UserError(f"{error} {REMEDIES['data']}") from None


def _host_name() -> str:
    """What other nodes call this one: Slurm's name, or the machine's own if that is no host name."""
    name = node_name()
    return name if _is_known(name) else socket.gethostname()


def _is_known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _port() -> int:
    """SHARDGAN_PORT, or a port that no other job on this node has; another one after a requeue."""
    from launch.processes import is_free

    asked = os.environ.get("SHARDGAN_PORT")
    if asked:
        if not (asked.isdecimal() and 0 < int(asked) < 65536):
            raise UserError(f"SHARDGAN_PORT={asked} is not a port.")
        if not is_free(int(asked)):
            raise UserError(f"port {asked} is in use. Set SHARDGAN_PORT to another one, or leave it unset.")
        return int(asked)
    # Below the ports that systems hand out by themselves.
    start = 12_000 + (int(os.environ["SLURM_JOB_ID"]) * 16 + _restarts()) % 20_000
    free = next((port for port in range(start, start + 100) if is_free(port)), None)
    if free is None:
        raise UserError(f"ports {start} to {start + 99} are all in use. Set SHARDGAN_PORT.")
    return free


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
