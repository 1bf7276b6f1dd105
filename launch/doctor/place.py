"""Doctor's checks of where a job runs: versions, disks, names and ports, and W&B."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from packaging.requirements import Requirement

from launch.doctor.finding import Finding, Job, ok, some, warning, would_fail
from launch.doctor.networks import Players
from launch.processes import check_space, is_free
from pipeline.config import UserError
from pipeline.data.index import Index
from pipeline.folders import cache_folder
from pipeline.gan.frozen import frozen_names, sizes
from pipeline.parallel.theory import moments_of
from pipeline.run.features import load_features
from pipeline.run.images import images_of
from pipeline.run.wandb_mode import choose_mode, in_a_line, names, refusals
from pipeline.wording import counted, in_bytes

_CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
_PORT = 29500  # Accelerate's default

# Packages whose versions matter, and what goes wrong outside the supported range.
_DELICATE = {
    "torch": "older ones load checkpoints unsafely (CVE-2025-32434, CVE-2026-24747) and lack parts of FSDP2",
    "accelerate": "older ones start each FSDP or DeepSpeed process alone on a CPU, silently",
    "deepspeed": "others keep gradients in other places, and some sum them wrongly without an error",
    "webdataset": "older ones have no WDS_SECURE and unpickle parts of a shard",
    "wandb": "older ones resume a run in another way",
}


def examine(job: Job) -> list[Finding]:
    """The checks that need neither data nor networks."""
    return [*versions(job), *rendezvous(job), *processors(job), *features(job), *tracker(job)]


def versions(job: Job) -> Iterator[Finding]:
    """Are they supported, and those that are tested together?"""
    required, tested = _requirements(_required()), _requirements(_CONSTRAINTS.read_text().splitlines())
    here, outside, untested = [], [], []
    for name, reason in _DELICATE.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            outside.append(f"{name} is not installed")
            continue
        here.append(f"{name} {version}")
        if name in required and not required[name].specifier.contains(version, prereleases=True):
            outside.append(f"{name} {version} is not {required[name].specifier}: {reason}")
        elif not tested[name].specifier.contains(version.partition("+")[0], prereleases=True):
            untested.append(f"{name} {version}, tested is {str(tested[name].specifier).removeprefix('==')}")
    if outside:
        remedy = "`bash launch/setup.sh` installs the versions that are tested together."
        yield would_fail("versions", some(outside), remedy)
    elif untested:
        remedy = "Compare with plain torch once: `shardgan selfcheck`."
        yield warning("versions", some(untested), remedy)
    else:
        yield ok("versions", f"{', '.join(here)}: as tested together")


def _required() -> Sequence[str]:
    """The project's dependencies: of what is installed, else (found by PYTHONPATH) of its checkout."""
    try:
        return importlib.metadata.requires("shardgan") or ()
    except importlib.metadata.PackageNotFoundError:
        checkout = Path(__file__).parents[2] / "pyproject.toml"
        if not checkout.exists():
            return ()
        found: list[str] = tomllib.loads(checkout.read_text())["project"]["dependencies"]
        return found


def _requirements(lines: Sequence[str]) -> dict[str, Requirement]:
    found = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {requirement.name: requirement for requirement in found}


def space(job: Job, players: Players, index: Index | None) -> Iterator[Finding]:
    """Is there room for checkpoints in the run folder, and in the cache?"""
    run, optim = job.config.run, job.config.optim
    of_G, of_D = (4 * sizes(player)[0] for player in players)
    moments = [moments_of(optimizer) for optimizer in (optim.G, optim.D)]
    frozen, D = frozen_names(players[1], job.config.D.freeze), players[1].named_parameters()
    checkpoint = 4 * sum(p.numel() for name, p in D if name in frozen)
    checkpoint += of_G + sum(size * (1 + n) for size, n in zip((of_G, of_D), moments, strict=True))
    kept = run.keep + bool(job.config.score.metrics)  # the one with the best score
    needed = checkpoint * (kept + 1) + (64 << 20)  # the oldest is deleted when the newest is complete
    out = Path(run.out)
    there = _bytes_in(out / str(run.name) / "checkpoints")
    text = f"a checkpoint is {in_bytes(checkpoint)}, {kept} are kept and one more is written"
    try:
        check_space(out, max(64, (needed - there) >> 20))
        yield ok("run folder", f"{text}: {in_bytes(needed)}, room in {out}/")
    except UserError as error:
        yield would_fail("run folder", f"{text}: {in_bytes(needed)} are needed. {error}")
    yield from _cache(job, index)


def _bytes_in(folder: Path) -> int:
    """Of all files in it, some of which a training may remove meanwhile."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total


def _cache(job: Job, index: Index | None) -> Iterator[Finding]:
    """A warning or nothing: the cache is small and can be rebuilt."""
    needed = (40 * index.num_samples if index else 0) + 5120 * job.config.score.images
    place = next(p for p in (cache_folder(), *cache_folder().parents) if p.exists())
    writable, free = os.access(place, os.W_OK), shutil.disk_usage(place).free
    if not writable or free < needed:
        state = f"has {in_bytes(free)} free" if writable else "is not writable"
        remedy = "Set SHARDGAN_CACHE to a folder with space, or every run rebuilds indices and features."
        yield warning("cache", f"{cache_folder()} {state}; {in_bytes(needed)} may be needed", remedy)


def rendezvous(job: Job) -> Iterator[Finding]:
    """Do the nodes' names resolve, and is the port free here?"""
    if job.machine.remote:  # than what is allocated to this process, if anything is
        return
    nodes = allocated()
    hosts = nodes or [socket.gethostname()]
    lost = [host for host in hosts if not _resolves(host)]
    if lost:
        remedy = "Add them to DNS or /etc/hosts on every node."
        yield would_fail("rendezvous", f"cannot be resolved here: {', '.join(lost)}", remedy)
        return
    if nodes and len(nodes) < job.nodes:
        text = f"{job.nodes} nodes, but this allocation has {len(nodes)}"
        yield would_fail("rendezvous", text, "Lower --nodes, or allocate more.")
        return
    if job.strategy != "single" and not is_free(_PORT):
        text = f"port {_PORT} is in use on {socket.gethostname()}"
        remedy = f"`shardgan train` picks a free one; else give --main_process_port, other than {_PORT}."
        yield warning("rendezvous", text, remedy)
        return
    names = hosts[0] if len(hosts) == 1 else f"{hosts[0]} and {len(hosts) - 1} more"
    yield ok("rendezvous", f"{names}: resolved; port {_PORT} is free here")


def processors(job: Job) -> Iterator[Finding]:
    """In an allocation: enough for processes and loaders? By default many clusters give one."""
    cpus, workers = None if job.machine.remote else allocated_cpus(), job.config.data.workers
    needed = job.gpus * (1 + workers)
    if cpus is not None and cpus < needed:
        text = (
            f"{counted(cpus, 'CPU')} per node for {counted(job.gpus, 'process')} with "
            f"{counted(workers, 'loader')} each"
        )
        yield warning("processors", text, f"Ask for --cpus-per-task={needed}, or lower data.workers.")


def allocated_cpus() -> int | None:
    """Per task, else of the node of this allocation with the fewest; None outside one."""
    per_node = re.findall(r"(\d+)(?:\(x\d+\))?", os.environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    asked = os.environ.get("SLURM_CPUS_PER_TASK")
    return int(asked) if asked else min(map(int, per_node), default=None)


def allocated() -> list[str]:
    """The nodes of the allocation that this is called in, if any."""
    if not os.environ.get("SLURM_JOB_NODELIST"):
        return []
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def features(job: Job) -> Iterator[Finding]:
    """Can the features that scores are computed from be loaded, and what makes images of latents?"""
    score = job.config.score
    try:
        images_of(job.config.data, torch.device("cpu"))
    except UserError as error:
        yield would_fail("decoder", str(error), "Set data.decoder.")
    if score.metrics:
        try:
            load_features(score.features)
        except (UserError, OSError, ImportError) as error:
            yield would_fail("features", str(error), "Set score.features, or score.metrics=[] for no scores.")


def tracker(job: Job) -> Iterator[Finding]:
    """Would W&B be online? Neither a key nor a run is sent."""
    if not job.config.track.wandb:
        yield ok("W&B", "off (track.wandb=false)")
        return
    try:
        refused, (mode, reason), called = refusals(), choose_mode(), names(job.config)
    except Exception as error:  # the run does without
        yield warning("W&B", f"off: {in_a_line(error)}", "Mend this, or set track.wandb=false.")
        return
    if refused and mode != "disabled":
        yield warning("W&B", f"offline: {reason}", f"Mend or unset {', '.join(refused)}.")
    elif mode == "online":
        yield ok("W&B", f"online: a key is configured and the server answers; {called}")
    elif mode == "disabled":
        yield ok("W&B", "off (WANDB_MODE)")
    else:
        yield ok("W&B", f"offline ({reason}); `wandb sync` uploads the run later; {called}")
