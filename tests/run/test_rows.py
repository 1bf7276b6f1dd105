"""Files of JSON lines are whole after any failure, and readers survive one that is not."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from runs_on_paper import write_run
from test_tensorboard import Noting

from launch.select.candidates import Arm
from launch.select.table import _read
from launch.select.trials import Trial
from pipeline.config import load
from pipeline.run import evaluations
from pipeline.run.report import MainReport
from pipeline.run.resend import catch_up, resend
from pipeline.run.rows import append, keep, rows
from pipeline.run.saved_grids import grids_of
from pipeline.run.score_run import _warn as warn
from pipeline.run.tracker import Tracker

VALUES = {f"chart{k}": float(k) for k in range(60)}


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """Limits this process's files to so many bytes: a write across the limit is cut short, the next one
    fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def report(folder: Path, cur_nimg: int = 0) -> MainReport:
    return MainReport(folder, [], 1000, cur_nimg)


def nimgs(folder: Path) -> list[int]:
    """Of rows that anyone can parse; fails at one that is not whole."""
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line)["cur_nimg"] for line in lines]


@pytest.mark.parametrize("cut", ["at once", "only later"])
def test_a_disk_that_fills_in_the_middle_of_a_row_costs_none(tmp_path, capsys, monkeypatch, cut):
    mine = report(tmp_path)
    for n in range(3):
        mine.row(n, VALUES)
    size = (tmp_path / "metrics.jsonl").stat().st_size

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "the disk takes nothing at all")

    with full_at(size + 100), monkeypatch.context() as patch:
        if cut == "only later":
            patch.setattr(os, "ftruncate", refuse)
        for n in range(3, 6):
            mine.row(n, VALUES)
        torn = (tmp_path / "metrics.jsonl").stat().st_size - size
        assert torn == (100 if cut == "only later" else 0)
        assert [row["cur_nimg"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    for n in range(6, 8):
        mine.row(n, VALUES)
    mine.close()
    assert nimgs(tmp_path) == list(range(8))
    said = capsys.readouterr().out
    assert (
        said.count("cannot be written for now") == 1
        and said.count("can be written again, and is complete") == 1
    )


def test_rows_that_never_found_room_are_named_at_the_end(tmp_path, capsys):
    mine = report(tmp_path)
    mine.row(1000, VALUES)
    with full_at((tmp_path / "metrics.jsonl").stat().st_size + 10):
        mine.row(2000, VALUES)
        mine.row(3500, VALUES)
        mine.conclude(3500)
        mine.close()
    said = capsys.readouterr().out
    missing = "without 2 rows that could not be written (kimg 2, 3.5)"
    assert said.count(missing) == 2 and "complete." not in said.replace(f"incomplete, {missing}.", "")


def test_a_row_that_was_written_before_its_write_failed_is_not_written_twice(tmp_path, monkeypatch):
    close = os.close

    def fail_once(number: int) -> None:
        close(number)
        monkeypatch.setattr(os, "close", close)
        raise OSError(errno.EDQUOT, "no quota left")

    mine = report(tmp_path)
    monkeypatch.setattr(os, "close", fail_once)
    mine.row(1, VALUES)
    mine.row(2, VALUES)
    assert nimgs(tmp_path) == [1, 2]


TORN = [b'{"cur_nimg": 2, "a": 1', b"\0" * 90, b"\xff\xfe", b'{"a": 1}', b"[1]", b"7", b'{"cur_nimg": null}']


@pytest.fixture(params=TORN, ids=range(len(TORN)))
def torn(request, tmp_path) -> Path:
    """metrics.jsonl of a run with a damaged row in the middle and a torn one at the end."""
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    for n in (1, 2):
        append(file, {"cur_nimg": n, "time": 1.0, "Metrics/kid_x": 1 / n, "Timing/img_per_sec": 1.0})
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(whole[0] + request.param + b"\n" + whole[1] + b'{"cur_nimg": 3, "Met')
    return file


def test_a_damaged_row_is_named_and_passed_over(torn):
    said: list[str] = []
    assert [row["cur_nimg"] for row in rows(torn, said.append)] == [1, 2]
    assert [line.partition(" is damaged")[0] for line in said] == [f"{torn}, line {n}" for n in (2, 4)]


def test_a_run_that_goes_on_names_it_and_has_none_from_then_on(torn, capsys):
    mine = report(torn.parent, cur_nimg=2)
    mine.row(3, {"Metrics/kid_x": 0.25})
    mine.conclude(3)
    assert nimgs(torn.parent) == [1, 2, 3]
    said = capsys.readouterr().out
    assert said.count("is damaged") == 2 and "kid_x 1.000 at kimg 0.001, 0.250 at kimg 0.003" in said


def test_a_finished_run_and_select_survive_it(torn):
    folder = torn.parent
    (folder.parent / "c.yaml").write_text(f"{{data: {{train: x}}, run: {{out: '{folder.parent}'}}}}")
    settings = load(folder.parent / "c.yaml", ["run.name=run"])
    outcome = _read(Trial(Arm("a", (), {}), 0, 0, settings, ()), "kid")
    assert outcome is not None and (outcome.score, outcome.seconds) == (0.5, 2.0)
    said: list[str] = []
    catch_up(load(folder.parent / "c.yaml", ["run.name=run", "track.wandb=false"]), folder, said.append)
    assert len(said) == 2


@pytest.mark.parametrize("content", [b'[{"a": 1}, {"b"', b"{}", b"", b"\xff"])
def test_a_damaged_list_of_scores_is_kept_and_a_new_one_begun(tmp_path, capsys, content):
    file = tmp_path / "scores.json"
    file.write_bytes(content)
    evaluations.add(file.parent, {"c": 1}, print, warn)
    evaluations.add(file.parent, {"d": 2}, print, warn)
    assert json.loads(file.read_text()) == [{"c": 1}, {"d": 2}]
    assert (tmp_path / "scores.damaged.json").read_bytes() == content
    assert capsys.readouterr().err.count("is damaged") == 1


def test_what_is_trained_again_is_forgotten(tmp_path):
    """It may become something else, as after a change of settings at an older checkpoint."""
    run = write_run(tmp_path / "run")
    (run / "scores.json").write_text(json.dumps([{"cur_nimg": at} for at in (40, 80, 40)]))
    report(run, cur_nimg=40)
    assert nimgs(run) == [0]
    assert [cur_nimg for cur_nimg, _ in grids_of(run)] == [0, 40]
    assert json.loads((run / "scores.json").read_text()) == [{"cur_nimg": 40}] * 2


def test_scores_of_processes_that_end_together_are_all_kept(tmp_path):
    file, context = tmp_path / "scores.json", multiprocessing.get_context("fork")
    together = context.Barrier(6, timeout=60)  # if one dies, the others do too
    each = [context.Process(target=_append_together, args=(together, file, number)) for number in range(6)]
    for process in each:
        process.start()
    for process in each:
        process.join()
    assert sorted(entry["n"] for entry in json.loads(file.read_text())) == sorted([*range(6)] * 5)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def _append_together(together, file, number):
    for _ in range(5):
        together.wait()
        evaluations.add(file.parent, {"n": number}, print, print)


def test_forgetting_needs_no_room(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for n in range(4):
        append(file, {"cur_nimg": n, **VALUES})
    with full_at(10):
        keep(file, lambda row: row["cur_nimg"] < 2)
    assert nimgs(tmp_path) == [0, 1]


def test_what_is_forgotten_for_damage_is_said_in_one_reading(tmp_path):
    """Of a run of millions of rows, a second one would take long."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"cur_nimg": 0}\n\n{"cur_n\n{"cur_nimg": 1}\n{"cur_nimg": 2}\n{"cur_nimg": 1')
    with patch.object(json, "loads", wraps=json.loads) as parsed:
        said: list[str] = []
        keep(file, lambda row: row["cur_nimg"] < 2, said.append)
    assert parsed.call_count == 6 and nimgs(tmp_path) == [0, 1]
    assert said == [
        f'{file}, line 3 is damaged and is skipped: {{"cur_n',
        f'{file}, line 6 is damaged and is skipped: {{"cur_nimg": 1',
    ]


def test_a_long_file_is_not_held_in_memory(tmp_path):
    """Neither to forget its end nor to send it; a process keeps what it has once held."""
    file = tmp_path / "metrics.jsonl"
    values = {f"Weights/G/norm/{layer}": layer / 7 for layer in range(50)}
    file.write_text("".join(json.dumps({"cur_nimg": n, **values}) + "\n" for n in range(3000)))
    size, sent = file.stat().st_size, Noting()
    tracemalloc.start()
    try:
        keep(file, lambda row: row["cur_nimg"] < 2900)
        resend(tmp_path, sent, 2899)
        assert tracemalloc.get_traced_memory()[1] < size / 5
    finally:
        tracemalloc.stop()
    assert nimgs(tmp_path) == sent.calls == list(range(2900))
    with patch.object(json, "loads", side_effect=AssertionError("read for nobody")):
        resend(tmp_path, Tracker(), 2899)


def test_a_row_that_another_process_is_writing_is_left_whole(tmp_path, monkeypatch):
    """Ranks that fail together add to one events.jsonl."""
    file, row = tmp_path / "events.jsonl", json.dumps({"cur_nimg": 1}).encode() + b"\n"
    other = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    fcntl.flock(other, fcntl.LOCK_EX)
    os.write(other, row[:7])

    def meanwhile(_: float) -> None:
        os.write(other, row[7:])
        fcntl.flock(other, fcntl.LOCK_UN)

    monkeypatch.setattr("time.sleep", meanwhile)
    append(file, {"cur_nimg": 2})
    os.close(other)
    assert [row["cur_nimg"] for row in rows(file)] == [1, 2]


def test_a_suspended_process_keeps_nobody_from_writing(tmp_path, monkeypatch):
    file = tmp_path / "events.jsonl"
    clock = iter(range(9))
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with file.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        append(file, {"cur_nimg": 2})
    assert len(rows(file)) == 1
