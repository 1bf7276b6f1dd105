"""The tracker against the real client: what an offline run holds, and that nothing stops training."""

import http.server
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import wandb
from PIL import Image

from pipeline.config import Config, load
from pipeline.errors import RunError
from pipeline.run import tracker as tracker_module
from pipeline.run.report import MainReport
from pipeline.run.resend import resend
from pipeline.run.tracker import Tracker, WandbTracker, open_tracker
from pipeline.run.wandb_files import Tracked, find_run, recall
from pipeline.run.wandb_mode import choose_mode, public
from tests.wandb_offline import offline_runs

ROOT = Path(__file__).parents[2]
SETTINGS = ("run.name=demo", "track.project=proj", "track.group=grp", "track.tags=[a,b]", "penalty.l2=0.25")


pytestmark = pytest.mark.usefixtures("no_account")


def config(*settings: str) -> Config:
    return load(None, ["data.train=shards", *SETTINGS, *settings])


def picture(path: Path) -> Path:
    Image.new("RGB", (8, 4), (255, 0, 0)).save(path)
    return path


def test_a_script_s_own_run_stays_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    mine = wandb.init(project="mine", dir=tmp_path, id="abcd1234")
    said: list[str] = []
    tracker = open_tracker(config(), tmp_path / "run", "of-before", said.append)
    assert not tracker.tracks and tracker.run_id == "of-before" and not (tmp_path / "run/wandb").exists()
    assert said == [
        "W&B is off: run abcd1234 is active in this process, and would take this run's charts. Finish it "
        "first (wandb.finish()) to track this one."
    ]
    tracker.finish()
    mine.log({"still": 1.0})
    mine.finish()
    again = open_tracker(config(), tmp_path / "run", None, said.append)
    assert again.tracks
    again.finish()


def test_an_offline_run_holds_config_charts_pictures_and_keeps_its_id(tmp_path, capfd):
    said: list[str] = []
    first = open_tracker(config(), tmp_path, None, said.append)
    first.log({"Loss/G/loss": 1.5, "Progress/kimg": 0.064}, 64)
    first.log({"Loss/G/loss": 1.25, "Progress/kimg": 0.128}, 128)
    grid = picture(tmp_path / "fakes000000.png")
    first.image("Samples/fakes", grid, 128, "kimg 0.1")
    grid.unlink()
    first.summary({"Metrics/kid_efflite0": 0.5})
    first.finish()
    first.finish()
    time.sleep(1.1)  # W&B names folders by the second
    resumed = open_tracker(config(), tmp_path, first.run_id, said.append)
    resumed.log({"Loss/G/loss": 1.0, "Progress/kimg": 0.192}, 192)
    resumed.finish()

    before, after = offline_runs(tmp_path)
    assert before.run_id == after.run_id == first.run_id == resumed.run_id
    assert (before.project, before.name, before.group, before.tags) == ("proj", "demo", "grp", ["a", "b"])
    assert before.config["penalty"]["G"]["l2"] == 0.25 and before.config["data"]["train"] == "shards"
    assert before.metrics["*"] == "Progress/kimg"
    assert [row["_step"] for row in before.history] == [64, 128]
    assert [row["Loss/G/loss"] for row in before.history] == [1.5, 1.25]
    image = before.history[1]["Samples/fakes"]
    assert (image["caption"], image["width"], image["height"]) == ("kimg 0.1", 8, 4)
    with Image.open(before.files / image["path"]) as stored:
        assert stored.getpixel((0, 0)) == (255, 0, 0)
    assert before.summary["Metrics/kid_efflite0"] == 0.5
    assert [row["_step"] for row in after.history] == [192]
    assert before.finished and after.finished

    assert len(said) == 2 and "offline" in said[0] and "API key" in said[0]
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in said[0]
    assert capfd.readouterr() == ("", ""), "W&B must not write to the terminal itself"


def test_a_copied_run_folder_has_a_run_of_its_own_and_a_renamed_one_keeps_its(tmp_path):
    (tmp_path / "first").mkdir()
    first = open_tracker(config(), tmp_path / "first", None, print)
    first.log({"Loss/G/loss": 1.5}, 64)
    first.finish()
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    said: list[str] = []
    copy = open_tracker(config(), tmp_path / "copy", first.run_id, said.append)
    copy.log({"Loss/G/loss": 1.5}, 64)
    copy.finish()
    assert copy.run_id != first.run_id and "is a copy of another run's folder" in said[0]
    assert find_run(tmp_path / "copy", first.run_id)[0].run_id == copy.run_id
    assert [run.name for run in (tmp_path / "copy").glob(f"wandb/offline-run-*-{first.run_id}/*.synced")]
    (tmp_path / "copy").rename(tmp_path / "renamed")
    assert find_run(tmp_path / "renamed", copy.run_id) == (
        replace(recall(tmp_path / "renamed"), of="renamed"),
        False,
    )
    assert find_run(tmp_path / "first", first.run_id)[0].run_id == first.run_id


def test_nothing_but_a_file_is_needed_where_tracking_is_not_wanted(tmp_path, monkeypatch):
    said: list[str] = []
    trackers = [
        open_tracker(config("track.wandb=false"), tmp_path, "id", said.append),
    ]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trackers.append(open_tracker(config(), tmp_path, "id", said.append))
    for tracker in trackers:
        assert type(tracker) is Tracker and tracker.run_id == "id"
        tracker.log({"a": 1.0}, 1)
        tracker.image("i", tmp_path / "missing.png", 1, "")
        tracker.summary({"a": 1.0})
        tracker.finish()
    assert not said and not (tmp_path / "wandb").exists()


KEY = "0123456789abcdef" * 2 + "01234567"


def test_a_key_and_no_network_is_offline_without_a_long_wait(tmp_path, monkeypatch):
    """A server that is not there is asked by a short question, not by wandb.init, which waits for long."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    with patch.object(wandb, "init", wraps=wandb.init) as begun:
        tracker = open_tracker(config(), tmp_path, None, said.append)
    assert [call.kwargs["mode"] for call in begun.call_args_list] == ["offline"]
    tracker.finish()
    assert len(said) == 1 and "offline" in said[0] and "does not answer" in said[0]


def test_a_key_is_found_in_netrc(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert choose_mode() == ("offline", "http://127.0.0.1:9 does not answer")
    monkeypatch.setenv("NETRC", "~nobody-here/netrc")
    assert "no API key" in choose_mode()[1]


@pytest.fixture
def refusing_server(monkeypatch):
    """A server that answers every request with a refusal."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.parametrize("failed", [False, True])
def test_wandb_shows_whether_a_run_failed(tmp_path, failed):
    report = MainReport(tmp_path, [open_tracker(config(), tmp_path, None, print)], 1000, 0)
    with suppress(RunError), closing(report), report.kept(1):
        report.row(64, {"a": 1.0})
        if failed:
            raise RunError("training has diverged")
    (run,) = offline_runs(tmp_path)
    assert (run.finished, run.status) == (True, int(failed))


def test_a_server_that_refuses_leaves_an_offline_run(tmp_path, monkeypatch, refusing_server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracker_module, "_INIT_S", 5.0)
    said: list[str] = []
    assert choose_mode()[0] == "online"
    tracker = open_tracker(config(), tmp_path, None, said.append)
    tracker.log({"a": 1.0}, 64)
    tracker.finish()
    assert len(said) == 1 and said[0].startswith("W&B: offline") and KEY not in said[0]
    (run,) = offline_runs(tmp_path)
    assert run.finished and run.history[0]["a"] == 1.0


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_mode_decides_if_set(mode, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode()[0] == mode


def test_any_failure_of_init_is_one_line(tmp_path, monkeypatch):
    import wandb

    def broken(**_: object) -> None:
        raise OSError(f"no space left, key {KEY}")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb, "init", broken)
    said: list[str] = []
    tracker = open_tracker(config(), tmp_path, "id", said.append)
    assert type(tracker) is Tracker and tracker.run_id == "id"
    assert said == ["W&B is off: OSError: no space left, key …"]


def test_after_an_opening_that_failed_the_next_training_is_tracked(tmp_path, monkeypatch):
    """In one interpreter, where W&B's run of the first would be taken for a script's."""
    said: list[str] = []
    with monkeypatch.context() as full:
        full.setattr(tracker_module, "remember", Mock(side_effect=OSError("no space left")))
        assert not open_tracker(config(), tmp_path / "first", None, said.append).tracks
    second = open_tracker(config(), tmp_path / "second", None, said.append)
    assert second.tracks, said
    second.abandon()
    third = open_tracker(config(), tmp_path / "third", None, said.append)
    assert third.tracks and third.run_id != second.run_id
    third.finish()
    assert [len(offline_runs(tmp_path / name)) for name in ("second", "third")] == [1, 1]


def test_a_service_that_does_not_start_keeps_nothing_waiting(tmp_path):
    """W&B itself then waits for ever, which is why this is another process."""
    script = f"""
        from pathlib import Path
        from pipeline.run import wandb_mode
        from pipeline.run.tracker import open_tracker
        from tests.run.test_tracker import config
        wandb_mode._SERVICE_S = 3.0
        for name in "ab":
            tracker = open_tracker(config(), Path({str(tmp_path)!r}, name), None, print)
            assert not tracker.tracks
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env=os.environ | {"WANDB__SERVICE_WAIT": "0.001", "WANDB_MODE": "offline"},
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert [line.partition(":")[0] for line in ended.stdout.splitlines()] == 2 * ["W&B is off"], ended.stdout


def test_a_failure_later_on_is_one_line_and_then_silence(tmp_path):
    said: list[str] = []
    tracker = open_tracker(config(), tmp_path, None, said.append)
    assert isinstance(tracker, WandbTracker)
    tracker.image("i", tmp_path / "missing.png", 1, "")
    tracker.log({"a": 1.0}, 2)
    tracker.finish()
    assert len(said) == 2 and said[1].startswith("W&B has stopped, training continues without it: ")


def test_a_run_of_many_ticks_is_sent_at_the_speed_that_wandb_takes_it(tmp_path, monkeypatch):
    """Else each start would give up, as too much waits."""
    pausing, paused, steps, said = WandbTracker.pause, threading.Event(), [], []

    def pause(self: WandbTracker) -> None:
        paused.set()
        pausing(self)

    def log(_: dict[str, float], step: int) -> None:
        paused.wait()
        steps.append(step)

    monkeypatch.setattr(WandbTracker, "pause", pause)
    monkeypatch.setattr(tracker_module, "_MOST_PENDING", 1500)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"cur_nimg": {at}, "x": 1}}\n' for at in range(5000)))
    run = SimpleNamespace(log=log, finish=lambda exit_code: None, offline=False, url="", dir="")
    tracker = WandbTracker(run, Tracked("id", online=True, has=-1), tmp_path, said.append)
    resend(tmp_path, tracker, 4500)
    tracker.finish()
    assert steps == list(range(4501)) and not said


def test_passwords_in_urls_stay_here(tmp_path):
    urls = "data.train=https://user:pass@host/{0..9}.tar?X-Amz-Signature=abc"
    values = public(config(urls))
    assert values["data"]["train"] == "https://host/{0..9}.tar"
    assert public(config("data.train=a?b@c"))["data"]["train"] == "a?b@c"
    several = public(config("G.kind=m:C", "G.options.url='see https://a:b@h and https://c:SECOND@h'"))
    assert several["G"]["options"]["url"] == "see https://h and https://h"


def test_rows_survive_sigterm_to_the_whole_process_group(tmp_path):
    """As Slurm and a terminal send it: to the W&B service too, while the loop's handler calls finish()."""
    script = f"""
        import os, signal, sys, time
        from pathlib import Path
        from pipeline.config import load
        from pipeline.run.tracker import open_tracker
        config = load(None, ["data.train=x", "run.name=demo"])
        tracker = open_tracker(config, Path({str(tmp_path)!r}), None, print)
        def stop(*_):
            tracker.finish()
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        for step in range(50):
            tracker.log({{"a": step}}, step)
        print("ready", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0
    (run,) = offline_runs(tmp_path)
    assert len(run.history) == 50 and run.finished
