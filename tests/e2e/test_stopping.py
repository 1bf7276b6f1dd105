"""However two stop signals come, a run is saved, says nothing unseemly, and continues to the same bits."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from launching import (
    COMMON,
    DEADLINE,
    ROOT,
    RunFolder,
    Started,
    identical,
    rows_written,
    run,
    shardgan,
    without_clocks,
)

from launch.processes import free_port
from pipeline.holder import Holder
from pipeline.lock import LOCK

STOPPING = Path(__file__).parent / "stopping.py"
CONFIG = f"""{COMMON}
run: {{total_kimg: 0.72, tick_kimg: 0.12, checkpoint_kimg: 0.06, eval_kimg: 0.06}}
score: {{images: 12}}
"""
LONGER = ("run.total_kimg=6", "run.eval_kimg=1.2", "run.checkpoint_kimg=0.3")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    (folder / "pairs.yaml").write_text(CONFIG)
    return folder


def same(one: RunFolder, other: RunFolder) -> bool:
    rows = [list(map(without_clocks, each.rows)) for each in (one, other)]
    return identical(one.exported(), other.exported()) and rows[0] == rows[1]


def stop_in_pairs(place: Path, world: int, pairs: int, seed: int) -> None:
    """Every run that was stopped and continued is compared with an unbroken one of the same world."""
    out = place / f"{world}-{seed}"
    out.mkdir()
    line = [sys.executable, STOPPING, place / "pairs.yaml", out, str(world), str(pairs), str(seed)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(line, check=False, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    whole, *broken = map(json.loads, ended.stdout.splitlines())
    assert whole["pairs"] == [] and sum(len(line["pairs"]) for line in broken) == pairs
    unbroken = RunFolder(Path(whole["folder"]))
    assert [line for line in broken if not same(RunFolder(Path(line["folder"])), unbroken)] == []


@pytest.mark.parametrize(("world", "pairs"), [(1, 12), (2, 8)])
def test_pairs_of_signals(place, world, pairs):
    stop_in_pairs(place, world, pairs, seed=1)


@pytest.mark.long
@pytest.mark.parametrize(("world", "pairs"), [(1, 120), (2, 80)])
def test_many_pairs_of_signals(place, world, pairs):
    stop_in_pairs(place, world, pairs, seed=2)


# Whole commands


def descendants(started: Started) -> dict[str, list[psutil.Process]]:
    """Of `shardgan train --procs N`: itself, the ranks."""
    me = psutil.Process(started.process.pid)
    ranks = me.children()
    return {"command": [me], "rank": ranks[:1], "ranks": ranks}


def gone(processes: list[psutil.Process]) -> bool:
    return psutil.wait_procs(processes, timeout=DEADLINE)[1] == []


def train_in_two(place: Path, name: str, *settings: str) -> Started:
    line = ["pairs.yaml", "--procs", "2", f"run.name={name}", *settings]
    return Started(shardgan("train", *line), place)


def test_a_command_that_is_killed_leaves_a_saved_run_and_nobody(place):
    name, endless = "killed", "run.total_kimg=90"
    started = train_in_two(place, name, endless).until(rows_written(place / "runs" / name, 2))
    processes = descendants(started)
    processes["command"][0].kill()
    assert gone(processes["ranks"])
    said = started.wait().output
    assert "Traceback" not in said
    assert re.search(r"Stopped at kimg \S+ (on SIGTERM|because its launcher \(PID \d+\) has ended);", said)
    assert RunFolder(place / "runs" / name).stopped_at


@pytest.mark.parametrize("started_by", ["nohup", pytest.param("setsid", marks=pytest.mark.long)])
def test_what_a_shell_has_left_in_the_background_goes_on(place, started_by):
    """The shell ends at once, as at a logout."""
    line = shlex.join(shardgan("train", "pairs.yaml", "--procs", "1", f"run.name={started_by}"))
    ended = run(["bash", "-c", f"{started_by} {line} > {started_by}.log 2>&1 & echo $!"], place)
    log = place / f"{started_by}.log"
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(ended.output)).wait(DEADLINE)
    assert RunFolder(place / "runs" / started_by).done, log.read_text()


def test_a_rank_that_waits_for_others_says_so_and_can_be_stopped(place):
    """Variables of a launcher that is not there make it one of four."""
    there = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
    line = [sys.executable, "-m", "pipeline.train", "pairs.yaml", "run.name=alone"]
    started = Started(line, place, **there, MASTER_PORT=str(free_port()))
    ended = started.until(lambda: "Waiting at 127.0.0.1" in started.output).ctrl_c()
    assert ended.status == 130 and "Traceback" not in ended.output, ended.output
    assert "RANK=0 of WORLD_SIZE=4" in ended.output


@pytest.mark.parametrize(("procs", "number", "status"), [("1", signal.SIGINT, 130), ("2", signal.SIGTERM, 0)])
def test_stopped_while_the_folder_may_be_another_machines(place, procs, number, status):
    """A stop is no failure, which a batch system would not start again."""
    lock = place / "runs" / f"held-{procs}" / LOCK / "1"
    lock.parent.mkdir(parents=True)
    holder = asdict(Holder(str(lock), flocked=False)) | {"kernel": "another machine's"}
    lock.write_text(f"{json.dumps(holder)}\n")
    line = ["pairs.yaml", "--procs", procs, f"run.name=held-{procs}"]
    started = Started(shardgan("train", *line), place)
    started.until(lambda: "waiting for a sign of life" in started.output)
    os.killpg(started.process.pid, number)
    ended = started.wait()
    assert ended.status == status and "Traceback" not in ended.output, ended.output
    assert "Stopped while waiting for" in ended.output


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGTERM), (signal.SIGUSR1,)], ids=["two", "USR1"])
def test_stopped_while_it_starts(place, world, signals):
    """As soon as the processes that train are there, which have not got far."""
    name = f"early-{world}-{len(signals)}"
    line = ["pairs.yaml", "--procs", str(world), f"run.name={name}", "run.total_kimg=90"]
    started = Started(shardgan("train", *line), place)

    def training() -> list[psutil.Process]:
        me = psutil.Process(started.process.pid)
        with suppress(psutil.NoSuchProcess):
            return [p for p in [me, *me.children(recursive=True)] if "pipeline.train" in p.cmdline()[1:4]]
        return []

    started.until(lambda: len(training()) == world)
    left = training()
    for number in signals:
        os.killpg(started.process.pid, number)
    ended = started.wait()
    assert ended.status in (0, 130) and "Traceback" not in ended.output, ended.output
    assert "error" not in ended.output and gone(left)


@pytest.mark.long
def test_pairs_of_signals_to_whole_commands(place):
    """To the command or its ranks, in whatever state they are; each continues what the one before
    has left."""
    chance, folder = random.Random(1), place / "runs" / "commands"
    whole = train_in_two(place, "whole", *LONGER)
    assert whole.wait().status == 0
    for number in range(24):
        started = train_in_two(place, "commands", *LONGER)
        rows = len(RunFolder(folder).rows) if folder.exists() else 0
        started.until(rows_written(folder, rows + 1))
        processes = descendants(started)
        pair = [(chance.choice(SIGNALS), chance.choice(list(processes))) for _ in range(2)]
        for process in processes[pair[0][1]]:
            process.send_signal(pair[0][0])
        until = time.perf_counter() + chance.uniform(0.0, 5e-3)
        while time.perf_counter() < until:
            pass
        for process in processes[pair[1][1]]:
            process.send_signal(pair[1][0])
        ended = started.wait()
        assert ended.status in (0, 130) and "Traceback" not in ended.output, (number, pair, ended.output)
        assert "error" not in ended.output and "Stopped at kimg" in ended.output, (number, pair, ended.output)
    assert train_in_two(place, "commands", *LONGER).wait().status == 0
    assert same(RunFolder(folder), RunFolder(place / "runs" / "whole"))
