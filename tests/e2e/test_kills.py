"""Killed at any moment and started again by the same command, a run ends as if nothing had happened.

A kill is SIGKILL, to every process of the job or to one rank alone: nothing is asked, nothing is saved.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from launching import (
    ADAM,
    RunFolder,
    Started,
    accelerate,
    hybrid,
    identical,
    run,
    shardgan,
    train,
    without_clocks,
)

OFTEN = ["run.checkpoint_kimg=0.06", "run.tick_kimg=0.06"]
MINE = "networks_of_mine"
SEVERAL_BUCKETS = [  # of DDP's, whose order of summation a new process would choose anew
    f"G.kind={MINE}:Painter",
    "G.options.width=512",
    f"D.kind={MINE}:Critic",
    "D.options.width=400",
]


@dataclass
class Killed:
    """What became of a run that was killed again and again."""

    folder: RunFolder
    kills: int = 0
    at: list[float] = field(default_factory=list)  # seconds after each start


def kill(started: Started, one: bool) -> None:
    """Everything that was started, at once; or the last of the ranks, whose launcher then ends the rest."""
    everyone = psutil.Process(started.process.pid).children(recursive=True)
    ranks = [p for p in everyone if _is_rank(p)]
    for process in ranks[-1:] if one and ranks else [*everyone, started.process]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    started.wait()
    psutil.wait_procs(everyone, timeout=60)


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ() and "pipeline.train" in process.cmdline()
    except psutil.Error:
        return False


def train_through(command: Sequence[str], folder: Path, kills: int, chance: random.Random) -> Killed:
    """Start the command until the run is done, killing it so many times: some of them anywhere in the first
    seconds, others a moment after it has written none, one or two rows."""
    found = Killed(RunFolder(folder))
    while not found.folder.done:
        start = time.time()
        started = Started(command, folder.parent)
        if found.kills == kills:
            ended = started.wait()
            assert ended.status == 0, ended.output
            continue
        # By rows at most, whatever the time: a faster machine trains no further before it is killed.
        moment, due = chance.uniform(0, 8.0), 2
        if chance.random() < 0.7:
            moment, due = math.inf, chance.randrange(3)
        over = lambda: time.time() - start > moment or _rows_since(folder, start) >= due  # noqa: E731, B023
        started.until(over)
        try:
            started.process.wait(chance.uniform(0, 0.4))
        except subprocess.TimeoutExpired:
            kill(started, one=chance.random() < 0.5)
            found.kills += 1
            found.at.append(time.time() - start)
    return found


def _rows_since(folder: Path, start: float) -> int:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return sum(json.loads(line)["time"] > start for line in lines if line.endswith("\n"))


def assert_as_if_nothing_had_happened(unbroken: RunFolder, killed: Killed) -> None:
    assert identical(killed.folder.exported(), unbroken.exported())
    assert list(map(without_clocks, killed.folder.rows)) == list(map(without_clocks, unbroken.rows))
    assert not list((killed.folder.path / "checkpoints").glob(".partial*"))


def test_killed_in_the_middle(worlds):
    """The whole job and one rank of two, as soon as a checkpoint is being written."""
    folder = worlds.folder / "killed" / "adam-2"
    config = str(worlds.folder / "adam.yaml")
    line = shardgan("train", config, "--procs", "2", f"run.out={folder.parent}", "run.name=adam-2")
    killed = Killed(RunFolder(folder))
    for one, saves in ((True, 1), (False, 2)):
        checkpoints = folder / "checkpoints"
        seen = lambda count=saves: checkpoints.is_dir() and len(list(checkpoints.iterdir())) >= count  # noqa: E731, B023
        started = Started(line, folder.parent).until(seen)
        kill(started, one)
        assert not killed.folder.done
    ended = run(line, folder.parent)
    assert ended.status == 0, ended.output
    assert_as_if_nothing_had_happened(worlds.adam[2], killed)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("strategy", "world", "kills", "networks"),
    [
        ("ddp", 2, 50, []),
        ("ddp", 3, 10, SEVERAL_BUCKETS),
        ("fsdp2", 2, 10, []),
        ("hsdp", 4, 5, []),
        ("zero2", 2, 10, []),
    ],
)
def test_killed_at_random(tmp_path, strategy, world, kills, networks):
    """Of six rows a kill, so that the run outlasts the kills."""
    shutil.copy(Path(__file__).parent / f"{MINE}.py", tmp_path)
    (tmp_path / "adam.yaml").write_text(ADAM)
    settings = ["adam.yaml", *OFTEN, *networks, f"run.total_kimg={0.36 * kills:.2f}", "run.out=."]
    line = accelerate(world, *settings, "run.name=unbroken", file=f"{strategy}.yaml")
    again = shardgan("train", *settings, "run.name=killed", "--strategy", strategy, "--procs", str(world))
    if strategy == "hsdp":
        line, again = hybrid(*settings, "run.name=unbroken"), hybrid(*settings, "run.name=killed")
    unbroken = train(line, tmp_path / "unbroken")
    killed = train_through(again, tmp_path / "killed", kills, random.Random(f"{strategy}{world}"))
    print(f"{strategy} x {world}: {killed.kills} kills, {min(killed.at):.1f} to {max(killed.at):.1f} s in")
    assert killed.kills == kills
    assert_as_if_nothing_had_happened(unbroken, killed)
