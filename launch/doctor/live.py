"""`shardgan doctor --live`: start the processes, here or on the nodes of the allocation.

They meet as in a training, which finds what keeps them apart; then nodes report what they see.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from launch.doctor import worker as doctor_worker
from launch.doctor.alone import all_due
from launch.doctor.finding import Finding, Job, Machine, ok, warning, would_fail
from launch.doctor.flops import Flops, in_flops, of_training
from launch.doctor.place import allocated, allocated_cpus
from launch.fingerprint import REMEDIES, difference
from launch.processes import environment_of, launch, launcher_file, reasons, run
from pipeline.config import UserError
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.environment import threads
from pipeline.wording import counted, in_bytes

Node = dict[str, Any]  # from worker.describe or worker.place

_TIMEOUT_S = 300.0
_LONG = 2e11  # FLOPs, half a minute of a CPU
_MEET = (
    "Let the nodes reach each other: firewall, port, and the right interface (NCCL_SOCKET_IFNAME, "
    "GLOO_SOCKET_IFNAME)."
)


def examine(
    job: Job, flops: Flops | None, config: str, settings: Sequence[str]
) -> tuple[list[Finding], Machine]:
    """Start as many processes as there is room for, and compare what they report. Also returns the job's
    machine, with what they have measured."""
    found = _found(job, flops, config, settings)
    if isinstance(found, Finding):
        return [found], job.machine
    places, said = found
    seen = [*unlike(places), *compare(said["nodes"]), *speed(said)]
    of_step, rate = step(job, flops, said)
    return [*seen, *of_step], completed(job.machine, said, rate, several=len(places) > 1)


def completed(machine: Machine, said: dict[str, Any], flops: float | None, several: bool) -> Machine:
    """With what was measured, where nothing was given. several: nodes, between which a ring's slowest link
    is; else it is not known how fast those are."""
    sends = None if said["world"] == 1 else _rate(said)
    return replace(
        machine,
        flops=machine.flops or flops,
        bandwidth=machine.bandwidth or sends,
        network=machine.network or (sends if several else None),
    )


def step(job: Job, flops: Flops | None, said: dict[str, Any]) -> tuple[list[Finding], float | None]:
    """How fast a rank computes, and its FLOPs per second, if that was measured."""
    images, measured = said["images"], said["step"]
    if not images or flops is None:
        return [], None
    if isinstance(measured, str):
        return [ok("live: step", f"an update cannot be made on one rank alone ({measured})")], None
    text = f"one rank alone makes an update of {counted(images, 'image')} in {1000 * measured:.3g} ms"
    rate = images * of_training(all_due(job.config), *flops) / measured
    return [ok("live: step", f"{text}: {in_flops(rate)} per second")], rate


def _images(job: Job, flops: Flops | None, on_cpu: bool) -> int:
    """Of a rank and round, as the job would have them; 0 if a step with them says nothing, or would take
    long."""
    if flops is None:
        return 0
    try:
        images = batch_shape(job.config.data, job.world).images
    except UserError:
        return 0
    needed = images * of_training(all_due(job.config), *flops)
    return 0 if on_cpu and needed > _LONG else images


def _found(
    job: Job, flops: Flops | None, config: str, settings: Sequence[str]
) -> tuple[list[Node], dict[str, Any]] | Finding:
    """The nodes' places and what the main rank printed, or why there is none."""
    nodes = _other_nodes()
    where = ", ".join(nodes) or "this machine"
    try:
        places = [doctor_worker.place()]
        if nodes:
            ended = _srun(nodes, [sys.executable, "-m", "launch.doctor.worker"], dict(os.environ))
            places = read_places(ended)
        if nodes and (ended.returncode or len(places) < len(nodes)):
            return _failed(f"{where}, asked for their GPUs,", ended)
        per_node, on_cpu = fitting(job.gpus, places)
        where = f"{len(places)} x {counted(per_node, 'process')}"
        one = per_node * len(places) == 1
        strategy = "single" if one else job.strategy if job.strategy != "single" else "ddp"
        images = str(_images(job, flops, on_cpu))
        module = ["launch.doctor.worker", images, config, *settings]
        if nodes:
            ended = _on_nodes(strategy, job.precision, nodes, per_node, module, on_cpu, places[0]["port"])
        else:
            how: dict[str, Any] = {"precision": job.precision, "on_cpu": on_cpu, "timeout": _TIMEOUT_S}
            ended = launch(strategy, per_node, module, **how)
    except subprocess.TimeoutExpired:
        return would_fail("live", f"{where} did not meet within {_TIMEOUT_S:g} s", _MEET)
    found = read_found(ended)
    return _failed(where, ended) if found is None else (places, found)


def _other_nodes() -> list[str]:
    """Of the allocation that this is called in; none if it is only this machine."""
    nodes = allocated()
    return [] if nodes == [os.environ.get("SLURMD_NODENAME")] else nodes


def read_places(ended: subprocess.CompletedProcess[str]) -> list[Node]:
    """Each node's worker.place, in the order of the nodes."""
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"place"')]
    return sorted(map(json.loads, lines), key=lambda place: int(place["place"]))


def fitting(asked: int, places: Sequence[Node]) -> tuple[int, bool]:
    """Processes per node for which all have room, and whether they run on CPUs."""
    gpus = min(place["gpus"] for place in places)
    return min(asked, gpus or min(place["cores"] for place in places)), gpus == 0


def unlike(places: Sequence[Node]) -> Iterator[Finding]:
    """A warning if nodes have different numbers of GPUs."""
    if len({place["gpus"] for place in places}) > 1:
        text = "; ".join(f"{place['node']} {counted(place['gpus'], 'GPU')}" for place in places)
        yield warning("live: GPUs", text, "Request them by --gpus-per-node; see `nvidia-smi -L` there.")


def _failed(what: str, ended: subprocess.CompletedProcess[str]) -> Finding:
    why = "\n".join([f"{what} failed:", *reasons(ended.stdout + ended.stderr)])
    return would_fail("live", why, "Solve the errors above.")


def read_found(ended: subprocess.CompletedProcess[str]) -> dict[str, Any] | None:
    """What the main rank printed; None if the processes failed."""
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"world"')]
    found: dict[str, Any] | None = json.loads(lines[-1]) if lines and not ended.returncode else None
    return found


def compare(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Each thing that must be the same on all nodes, and the nodes that differ from most."""
    hosts = Counter(node["node"] for node in nodes)
    named = [
        node | {"node": f"{node['node']} (machine {i})"} if hosts[node["node"]] > 1 else node
        for i, node in enumerate(nodes)
    ]
    found = []
    if broken := [f"{node['node']}: {node['problem']}" for node in named if "problem" in node]:
        found.append(would_fail("live: data", "\n".join(broken), REMEDIES["data"]))
    for what, remedy in REMEDIES.items():
        if odd := list(_odd_ones(what, [node for node in named if what in node])):
            found.append(would_fail(f"live: {what}", "\n".join(odd), remedy))
    if len({node["device"] for node in nodes}) > 1:
        text = "; ".join(f"{node['node']} {node['device']}" for node in named)
        remedy = "Ask for nodes of one kind, or expect all to wait for the slowest."
        found.append(warning("live: devices", text, remedy))
    if not any(finding.verdict == "would fail" for finding in found):
        alike = "code, versions, config and data are the same on all"
        names = ", ".join(node["node"] for node in named)
        found.append(ok("live", f"{names}: {'the processes meet' if len(nodes) == 1 else alike}"))
    yield from found


def _odd_ones(what: str, nodes: Sequence[Node]) -> Iterator[str]:
    """A line about each node that differs from most in `what`."""
    values = [node[what] for node in nodes]
    usual = max(nodes, key=lambda node: values.count(node[what]), default={})
    for node in nodes:
        if text := difference(what, node, usual):
            yield f"{node['node']} has {text}"


def speed(found: dict[str, Any]) -> Iterator[Finding]:
    """How fast the ranks exchange data."""
    world = found["world"]
    if world == 1:
        yield ok("live: speed", "one process: nothing is sent")
        return
    (_, latency), (size, seconds) = _timed(found)
    sent = f"{in_bytes(size)} in {1000 * seconds:.3g} ms ({_rate(found) / 1e9:.3g} GB/s sent by each)"
    yield ok("live: speed", f"{world} ranks add up {sent}, a single number in {1000 * latency:.2g} ms")


def _timed(found: dict[str, Any]) -> list[tuple[int, float]]:
    """(bytes, seconds) of the smallest and the largest all-reduce."""
    return sorted((int(size), seconds) for size, seconds in found["seconds"].items())


def _rate(found: dict[str, Any]) -> float:
    """Bytes per second that each rank sends in a ring."""
    world: int = found["world"]
    size, seconds = _timed(found)[-1]
    return 2 * (world - 1) / world * size / seconds


def _on_nodes(
    strategy: str,
    precision: str,
    nodes: list[str],
    per_node: int,
    module: list[str],
    on_cpu: bool,
    port: int,
) -> subprocess.CompletedProcess[str]:
    """One launcher on each node of this Slurm allocation."""
    world, count = len(nodes) * per_node, str(len(nodes))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *launcher_file(strategy)]
    accelerate += ["--num_machines", count, "--num_processes", str(world)]
    accelerate += ["--mixed_precision", precision]
    accelerate += ["--main_process_ip", nodes[0], "--main_process_port", str(port)]
    # Each task expands its own node's number: hence a shell, and single quotes.
    command = f'{shlex.join(accelerate)} --machine_rank "$SLURM_NODEID" -m {shlex.join(module)}'
    environment = environment_of(per_node, on_cpu)
    if threads(os.environ) is None:  # environment_of knows this machine's cores
        environment["OMP_NUM_THREADS"] = str(max(1, (allocated_cpus() or 1) // per_node))
    return _srun(nodes, ["bash", "-c", f"exec {command}"], environment)


def _srun(
    nodes: list[str], command: list[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """One task per node with all of the job's resources there, even while a shell holds them."""
    count = str(len(nodes))
    srun = ["srun", "--overlap", "--nodes", count, "--ntasks", count, "--ntasks-per-node", "1"]
    # As in slurm/train.sbatch: all of our variables, and CPUs counted in one way.
    for name in ("SLURM_EXPORT_ENV", "SLURM_CPUS_PER_GPU", "SLURM_TRES_PER_TASK"):
        environment.pop(name, None)
    environment["SRUN_CPUS_PER_TASK"] = str(allocated_cpus() or 1)
    return run([*srun, "--kill-on-bad-exit=1", *command], environment, _TIMEOUT_S)
