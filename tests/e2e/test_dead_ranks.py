"""A rank that is gone, frozen, stuck or failing ends the job everywhere, and the same command goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from launching import (
    ADAM,
    DEADLINE,
    Ended,
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

MINE = "networks_of_mine"
TIMEOUT = 15.0  # seconds; long enough for a busy machine to be no reason


@dataclass(frozen=True)
class Broken:
    """A run in which something happened to one rank."""

    pid: int  # of that rank
    ended: Ended
    left_over: list[psutil.Process]
    checkpoints: list[int]  # when it had ended
    run: RunFolder
    command: list[str]
    folder: Path  # it was started in


@dataclass(frozen=True)
class Place:
    """Where trainings of `Halting` networks are started, side by side."""

    folder: Path

    def settings(self, name: str) -> list[str]:
        return ["mine.yaml", f"run.name={name}", f"run.timeout_s={TIMEOUT}"]

    def command(self, name: str, launcher: str, strategy: str = "ddp") -> list[str]:
        if strategy == "hsdp":
            return hybrid(*self.settings(name))
        if launcher == "shardgan":
            return shardgan("train", "--procs", "2", "--strategy", strategy, *self.settings(name))
        line = accelerate(2, *self.settings(name), file=f"{strategy}.yaml")
        return [*line[:2], "--max_restarts", "1", *line[2:]] if launcher == "restarting" else line

    def halt(
        self, where: str, then: signal.Signals | str | None, launcher: str, strategy: str = "ddp"
    ) -> Broken:
        """Train until there is a checkpoint; then a rank halts (`forward-1`), and gets a signal there.

        With `forward-1,collective-0` it is rank 0, which waits for rank 1, that gets it; rank 1 then goes on.
        """
        name = f"{where}-{then}-{launcher}-{strategy}"
        where, _, waiting = where.partition(",collective-")
        orders, found = self.folder / f"{name}.orders", RunFolder(self.folder / "runs" / name)
        orders.mkdir()
        command = self.command(name, launcher, strategy)
        started = Started(command, self.folder, HALT=str(orders), DS_ACCELERATOR="cpu")
        started.until((found.path / "checkpoints" / "240").exists)
        (orders / f"{where}.partial").write_text(then if isinstance(then, str) else "")
        (orders / f"{where}.partial").rename(orders / where)
        pid = int(_read_once_there(orders / f"{where}.pid", started))
        everyone = psutil.Process(started.process.pid).children(recursive=True)
        if waiting:
            pid = next(p.pid for p in everyone if p.environ().get("RANK") == waiting)  # then its workers
        if isinstance(then, signal.Signals):
            os.kill(pid, then)
        if launcher == "restarting" or waiting:
            (orders / where).unlink()
        ended = started.wait()
        (orders / where).unlink(missing_ok=True)
        left_over = psutil.wait_procs(everyone, timeout=DEADLINE / 10)[1]
        checkpoints = sorted(int(p.name) for p in (found.path / "checkpoints").iterdir() if p.name.isdigit())
        return Broken(pid, ended, left_over, checkpoints, found, command, self.folder)


def _read_once_there(file: Path, started: Started) -> str:
    started.until(file.exists)
    return file.read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("dead")
    shutil.copy(Path(__file__).parent / f"{MINE}.py", folder)
    (folder / "mine.yaml").write_text(
        ADAM.replace(
            "{width: 8, norm: none, z_dim: 32}", f"{{kind: '{MINE}:Halting', options: {{width: 64}}}}"
        )
        .replace("{width: 8, norm: none}", f"{{kind: '{MINE}:Critic', options: {{width: 64}}}}")
        .replace("score: {images: 24}", "score: {metrics: []}")
        .replace("total_kimg: 0.96", "total_kimg: 0.72")
    )
    return Place(folder)


@pytest.fixture(scope="module")
def at_once():
    """They mostly wait for a timeout: more of them than cores."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def jobs(place, at_once) -> dict[str, Callable[[], object]]:
    """All that is looked at below, running side by side."""
    watched = [*accelerate(2)[:-2], str(Path(__file__).with_name("slow_but_living.py"))]
    started = {
        "unbroken": at_once.submit(
            lambda: train(place.command("whole", "accelerate"), place.folder / "runs" / "whole", place.folder)
        ),
        "frozen": at_once.submit(place.halt, "forward-0", signal.SIGSTOP, "accelerate"),
        "stuck": at_once.submit(place.halt, "forward-1", None, "shardgan"),
        "waiting": at_once.submit(place.halt, "forward-1,collective-0", signal.SIGSTOP, "shardgan"),
        "saving": at_once.submit(place.halt, "save-1", signal.SIGSTOP, "shardgan"),
        "restarted": at_once.submit(place.halt, "forward-1", signal.SIGKILL, "restarting"),
        "slow": at_once.submit(run, watched, place.folder),
        "failed": at_once.submit(place.halt, "forward-1", "raise", "shardgan"),
    }
    return {name: job.result for name, job in started.items()}


def assert_ended_by_name(broken: Broken, rank: int, what: str, where: str) -> None:
    """One message, by whoever found out; nobody left; a checkpoint named that is there."""
    output = broken.ended.output
    assert broken.ended.status == 1, output
    assert broken.left_over == []
    messages = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, output
    assert re.match(rf"error: rank {rank} \([^,]+, pid {broken.pid}\) {what}", messages[0]), messages
    assert re.search(rf"at kimg \d+(\.\d+)?[,:] {where}", messages[0]), messages
    assert len(re.findall(r"The job ends on all [24] ranks\.", output)) == 1
    (kept,) = [row for row in broken.run.events if row["event"] == "error"]
    assert messages[0] == f"error: {kept['text'].splitlines()[0]}"
    newest = f"{broken.run.path.relative_to(broken.folder)}/checkpoints/{broken.checkpoints[-1]};"
    assert newest in output and "the same command continues from there" in output


def assert_goes_on(broken: Broken, unbroken: RunFolder) -> None:
    ended = run(broken.command, broken.folder, DS_ACCELERATOR="cpu")
    assert ended.status == 0, ended.output
    assert_same(broken.run, unbroken)


def assert_same(found: RunFolder, unbroken: RunFolder) -> None:
    assert found.done
    assert identical(found.exported(), unbroken.exported())
    assert list(map(without_clocks, found.rows)) == list(map(without_clocks, unbroken.rows))


IN_FORWARD = rf"in the forward of G, at {MINE}\.py:\d+ \(_halt\)"
FROZEN = r"has not answered for \d+ s: it is frozen"  # at least TIMEOUT: the watch looks now and then


def test_the_main_rank_frozen_in_an_update(jobs):
    broken = jobs["frozen"]()
    assert_ended_by_name(broken, 0, FROZEN, IN_FORWARD)
    assert "Traceback" not in broken.ended.output.partition("torch/distributed/elastic")[0]
    assert_goes_on(broken, jobs["unbroken"]())


def test_the_main_rank_frozen_in_a_collective(jobs):
    broken = jobs["waiting"]()
    assert_ended_by_name(broken, 0, FROZEN, "in the backward of [GD]")
    assert_goes_on(broken, jobs["unbroken"]())


def test_a_rank_frozen_in_a_save(jobs):
    broken = jobs["saving"]()
    assert_ended_by_name(broken, 1, FROZEN, "saving a checkpoint")
    assert_goes_on(broken, jobs["unbroken"]())


def test_a_rank_stuck_in_a_users_network(jobs):
    """Its heart beats; the other rank waits for it in a collective, and is not the one who is blamed."""
    broken = jobs["stuck"]()
    assert_ended_by_name(broken, 1, r"is stuck: it has not moved for \d+ s", IN_FORWARD)
    assert "Traceback" not in broken.ended.output
    assert_goes_on(broken, jobs["unbroken"]())


def test_a_killed_rank_and_a_launcher_that_restarts(jobs):
    """`accelerate launch --max_restarts 1`: named, restarted, resumed, finished by itself."""
    broken = jobs["restarted"]()
    output = broken.ended.output
    assert broken.ended.status == 0, output
    assert broken.left_over == []
    found = re.search(rf"error: (rank 1 \([^,]+, pid {broken.pid}\) is gone: killed.*)", output)
    assert found, output
    assert [row["event"] for row in broken.run.events] == ["start", "error", "start"]
    assert broken.run.events[1]["text"] == found[1]
    assert "Traceback" not in output
    assert_same(broken.run, jobs["unbroken"]())


def test_a_rank_that_raises(jobs):
    """The mistake's own traceback, once, and a word about it that names the rank."""
    broken = jobs["failed"]()
    assert_ended_by_name(broken, 1, "failed", "ValueError: the paint ran out")
    assert broken.ended.output.count("Traceback (most recent call last)") == 1


def test_slow_work_is_not_taken_for_a_hang(jobs):
    """One rank reads for thrice the timeout while the other waits for it; only asleep is it stuck."""
    ended = jobs["slow"]()
    assert ended.status == 1
    assert ended.output.count("together") == 2
    assert re.search(r"error: rank 0 \(.*slow_but_living.py:\d+ \(main\)", ended.output), ended.output


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "hsdp", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("where", "then", "what", "place_in_words"),
    [
        ("forward-1", signal.SIGKILL, "is gone: killed", IN_FORWARD),
        ("forward-1", signal.SIGSTOP, FROZEN, IN_FORWARD),
        ("forward-1,collective-0", signal.SIGSTOP, FROZEN, "in the "),
        ("forward-0", None, "is stuck", IN_FORWARD),
        ("backward-1", None, "is stuck", rf"in the backward of G, at {MINE}\.py:\d+ \(_halt\)"),
        ("backward-0", signal.SIGSTOP, "has not answered", rf"in the backward of G, at {MINE}\.py"),
        ("save-1", signal.SIGSTOP, "has not answered", rf"saving a checkpoint, at {MINE}\.py"),
        ("save-1", None, "is stuck", rf"saving a checkpoint, at {MINE}\.py"),
        ("save-0", signal.SIGKILL, "is gone: killed", rf"saving a checkpoint, at {MINE}\.py"),
    ],
)
def test_everywhere_and_under_every_strategy(place, strategy, where, then, what, place_in_words):
    whole = RunFolder(place.folder / "runs" / f"whole-{strategy}")
    if not whole.done:
        train(place.command(whole.path.name, "shardgan", strategy), whole.path, place.folder)
    broken = place.halt(where, then, "shardgan", strategy)
    assert_ended_by_name(broken, int(where[-1]), what, place_in_words)
    assert_goes_on(broken, whole)
