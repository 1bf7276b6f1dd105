"""Parts of the GPU suite that compare with plain torch, with themselves, and with what is promised."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from machine import DEVICE, GPUS, SHARDS, WORLD, Outcome, need
from starting import Failed, launch, run

if TYPE_CHECKING:
    from launch.selfcheck.parity import Case

# A case of each kind: the whole matrix is for CPUs, where a launch takes a minute and not four.
CASES = (
    "adam-l2-clipped-2", "sgd-l1l2-clipped-2", "r1", "labels", "spectral", "group", "relativistic", "r1-r2",
    "wgan-gp", "fraction", "difference", "path", "schedules", "augmentation", "adaptive", "sync-batch-r1",
    "effective", "freeze", "r3gan", "stylegan2", "vit",
)  # fmt: skip


def _kinds(kind: str) -> tuple[str, ...]:
    return tuple(f"{player}.{key}" for player in "GD" for key in (f"kind={kind}", "width=16"))


_RELATIVISTIC = ("loss.kind=relativistic", "penalty.r1.gamma=1", "penalty.r2.gamma=1")
RESUMED = {  # trainings that are stopped and resumed: settings besides QUIET
    "dcgan": (*_kinds("dcgan"), "D.norm=none", "penalty.r1.gamma=1"),
    "r3gan": (*_kinds("r3gan"), *_RELATIVISTIC),
    "vit": (*_kinds("vit"), "G.outputs=1", "loss.kind=relativistic"),
    "stylegan2": (*_kinds("stylegan2"), "penalty.path.weight=2", "penalty.path.interval=1"),
}
ORDERED = {  # by strategies under which ranks send what a backward yields in its order
    "fsdp2": (*_kinds("dcgan"), "G.norm=sync_batch", "D.norm=sync_batch", "penalty.r1.gamma=1"),
    "zero2": RESUMED["stylegan2"],
}
QUIET = (  # neither scored nor shown
    f"data.train={SHARDS}", "data.size=28", "data.channels=1", "data.batch_size=32", "run.tick_kimg=0.5",
    "run.snapshot_kimg=1000", "score.metrics=[]", "track.wandb=false",
)  # fmt: skip


def parity(strategy: str) -> Outcome:
    """Weights, charts and a resumed training against plain torch on the same device, in full float32."""
    from launch import selfcheck
    from launch.selfcheck import parity

    world = 1 if strategy == "single" else WORLD
    if strategy == "hsdp":  # two copies of two parts, at least
        if GPUS:
            need(4)
        world = max(4, world - world % 2)
    there = {case.name: case for case in parity.cases(world, strategy)}
    chosen = [name for name in CASES if name in there]
    with tempfile.TemporaryDirectory() as folder:
        module = ["parity_table", "in-rank", folder, *chosen]
        launch(strategy, world, module, deepspeed=selfcheck.PARTITION_ALL.get(strategy))
        worst, beyond = _worst([there[name] for name in chosen], Path(folder))
    figures: dict[str, Any] = {"strategy": strategy, "ranks": world, "cases": len(chosen)}
    for column in selfcheck.COLUMNS:
        error, case = max(worst[column], default=(0.0, ""))
        figures[column] = error
        figures |= {f"{column}, worst case": case} if error else {}  # where several are 0, none is the worst
    wrong = [line for beyond_by, line in sorted(beyond, reverse=True) if beyond_by > 1]
    return [*wrong[:5], *([f"and {len(wrong) - 5} more cases"] if len(wrong) > 5 else [])], figures


def _worst(
    cases: list[Case], folder: Path
) -> tuple[dict[str, list[tuple[float, str]]], list[tuple[float, str]]]:
    """What a launch trained into `folder`, against plain torch. Of each column every case's worst error; and
    of each case the error that is the most times what is allowed, and how to say it."""
    from launch import selfcheck

    worst: dict[str, list[tuple[float, str]]] = {column: [] for column in selfcheck.COLUMNS}
    beyond = []
    for case in cases:
        errors = dict.fromkeys(selfcheck.COLUMNS, 0.0)
        most, line = 0.0, ""
        trained, reference = selfcheck.read(folder, case.name), selfcheck.expected(case, DEVICE)
        for column, what, error in selfcheck.differences(trained, reference):
            errors[column] = max(errors[column], error)
            times = error / (case.slack * selfcheck.tolerance(column))
            if times > most:
                most, line = times, f"{case.name}, {what}: {error:.1e}"
        for column, error in errors.items():
            worst[column].append((error, case.name))
        beyond.append((most, line))
    return worst, beyond


def precision(kind: str) -> Outcome:
    """bf16 or fp16 against float32, and an update that overflows."""
    from launch import selfcheck

    failures, figures = [], {}
    for strategy in ("single", "ddp", "fsdp2", "zero2", "zero3"):
        world = 1 if strategy == "single" else WORLD
        with tempfile.TemporaryDirectory() as folder:
            module, deepspeed = (
                ["launch.selfcheck.low_precision", folder],
                selfcheck.PARTITION_ALL.get(strategy),
            )
            try:
                launch(strategy, world, module, kind, deepspeed)
            except Failed as reason:
                failures.append(str(reason))
                continue
            errors = selfcheck.judge(Path(folder), strategy, world, DEVICE, kind)
        failures += [
            f"{strategy}, {column}: {error:.1e}"
            for column, error in errors.items()
            if error > selfcheck.tolerance(column, kind)
        ]
        figures[f"{strategy} x{world}"] = errors
    return failures, figures


def resume() -> Outcome:
    """Trainings from shards, stopped half-way and continued by the same command, to the same bits; with
    attention, whose fused kernels on a GPU add up in any order, that is only reported."""
    from pipeline.cores import cores

    failures, figures = [], {}
    chosen = [(n, k) for n in RESUMED for k in ("no", "bf16")] if GPUS else [("dcgan", "no")]

    def resumed(name: str, kind: str) -> str:
        try:
            same = _same_resumed(*RESUMED[name], options=("--procs", "1", "--mixed_precision", kind))
        except Failed as reason:
            return str(reason)
        return "the same bits" if same else "other bits"

    # A training takes longer to start than to train: on a GPU some at a time, so that all fit into a part.
    at_a_time = 4 if GPUS else 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // at_a_time))
    with ThreadPoolExecutor(at_a_time) as pool:
        found = list(pool.map(resumed, *zip(*chosen, strict=True)))
    for (name, kind), how in zip(chosen, found, strict=True):
        figures[f"{name}, {kind}"] = how
        fine = how == "the same bits" or (name, how) == ("vit", "other bits")
        failures += [] if fine else [f"{name}, {kind}: resumed, {how}"]
    return failures, figures


def resume_ranks(strategy: str) -> Outcome:
    """The same on several ranks, of networks whose backward decides in which order ranks send."""
    if GPUS == 1:
        need(2)
    same = _same_resumed(*ORDERED[strategy], options=("--procs", str(WORLD), "--strategy", strategy))
    failures = [] if same else [f"{strategy}: a resumed run has other bits"]
    return failures, {
        "strategy": strategy,
        "ranks": WORLD,
        "resumed": "the same bits" if same else "other bits",
    }


def _same_resumed(*settings: str, options: Sequence[str]) -> bool:
    ends = []
    for stops in ((2,), (1, 2)):
        with tempfile.TemporaryDirectory() as runs:
            for kimg in stops:
                _train(runs, *settings, f"run.total_kimg={kimg}", options=options)
            ends.append(_tensors(Path(runs) / "resumed" / "checkpoints"))
    return ends[0].keys() == ends[1].keys() and all(torch.equal(t, ends[1][k]) for k, t in ends[0].items())


def _command(runs: str, name: str, *settings: str) -> list[str]:
    config = Path(runs) / "none.yaml"
    config.write_text("{}\n")
    place = (f"run.out={runs}", f"run.name={name}")
    return [sys.executable, "-m", "launch.cli", "train", str(config), *QUIET, *place, *settings]


def _train(runs: str, *settings: str, options: Sequence[str]) -> None:
    run("a training", [*_command(runs, "resumed", *settings), *options])


def _tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    whole = [folder for folder in checkpoints.iterdir() if folder.name.isdigit()]
    newest = max(whole, key=lambda folder: int(folder.name))
    return {f"{f.name}/{k}": t for f in sorted(newest.glob("*.safetensors")) for k, t in load_file(f).items()}


def killed_rank() -> Outcome:
    """A rank is killed in mid-training: all end, the right one is named, and no process is left."""
    from launch import processes

    if GPUS == 1:
        need(2)
    with tempfile.TemporaryDirectory() as runs, (Path(runs) / "log").open("w") as log:
        line = _command(runs, "killed", "run.total_kimg=10000", f"data.batch_size={32 * WORLD}")
        job = subprocess.Popen([*line, "--procs", str(WORLD)], stdout=log, stderr=log)
        try:
            rows = Path(runs) / "killed" / "metrics.jsonl"
            end = time.monotonic() + 120
            while (
                not (rows.exists() and rows.stat().st_size) and time.monotonic() < end and job.poll() is None
            ):
                time.sleep(0.2)
            everyone = psutil.Process(job.pid).children(recursive=True)
            rank = _rank(1, everyone)
            if rank is None:
                return [f"rank 1 never trained: {Path(log.name).read_text()[-800:]}"], {}
            start = time.monotonic()
            rank.kill()
            status = job.wait(120)
            seconds = round(time.monotonic() - start, 1)
            left = [p.pid for p in psutil.wait_procs(everyone, timeout=5)[1]]
        finally:
            processes.kill(job)
        said = Path(log.name).read_text()
    named = re.search(r"rank 1 \([^)]*\) is gone: killed", said)
    failures = [] if named else [f"rank 1 is not named: {said[-500:]}"]
    failures += ["exit status 0"] if status == 0 else []
    failures += [f"processes left: {left}"] if left else []
    return failures, {"ranks": WORLD, "seconds until all ended": seconds, "said": named[0] if named else ""}


def _rank(number: int, everyone: list[psutil.Process]) -> psutil.Process | None:
    """The training process of a rank, which started before its data workers."""
    found = []
    for process in everyone:
        with suppress(psutil.Error):
            if process.environ().get("RANK") == str(number) and "pipeline.train" in process.cmdline():
                found.append(process)
    return min(found, key=lambda process: process.create_time(), default=None)
