"""`shardgan doctor --live`: start the processes, here or on the nodes of the allocation, and ask them.

They meet as a training's would, so that what keeps them apart is found; then every node tells what it sees.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from launch.doctor_place import allocated
from launch.finding import Finding, Job, in_bytes, ok, warning, would_fail
from launch.train import cores, environment_of, free_port
from launch.workers import launch, launcher_file, run

Node = dict[str, Any]  # as doctor_worker.describe tells it

_TIMEOUT_S = 300.0
_ERROR = re.compile(r"(\[rank\d+\]: )?([\w.]*(Error|Exception)|[\w.]+: error|error): ")
_ECHOES = ("ChildFailedError", "CalledProcessError", "srun: error")  # of a launcher, when a process fails
_MEET = (
    "Let the nodes reach each other: firewall, port, and the right interface (NCCL_SOCKET_IFNAME, "
    "GLOO_SOCKET_IFNAME)."
)
_CURES = {
    "code": "Put the project where all nodes see it, or copy it anew.",
    "config": "Put the config where all nodes see it.",
    "data": "Put the data where all nodes see it (data.train), or copy it anew and run doctor there.",
    "versions": "Install the same everywhere: bash launch/setup.sh.",
    "device": "Ask for nodes of one kind, or expect all to wait for the slowest.",
}


def examine(job: Job, config: str, settings: Sequence[str]) -> list[Finding]:
    """Start as many processes as there are places for, and compare what they tell."""
    import torch

    gpus = torch.cuda.device_count()
    per_node = min(job.gpus, gpus or cores())
    nodes = allocated()
    module = ["launch.doctor_worker", config, *settings]
    where = f"{max(1, len(nodes))} x {per_node} processes"
    try:
        if len(nodes) > 1:
            ended = _on_nodes(job.strategy, nodes, per_node, module, on_cpu=not gpus)
        else:
            strategy = "single" if per_node == 1 else job.strategy if job.strategy != "single" else "ddp"
            ended = launch(strategy, per_node, module, on_cpu=not gpus, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [would_fail("live", f"{where} did not meet within {_TIMEOUT_S:g} s", _MEET)]
    found = told(ended)
    if found is None:
        why = "\n".join([f"{where} failed:", *reasons(ended.stdout + ended.stderr)])
        return [would_fail("live", why, "Mend what is said there.")]
    return [*compare(found["nodes"]), *speed(found)]


def told(ended: subprocess.CompletedProcess[str]) -> dict[str, Any] | None:
    """What the main rank printed; None if the processes failed."""
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"world"')]
    found: dict[str, Any] | None = json.loads(lines[-1]) if lines and not ended.returncode else None
    return found


def reasons(output: str) -> list[str]:
    """The errors in what processes and launchers have said, else the end of it."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line) and not any(word in line for word in _ECHOES)]
    return list(dict.fromkeys(errors))[:5] or lines[-8:]


def compare(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Each thing that must be the same on all nodes, and which of them see another."""
    hosts = Counter(node["node"] for node in nodes)
    names = [f"{n['node']} (machine {i})" if hosts[n["node"]] > 1 else n["node"] for i, n in enumerate(nodes)]
    named = dict(zip(names, nodes, strict=True))
    found = []
    if broken := [f"{name}: {node['problem']}" for name, node in named.items() if "problem" in node]:
        found.append(would_fail("live: data", "\n".join(broken), _CURES["data"]))
    for what in ("code", "versions", "config", "data"):
        if odd := _odd_ones(what, {name: node[what] for name, node in named.items() if what in node}):
            found.append(would_fail(f"live: {what}", "\n".join(odd), _CURES[what]))
    if len({node["device"] for node in nodes}) > 1:
        text = "; ".join(f"{name} {node['device']}" for name, node in named.items())
        found.append(warning("live: devices", text, _CURES["device"]))
    if not any(finding.verdict == "would fail" for finding in found):
        alike = "code, versions, config and data are the same on all"
        text = f"{names[0]}: the processes meet" if len(nodes) == 1 else f"{', '.join(names)}: {alike}"
        found.append(ok("live", text))
    yield from found


def _odd_ones(what: str, seen: dict[str, Any]) -> list[str]:
    """A line about each node that sees something else than most do."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in seen.items()}
    usual = Counter(texts.values()).most_common(1)[0][0] if texts else ""
    odd, like = [name for name in texts if texts[name] != usual], [n for n in texts if texts[n] == usual][:1]
    return [f"{name} {_told_apart(what, seen[name], seen[like[0]])} {like[0]}" for name in odd]


def _told_apart(what: str, value: Any, usual: Any) -> str:
    if what != "versions":
        return f"has other {what} than"
    apart = [f"{name} {v} (not {usual.get(name)})" for name, v in value.items() if usual.get(name) != v]
    return f"has {', '.join(apart)}, unlike"


def speed(found: dict[str, Any]) -> Iterator[Finding]:
    """What the ranks send each other per second."""
    world = found["world"]
    if world == 1:
        yield ok("live: speed", "one process: nothing is sent")
        return
    (_, latency), (size, seconds) = sorted((int(size), s) for size, s in found["seconds"].items())
    rate = 2 * (world - 1) / world * size / seconds
    sent = f"{in_bytes(size)} in {1000 * seconds:.3g} ms ({in_bytes(rate)}/s sent by each)"
    yield ok("live: speed", f"{world} ranks add up {sent}, a single number in {1000 * latency:.2g} ms")


def _on_nodes(
    strategy: str, nodes: list[str], per_node: int, module: list[str], on_cpu: bool
) -> subprocess.CompletedProcess[str]:
    """One launcher on each node of this Slurm allocation."""
    world, count = len(nodes) * per_node, str(len(nodes))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *launcher_file(strategy)]
    accelerate += ["--num_machines", count, "--num_processes", str(world)]
    accelerate += ["--main_process_ip", nodes[0], "--main_process_port", str(free_port())]
    srun = ["srun", "--nodes", count, "--ntasks", count, "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
    # Each task must expand its own node's number: hence a shell, and single quotes.
    command = f'{shlex.join(accelerate)} --machine_rank "$SLURM_NODEID" -m {shlex.join(module)}'
    shell = ["bash", "-c", f"exec {command}"]
    environment = environment_of(per_node, on_cpu)
    environment["SRUN_CPUS_PER_TASK"] = (
        os.environ.get("SLURM_CPUS_PER_TASK") or os.environ["SLURM_CPUS_ON_NODE"]
    )
    return run([*srun, *shell], environment, _TIMEOUT_S)
