"""Inside a Slurm allocation, before training: can these nodes train together? Called by slurm/node.sh.

`plan WORLD CONFIG …` runs on the first node: checks what can be checked, describes the node in a file, and
prints the run folder, that file, the address to meet at, a free port and the signal to stop by. `check FILE
CONFIG …` runs on every node and compares it with that description.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.slurm import index_copies
from pipeline import config
from pipeline.config import Config, UserError
from pipeline.credentials import redacted
from pipeline.durable import write

_PACKAGES = ("torch", "accelerate", "deepspeed", "webdataset", "numpy", "pillow", "wandb")
_SEEN_WITHIN = 5  # seconds for a shared file system to show one node what another wrote

Description = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 with one message that names the node."""
    what, where, path, *overrides = arguments
    node = os.environ.get("SHARDGAN_NODE") or socket.gethostname()
    try:
        settings = config.load(path, overrides)
        if what == "plan":
            print(*plan(settings, int(where), node), sep="\n")
        else:
            check(settings, Path(where), node)
    except UserError as error:
        print(f"error: {node}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def plan(settings: Config, world: int, node: str) -> tuple[Path, Path, str, int, str]:
    """The run folder, this node's description in it, where to meet (address, port), the signal to stop by."""
    from launch.train import check_space
    from pipeline.parallel.batch import batch_shape
    from pipeline.run.folder import check_same

    if not settings.run.resume:
        raise UserError(
            "run.resume=false would start anew at every requeue. Give the run another run.name "
            "(`shardgan submit` does so by itself)."
        )
    batch_shape(settings.data, world)
    folder = (Path(settings.run.out) / str(settings.run.name)).absolute()
    if "\n" in str(folder):
        raise UserError("run.out and run.name must not contain a line break.")
    check_same(settings, folder)
    check_space(Path(settings.run.out))
    _warn_of_few_cpus(settings, node)
    index_copies.bring(settings.data)
    # Another name after each requeue: what a node has in its cache may be of the start before.
    description = folder / "slurm" / f"nodes-{os.environ['SLURM_JOB_ID']}-{_restarts()}.json"
    try:
        write(description, json.dumps(describe(settings, node), indent=1))
    except OSError as error:
        raise UserError(f"{description.parent} cannot be written ({error.strerror}). Set run.out.") from None
    return folder, description, node, _port(), settings.run.stop_signal


def check(settings: Config, first: Path, node: str) -> None:
    """Raises UserError where this node differs from the first, which described itself in a file, or cannot
    do its share. What is known of the data where the job was submitted is brought here."""
    there = _read(first)
    index_copies.bring(settings.data)
    here = describe(settings, node)
    other = there["node"]
    differing = [
        f"  {name}: {version} here, {there['versions'].get(name)} on {other}"
        for name, version in here["versions"].items()
        if version != there["versions"].get(name)
    ]
    if differing:
        raise UserError(
            "\n".join(
                [
                    f"other versions than {other}:",
                    *differing,
                    "Install the same everywhere (bash launch/setup.sh), or set SHARDGAN_VENV to one "
                    "environment that all nodes see.",
                ]
            )
        )
    if here["procs"] != there["procs"]:
        raise UserError(
            f"{here['procs']} processes here, {there['procs']} on {other}, as they were given GPUs. Ask for "
            "them by --gpus-per-node, or set SHARDGAN_PROCS."
        )
    if here["code"] != there["code"]:
        raise UserError(
            f"the code in {Path(__file__).parents[2]} is not that of {other}. Put it where all nodes see it."
        )
    if here["shards"] != there["shards"]:
        train = redacted(str(settings.data.train))
        raise UserError(f"the shards of data.train={train} are not those that {other} sees.")
    _check_gpus(int(here["procs"]))


def _read(first: Path) -> Description:
    """What the first node wrote, once the shared file system shows all of it here."""
    deadline = time.monotonic() + _SEEN_WITHIN
    while True:
        try:
            there: Description = json.loads(first.read_text())
            return there
        except (OSError, ValueError) as error:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            if isinstance(error, ValueError):
                raise UserError(
                    f"{first} is not whole here {_SEEN_WITHIN} s after the first node wrote it: the file "
                    "system that the nodes share lags. Submit again, or set run.out to another one."
                ) from None
            raise UserError(
                f"the run folder {first.parent.parent} is not the one of the first node: it must lie on a "
                "file system that all nodes share. Set run.out."
            ) from None


def _check_gpus(procs: int) -> None:
    """A GPU for each process here, unless they are to train on CPUs. Raises UserError."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return
    import torch

    gpus = torch.cuda.device_count()
    if gpus < procs:
        found = f"torch {torch.__version__} can use {gpus} GPUs here"
        raise UserError(
            f"{procs} processes, but {found}. Ask for as many by --gpus-per-node, or lower SHARDGAN_PROCS; "
            "if they are there (`nvidia-smi -L`), install a torch that fits the node's driver (bash "
            "launch/setup.sh). ACCELERATE_USE_CPU=1 trains on CPUs."
        )


def _warn_of_few_cpus(settings: Config, node: str) -> None:
    """Many clusters give one CPU to a task that asks for none."""
    cpus, procs = (int(os.environ.get(name) or 0) for name in ("SHARDGAN_CPUS", "SHARDGAN_PROCS"))
    if cpus and (needed := procs * (1 + settings.data.workers)) > cpus:
        print(
            f"warning: {node}: {cpus} CPUs for {procs} processes with {settings.data.workers} loaders each "
            f"(data.workers), which wait for each other. Ask for --cpus-per-task={needed}.",
            file=sys.stderr,
        )


def describe(settings: Config, node: str) -> Description:
    """What must be the same on every node."""
    return {
        "node": node,
        "procs": os.environ.get("SHARDGAN_PROCS", "1"),
        "versions": versions(),
        "code": code(),
        "shards": _shards(settings),
    }


def versions() -> dict[str, str]:
    """Of Python and what training depends on. Raises UserError for what is not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"{name} is not installed for {sys.executable}. Install the project there (bash "
                "launch/setup.sh), or set SHARDGAN_VENV."
            ) from None
    return found


def code() -> str:
    """A hash of the project's own files."""
    root = Path(__file__).parents[2]
    files = sorted(p for top in ("pipeline", "launch") for p in (root / top).rglob("*.py"))
    return _digest([[str(p.relative_to(root)), p.read_text("utf-8")] for p in files])


def _shards(settings: Config) -> str:
    """Names and sizes of the shards this node sees; those behind a URL are the same for all."""
    from pipeline.data.locate import locate

    train = str(settings.data.train)
    if "://" in train:
        return _digest(redacted(train))
    try:
        found = locate(train)
        return _digest([[url, (found.root / url).stat().st_size] for url in found.urls])
    except (UserError, OSError) as error:
        raise UserError(f"{error} The data must lie where every node sees it (data.train).") from None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _port() -> int:
    """SHARDGAN_PORT, or a port that no other job on this node has; another one after a requeue."""
    from launch.processes import is_free

    asked = os.environ.get("SHARDGAN_PORT")
    if asked is not None and not (asked.isdecimal() and 0 < int(asked) < 65536):
        raise UserError(f"SHARDGAN_PORT={asked} is not a port.")
    if asked is not None and not is_free(int(asked)):
        raise UserError(f"port {asked} is in use. Set SHARDGAN_PORT to another one, or leave it unset.")
    if asked is not None:
        return int(asked)
    # Below the ports that systems hand out by themselves.
    start = 12_000 + (int(os.environ["SLURM_JOB_ID"]) * 16 + _restarts()) % 20_000
    free = next((port for port in range(start, start + 100) if is_free(port)), None)
    if free is None:
        raise UserError(f"ports {start} to {start + 99} are all in use. Set SHARDGAN_PORT.")
    return free


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
