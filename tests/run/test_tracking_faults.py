"""Whatever happens to W&B: training continues, metrics.jsonl is whole, and W&B ends up with each step once.

The real client and its real service process, against a server that misbehaves on demand.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.config import load
from pipeline.run import tracker as tracker_module
from pipeline.run import wandb_mode
from pipeline.run.report import MainReport
from pipeline.run.resend import catch_up
from pipeline.run.tracker import Tracker, open_tracker
from tests.wandb_offline import offline_runs
from tests.wandb_server import FAILING, SILENT, WELL, ServedRun, WandbServer, wandb_server

pytestmark = pytest.mark.usefixtures("no_account")
ROOT = Path(__file__).parents[2]
KEY = "fedcba9876543210" * 2 + "fedcba98"
CONFIG = load(None, ["data.train=shards", "run.name=demo", "track.project=proj", "track.tags=[a,b]"])
TOTAL = 20  # ticks of a run; a sample grid every 4


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server, and a client that has the key and uses short waits."""
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        for name in ("FILE_STREAM", "GRAPHQL", "FILE_TRANSFER"):
            monkeypatch.setenv(f"WANDB__{name}_RETRY_WAIT_MIN_SECONDS", "0.1")
            monkeypatch.setenv(f"WANDB__{name}_RETRY_WAIT_MAX_SECONDS", "0.2")
        # Rows are sent every 15 seconds; the first at once, unless statistics of the machine came before.
        monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
        monkeypatch.setattr(wandb_mode, "_ANSWER_S", 0.5)
        monkeypatch.setattr(tracker_module, "_INIT_S", 10.0)
        monkeypatch.setattr(tracker_module, "_FINISH_S", 10.0)
        yield server


class Job:
    """One start of the training command, reduced to its reports."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        self.folder, self.said = folder, list[str]()
        folder.mkdir(exist_ok=True)
        (folder / "samples").mkdir(exist_ok=True)
        self.tracker = open_tracker(CONFIG, folder, None, self.said.append)
        self.report = MainReport(folder, [self.tracker], TOTAL * 100, start * 100)

    def train(self, start: int, stop: int) -> Job:
        """Ticks start … stop - 1, whose values are a function of the tick, as in a resumed run."""
        for tick in range(start, stop):
            self.report.row(tick * 100, values(tick))
            if tick % 4 == 0:
                path = self.folder / "samples" / f"fakes{tick:06d}.png"
                notes = PngInfo()
                notes.add_text("chart", "Samples/fakes")
                notes.add_text("cur_nimg", str(tick * 100))
                Image.new("L", (8, 8), tick).save(path, pnginfo=notes)
                self.report.image("Samples/fakes", path, tick * 100)
        return self

    def end(self) -> list[str]:
        self.report.close()
        return self.said


def values(tick: int) -> dict[str, float]:
    """So many that the client's buffer, whose content a kill loses, is flushed every few rows."""
    return {"Progress/kimg": tick / 10, **{f"Loss/G/{n}": 1 / (tick + n + 3) for n in range(300)}}


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_whole(folder: Path, run: ServedRun, ticks: int = TOTAL) -> None:
    """metrics.jsonl has every tick once; so has W&B, with the same values and the sample grids."""
    assert [row["cur_nimg"] for row in rows(folder)] == [tick * 100 for tick in range(ticks)]
    assert run.steps == [tick * 100 for tick in range(ticks)]
    for row, shown in zip(rows(folder), run.history, strict=True):
        assert {k: v for k, v in row.items() if "/" in k} == {
            k: v for k, v in shown.items() if "/" in k and k != "Samples/fakes"
        }
        assert ("Samples/fakes" in shown) == (row["cur_nimg"] % 400 == 0)
        if "Samples/fakes" in shown:
            assert shown["Samples/fakes"]["path"] in run.files


def again(folder: Path, times: int = 1) -> list[list[str]]:
    """Output of the same command on the finished run; in a new process, as W&B's client keeps state."""
    script = f"""
        import json
        from pathlib import Path
        from pipeline.run.resend import catch_up
        from tests.run.test_tracking_faults import CONFIG
        said = [[] for _ in range({times})]
        for lines in said:
            catch_up(CONFIG, Path({str(folder)!r}), lines.append)
        print(json.dumps(said))
    """
    line = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(line, check=False, capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    said: list[list[str]] = json.loads(ended.stdout)
    return said


def services() -> list[psutil.Process]:
    """The W&B service processes that this process started."""
    mine = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
    return [service for service in mine if service.status() != psutil.STATUS_ZOMBIE]


def test_an_online_run_is_all_there(tmp_path, server, capfd):
    job = Job(tmp_path).train(0, TOTAL)
    job.report.summary({"Metrics/kid": 0.5})
    job.report.warn("Loss", "is not finite")
    said = job.end()
    run = server.run
    assert_whole(tmp_path, run)
    assert (run.name, run.project, run.tags, run.exit_code) == ("demo", "proj", ["a", "b"], 0)
    assert run.config["penalty"]["value"]["G"]["on"] == "auto"
    assert run.summary["Metrics/kid"] == 0.5 and run.summary["_step"] == (TOTAL - 1) * 100
    assert run.alerts == [("Loss", "is not finite")]
    assert said == [f"W&B: {server.url}/me/proj/runs/{job.tracker.run_id}"]
    output = capfd.readouterr()
    assert "warning: is not finite" in output.out and "wandb" not in output.out + output.err
    files = [p for p in tmp_path.rglob("*") if p.is_file() and "home" not in p.parts]
    assert any(p.suffix == ".wandb" for p in files)
    written = [p.read_bytes() for p in files] + server.received + [(output.out + output.err).encode()]
    assert not [text for text in written if KEY.encode() in text]


def test_a_server_that_dies_gets_the_rest_by_the_same_command(tmp_path, server, monkeypatch):
    Job(tmp_path).train(0, 4).end()
    monkeypatch.setattr(tracker_module, "_FINISH_S", 1.0)
    job = Job(tmp_path, start=3).train(4, 8)
    server.die()
    said = job.train(8, TOTAL).end()
    assert len(rows(tmp_path)) == TOTAL and len(server.run.history) < TOTAL
    assert len(said) == 2 and "W&B has stopped" in said[1] and "same command" in said[1]
    unreachable: list[str] = []
    catch_up(CONFIG, tmp_path, unreachable.append)
    assert "does not answer" in unreachable[0] and not list(tmp_path.glob("wandb/offline*"))
    server.come_back()
    # The first sends what is missing, the second learns from the server that it is there, the third knows.
    assert again(tmp_path, times=3) == [[f"W&B: {server.url}/me/proj/runs/{job.tracker.run_id}"]] * 2 + [[]]
    assert_whole(tmp_path, server.run)


def test_a_server_that_fails_gets_the_rest_by_the_same_command(tmp_path, server, monkeypatch):
    """Status 500 to every request, first in mid-run and then from the start."""
    monkeypatch.setattr(tracker_module, "_FINISH_S", 1.0)
    job = Job(tmp_path).train(0, 4)
    server.until(lambda: bool(server.runs))
    server.mood = FAILING
    said = job.train(4, 12).end()
    assert len(said) == 2 and "W&B has stopped" in said[1] and "same command" in said[1]
    monkeypatch.setattr(tracker_module, "_INIT_S", 1.0)
    said = Job(tmp_path, start=11).train(12, TOTAL).end()
    assert "W&B cannot be reached" in said[0]
    assert len(rows(tmp_path)) == TOTAL and len(server.run.history) < TOTAL
    server.mood = WELL
    again(tmp_path)
    assert_whole(tmp_path, server.run)


def test_what_was_logged_after_the_checkpoint_is_not_sent_twice(tmp_path, server):
    Job(tmp_path).train(0, 10).end()
    Job(tmp_path, start=6).train(7, TOTAL).end()
    assert_whole(tmp_path, server.run)


def test_an_offline_run_becomes_an_online_one(tmp_path, server, monkeypatch):
    server.die()
    said = Job(tmp_path).train(0, 8).end()
    assert "offline" in said[0] and "does not answer" in said[0]
    assert_whole_offline = [row["_step"] for run in offline_runs(tmp_path) for row in run.history]
    assert assert_whole_offline == [tick * 100 for tick in range(8)]
    server.come_back()
    Job(tmp_path, start=6).train(7, TOTAL).end()
    assert_whole(tmp_path, server.run)
    assert "Skipped" in sync(tmp_path)
    assert_whole(tmp_path, server.run)
    server.die()
    job = Job(tmp_path, start=TOTAL - 1)
    assert type(job.tracker) is Tracker and "cannot be reached" in job.end()[0]
    assert len(list(tmp_path.glob("wandb/offline*"))) == 1


def test_a_server_that_accepts_and_never_answers_is_waited_for_in_bounded_time(tmp_path, server, monkeypatch):
    monkeypatch.setattr(tracker_module, "_INIT_S", 1.0)
    server.mood = SILENT
    assert "does not answer" in Job(tmp_path).end()[0]
    monkeypatch.setenv("WANDB_MODE", "online")
    assert "offline" in Job(tmp_path / "other").end()[0]
    third = tmp_path / "third"
    server.mood = WELL
    monkeypatch.setattr(tracker_module, "_INIT_S", 10.0)
    monkeypatch.setattr(tracker_module, "_FINISH_S", 1.0)
    job = Job(third).train(0, 4)
    server.until(lambda: len(server.runs) > 0)
    server.mood = SILENT
    said = job.train(4, 8).end()
    assert "W&B has stopped" in said[-1] and len(rows(third)) == 8


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_service_of_wandb_dies_or_hangs(tmp_path, server, monkeypatch, number):
    Job(tmp_path).train(0, 4).end()
    job = Job(tmp_path, start=3).train(4, 8)
    monkeypatch.setattr(tracker_module, "_FINISH_S", 1.0)
    monkeypatch.setattr(tracker_module, "_TEARDOWN_S", 0.5)
    (service,) = services()
    service.send_signal(number)
    try:
        said = job.train(8, TOTAL).end()
    finally:
        service.kill()  # at its exit the client would wait for one that is stopped
    assert len(rows(tmp_path)) == TOTAL
    assert len(said) == 2 and "W&B has stopped" in said[1]
    with suppress(OSError):  # the client's state would leak into the next test
        tracker_module._end_service()
    again(tmp_path)
    assert_whole(tmp_path, server.run)


@pytest.mark.long  # a kill cuts W&B's file at a random place; the next test cuts it itself
def test_an_offline_run_killed_again_and_again_is_synced_whole(tmp_path, server, monkeypatch):
    """SIGKILL to the job and W&B's service at seeded ticks, with a checkpoint every five."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    script = f"""
        from tests.run.test_tracking_faults import Job, Path, TOTAL
        folder = Path({str(tmp_path)!r})
        found = folder / "checkpoint"
        start = int(found.read_text()) if found.exists() else -1
        job = Job(folder, start)
        for tick in range(start + 1, TOTAL):
            job.train(tick, tick + 1)
            if tick % 5 == 0:
                found.with_name("partial").write_text(str(tick))
                found.with_name("partial").replace(found)
        job.end()
    """
    line, draw = [sys.executable, "-c", textwrap.dedent(script)], random.Random(0)
    for _ in range(3):
        job = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert job.stdout is not None
        for _ in range(draw.randint(1, 9)):
            assert job.stdout.readline().startswith("kimg"), "ended too early"
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
    subprocess.run(line, cwd=ROOT, check=True)
    files = [run for run in offline_runs(tmp_path) if run.run_id]  # empty if killed early
    assert len({run.run_id for run in files}) == 1
    assert [row["_step"] for run in files for row in run.history] == [tick * 100 for tick in range(TOTAL)]
    sync(tmp_path)
    assert_whole(tmp_path, server.run)


def cut(folder: Path) -> Path:
    """Cut the one offline file as a kill does: W&B's service writes blocks of 32 KiB."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    os.truncate(path, 40_000)
    remembered = folder / "wandb" / "run.json"  # without what only an orderly end writes
    remembered.write_text(json.dumps(json.loads(remembered.read_text()) | {"has": -1, "complete": []}))
    return path


def separate_job(folder: Path, start: int, stop: int, **environment: str) -> None:
    script = f"Job(Path({str(folder)!r}), {start - 1}).train({start}, {stop}).end()"
    line = [sys.executable, "-c", f"from tests.run.test_tracking_faults import *; {script}"]
    subprocess.run(line, cwd=ROOT, env=os.environ | environment, check=True)


def test_an_offline_file_cut_in_mid_record_does_not_keep_the_rest_from_wandb(tmp_path, server, monkeypatch):
    """`wandb sync` stops at such a file without an error, so the next job writes its rows again."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    Job(tmp_path).train(0, TOTAL).end()
    path = cut(tmp_path)
    separate_job(tmp_path, 2, TOTAL)
    (run,) = offline_runs(tmp_path)
    assert [row["_step"] for row in run.history] == [tick * 100 for tick in range(TOTAL)]
    assert not path.exists() and not list(tmp_path.glob("wandb/.offline-run*"))
    sync(tmp_path)
    assert_whole(tmp_path, server.run)


def test_an_offline_file_that_a_full_disk_cut_is_written_again(small_disk, monkeypatch):
    """W&B's service does not tell of it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    job = Job(small_disk / "run").train(0, TOTAL)
    job.tracker.pause()  # or it would see that a picture cannot be written
    fill = small_disk / "fill"
    with suppress(OSError), fill.open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    said = job.end()
    assert len(said) == 2 and "could not be written whole (was the disk full?)" in said[1], said
    assert "same command again" in job.tracker.where
    fill.unlink()
    again(small_disk / "run")
    (run,) = offline_runs(small_disk / "run")
    assert [row["_step"] for row in run.history] == [tick * 100 for tick in range(TOTAL)] and run.finished


def test_what_was_synced_of_a_file_that_a_kill_cut_is_not_sent_twice(tmp_path, server, monkeypatch):
    """Only the server knows how much that was, so the run is completed there."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    Job(tmp_path).train(0, 8).end()
    path = cut(tmp_path)
    assert "incomplete record" in sync(tmp_path)
    assert 0 < len(server.run.history) < 8
    said = Job(tmp_path, start=1).train(2, TOTAL).end()
    assert len(said) == 1 and "cannot be reached" in said[0] and "same command" in said[0]
    assert path.exists() and len(list(tmp_path.glob("wandb/offline-run*"))) == 1
    monkeypatch.delenv("WANDB_MODE")
    again(tmp_path)
    assert_whole(tmp_path, server.run)
    assert "Skipped" in sync(tmp_path)
    assert_whole(tmp_path, server.run)


def test_an_offline_run_that_is_synced_between_its_jobs_has_each_step_once(tmp_path, server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start, stop in ((0, 7), (5, 13), (11, TOTAL)):  # each repeats the two steps after the checkpoint
        separate_job(tmp_path, start, stop)
        sync(tmp_path)
        assert server.run.steps == [tick * 100 for tick in range(stop)]
    assert_whole(tmp_path, server.run)


def test_local_time_that_goes_back_does_not_keep_rows_from_wandb(tmp_path, server, monkeypatch):
    """Folders are named by local time: one job is in another time zone, and one was killed before its first
    row."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    stops = [(0, "Asia/Tokyo"), (7, "UTC"), (13, "Asia/Tokyo"), (TOTAL, "")]
    for (start, zone), (stop, _) in itertools.pairwise(stops):
        separate_job(tmp_path, start, stop, TZ=zone)
        if zone == "UTC":
            written = next(tmp_path.glob("wandb/offline-run-*/*.wandb"))
            early = written.parents[1] / f"offline-run-20200101_000000-{written.stem.removeprefix('run-')}"
            early.mkdir()
            (early / written.name).write_bytes(written.read_bytes()[:7])
    assert not list(tmp_path.glob("wandb/*/*.synced"))
    sync(tmp_path)
    assert_whole(tmp_path, server.run)


def sync(folder: Path) -> str:
    line = [str(Path(sys.executable).parent / "wandb"), "sync", *map(str, folder.glob("wandb/offline-run-*"))]
    environment = os.environ | {"WANDB_MODE": "online"}
    ended = subprocess.run(  # in its own folder, as it writes a log to ./wandb
        line, check=False, capture_output=True, text=True, cwd=folder, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr
