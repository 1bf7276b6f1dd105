"""One run folder, one training: whoever comes second is refused, and nothing is written twice."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from launching import (
    ADAM,
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
from no_flock import without_flock

from launch.cli import cli

LONG = "run.total_kimg=960"
# A training whose heartbeats are a second apart, to be taken over from in some seconds.
QUICK = """
import sys
from pipeline import lock
from pipeline.console import end_process
from pipeline.train import main
lock.BEAT_S = 1.0
end_process(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adam.yaml").write_text(ADAM)
    return tmp_path


def pair(folder: Path, name: str, procs: int = 1, **environment: str) -> tuple[RunFolder, list[str]]:
    """Two trainings of one name, started together: the run, and what the refused one said."""
    line = shardgan("train", "adam.yaml", f"run.name={name}", "track.wandb=true", "--procs", str(procs))
    started = [Started(line, folder, **environment) for _ in range(2)]
    refused, trained = sorted((one.wait() for one in started), key=lambda ended: ended.status == 0)
    assert (refused.status, trained.status) == (2, 0), refused.output + trained.output
    return RunFolder(folder / "runs" / name), [
        text for text in refused.output.splitlines() if text.startswith("error:")
    ]


def assert_one(found: RunFolder, errors: list[str], rows: list[dict]) -> None:
    """Exactly one training wrote the run, whole; the other said so in one line."""
    assert len(errors) == 1 and "is being trained by pid" in errors[0] and "another run.name" in errors[0]
    assert found.done and list(map(without_clocks, found.rows)) == list(map(without_clocks, rows))
    assert len(list(found.path.glob("wandb/offline-run-*"))) == 1
    assert not (found.path / ".lock").exists()


@pytest.mark.parametrize(("procs", "flock"), [(1, True), (2, False)])
def test_of_two_that_start_together_one_trains(worlds, folder, procs, flock):
    environment = {} if flock else without_flock(folder)
    assert_one(*pair(folder, "run", procs, **environment), worlds.adam[procs].rows)


@pytest.mark.long
@pytest.mark.parametrize("flock", [True, False])
def test_of_two_that_start_together_one_trains_twenty_times(worlds, folder, flock):
    """Forked, and let go at the same moment."""
    pairs = [sys.executable, str(ROOT / "tests" / "e2e" / "training_pairs.py"), "20", "adam.yaml"]
    started = Started([*pairs, "track.wandb=true"], folder, **({} if flock else without_flock(folder)))
    ended = started.wait(2 * DEADLINE)
    assert ended.status == 0 and ended.output.splitlines() == ["0 2"] * 20, ended.output
    for n in range(20):
        logs = [(folder / f"pair-{n}-{number}.log").read_text() for number in range(2)]
        errors = [line for log in logs for line in log.splitlines() if line.startswith("error:")]
        assert_one(RunFolder(folder / "runs" / f"pair-{n}"), errors, worlds.adam[1].rows)


def test_with_resume_false_both_train_under_names_of_their_own(folder):
    line = shardgan(
        "train", "adam.yaml", "run.name=run", "run.resume=false", "run.total_kimg=0.12", "--procs", "1"
    )
    started = [Started(line, folder) for _ in range(2)]
    assert [one.wait().status for one in started] == [0, 0]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["run", "run-2"]
    for name in ("run", "run-2"):
        assert len(RunFolder(folder / "runs" / name).rows) == 1


def test_a_killed_one_is_followed_at_once(folder, monkeypatch):
    """And while a training is at work its run can be sampled, exported and scored."""
    line, path = ["train", "adam.yaml", "run.name=run", "--procs", "1"], folder / "runs" / "run"
    first = Started(shardgan(*line, LONG), folder).until((path / "checkpoints" / "240").exists)
    monkeypatch.chdir(folder)
    uses = (["sample", "runs/run", "--out", "sheet.png"], ["export", "runs/run", "--out", "out"])
    for use in (*uses, ["evaluate", "runs/run"], [*line, "--dry-run"]):
        used = CliRunner().invoke(cli, use)
        assert used.exit_code == 0, used.output
    assert (path / ".lock").exists() and not list((folder / "out").glob(".*"))
    os.killpg(first.process.pid, signal.SIGKILL)
    first.wait()
    ended = run(shardgan(*line), folder)
    assert ended.status == 0 and "waiting" not in ended.output, ended.output


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize("suspended", ["in a save", pytest.param("between ticks", marks=pytest.mark.long)])
def test_one_that_was_suspended_ends_without_writing_anything(worlds, folder, suspended):
    """SIGSTOP; another takes over and finishes; SIGCONT."""
    command = [sys.executable, "-c", QUICK, "adam.yaml", "run.name=run"]
    found = RunFolder(folder / "runs" / "run")
    saving = found.path / "checkpoints"
    first = Started([*command, LONG, "run.checkpoint_kimg=0.012"], folder)
    if suspended == "in a save":
        first.until(lambda: any(saving.glob(".partial-*")))
    else:
        first.until(rows_written(found.path, 3))
    os.kill(first.process.pid, signal.SIGSTOP)
    second = run(command, folder)
    assert second.status == 0 and found.done, second.output
    before = contents(found.path)
    os.kill(first.process.pid, signal.SIGCONT)
    ended = first.wait()
    assert ended.status != 0 and ended.output.count("error:") == 1, ended.output
    assert f"The lock of {found.path} was removed" in ended.output and "Traceback" not in ended.output
    assert contents(found.path) == before
    assert identical(found.exported(), worlds.adam[1].exported())
    assert [json.loads(row)["cur_nimg"] for row in (found.path / "metrics.jsonl").open()] == [
        row["cur_nimg"] for row in worlds.adam[1].rows
    ]
