"""How trials are trained some at a time: each in its share of the machine, and stopped together."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from click.testing import CliRunner
from selections import CONFIG, finish, selection

from launch import processes
from launch.select import local as select_local
from launch.select import queue as select_queue
from launch.select import select
from launch.select.selection import Selection
from launch.select.trials import LaunchOptions
from pipeline import config
from pipeline.config import UserError
from pipeline.lock import LockLostError, take
from pipeline.run.stop import StopSignals


def test_a_config_that_is_edited_meanwhile_changes_no_trial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(CONFIG)
    widths = []

    def call(self, trial, log, share):
        trained = config.load(trial.arguments[0], trial.arguments[1:])  # as pipeline.train does
        widths.append(trained.G.width)
        finish(trial)
        (tmp_path / "job.yaml").write_text(CONFIG.replace("G: {width: 8", "G: {width: 16"))
        return 0

    monkeypatch.setattr(select_local._Crew, "_call", call)
    monkeypatch.setattr("launch.select.start.check", lambda *_: None)
    words = ["job.yaml", "run.name=mine", "--grid", "penalty.l2=0,1", "--folds", "2"]
    ended = CliRunner().invoke(select, words)
    assert ended.exit_code == 0, ended.output
    assert widths == [8] * 4 and config.load("runs/mine/best.yaml").G.width == 8


def test_a_config_that_needs_what_candidates_set(tmp_path, monkeypatch):
    """How often is what is tried: augment.ops alone is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(CONFIG + "augment: {ops: [flip]}\n")
    monkeypatch.setattr(select_local._Crew, "_call", lambda self, trial, *_: finish(trial) or 0)
    monkeypatch.setattr("launch.select.start.check", lambda *_: None)
    ended = CliRunner().invoke(select, ["job.yaml", "--grid", "augment.p=0,0.3", "--folds", "2"])
    assert ended.exit_code == 0, ended.output
    best = config.load("runs/job/best.yaml")
    assert best.run.name == "job-best" and best.augment.p == 0
    ended = CliRunner().invoke(select, ["job.yaml", "--grid", "G.width=4,8", "--folds", "2"])
    assert "augment.ops: how often?" in str(ended.exception)


class Ended:
    """In the place of a training."""

    def wait(self) -> int:
        return 0


WRITES = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(select_local, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def test_cores_are_shared_by_all_processes_at_a_time(cores, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert select_local.shares(LaunchOptions("ddp", 2), 2) == [{"OMP_NUM_THREADS": "2"}] * 2
    assert select_local.shares(LaunchOptions(), 16)[0] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert select_local.shares(LaunchOptions(), 2) == [{"OMP_NUM_THREADS": "5"}] * 2


def test_every_trial_at_a_time_has_gpus_of_its_own(cores, monkeypatch, gpus_here):
    gpus_here(4)
    alone = [share["CUDA_VISIBLE_DEVICES"] for share in select_local.shares(LaunchOptions(), 3)]
    assert alone == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    pairs = [share["CUDA_VISIBLE_DEVICES"] for share in select_local.shares(LaunchOptions("ddp", 2), 2)]
    assert pairs == ["7,5", "3,1"]
    with pytest.raises(UserError, match="--jobs 3 x --procs 2 need a GPU each"):
        select_local.shares(LaunchOptions("ddp", 2), 3)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert select_local.shares(LaunchOptions("ddp", 2), 3) == [{"OMP_NUM_THREADS": "1"}] * 3


def train(tmp_path, trials, ended, monkeypatch, code: str, jobs: int, said: list[str]) -> StopSignals:
    """`run`, with `code` in the place of each training."""
    line = [sys.executable, "-c", code]
    monkeypatch.setattr(select_local, "training", lambda *_: (line, dict(os.environ)))
    folder = tmp_path / "mine"
    with select_local.hold(folder, trials, said.append):
        return select_local.train(trials, LaunchOptions(), jobs, folder, said.append, ended)


def test_what_begins_is_shown_and_each_is_a_run_of_its_own(tmp_path, cores, monkeypatch, gpus_here):
    _, trials = selection(tmp_path)
    gpus_here(2)
    monkeypatch.setenv("WANDB_RUN_ID", "one-for-all")
    said, ended = [], []
    train(tmp_path, trials, lambda trial, _: ended.append(trial), monkeypatch, WRITES, 2, said)
    assert len(ended) == 4 and len(said) == 1
    assert trials[0].name in said[0] and trials[1].name in said[0] and str(tmp_path / "mine/logs") in said[0]
    assert trials[2].name not in said[0]
    seen = [json.loads((tmp_path / "mine" / "logs" / f"{t.name}.log").read_text()) for t in trials]
    assert not any("WANDB_RUN_ID" in one for one in seen)
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen} == {"0", "1"}
    assert {one["OMP_NUM_THREADS"] for one in seen} == {"4"}


def test_the_command_says_how_each_trial_is_launched(tmp_path, cores, monkeypatch):
    """As one process, and as several; and as a job of Slurm."""
    monkeypatch.setattr(processes, "check_compiling", lambda _: None)
    found: list[Selection] = []
    launched: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(Selection, "train", lambda self, _: found.append(self))
    monkeypatch.setattr(select_local, "start", lambda *how, **_: launched.append(how) or Ended())
    (tmp_path / "job.yaml").write_text(CONFIG)
    given = [str(tmp_path / "job.yaml"), f"run.out={tmp_path}", "--grid", "penalty.l2=0,1"]
    for how in ([], ["--procs", "2", "--strategy", "ddp"]):
        found.clear()
        launched.clear()
        CliRunner().invoke(select, [*given, "--compile", "--mixed_precision", "bf16", *how])
        select_local.train(found[0].trials[:1], found[0].launch, 1, tmp_path, str, lambda *_: None)
        ((line, environment),) = launched
        assert environment["ACCELERATE_DYNAMO_BACKEND"] == "INDUCTOR"
        assert ("--dynamo_backend inductor" in " ".join(line)) == bool(how)
        assert "bf16" in (line if how else environment["ACCELERATE_MIXED_PRECISION"])


def test_what_does_not_compare_ends_all_at_once(tmp_path, monkeypatch):
    """The first ends, and turns out not to compare: the one beside it is asked to stop, no other starts."""
    _, trials = selection(tmp_path)
    code = (
        f"import os, time\ntry: os.mkdir('{tmp_path}/first')\n"
        f"except OSError: time.sleep(60); os.mkdir('{tmp_path}/left alone')"
    )
    said = []

    def ended(trial, problem):
        said.append(trial.name)
        raise UserError("does not compare")

    with pytest.raises(UserError, match="does not compare"):
        train(tmp_path, trials, ended, monkeypatch, code, 2, [])
    assert len(said) == 1 and not (tmp_path / "left alone").exists()
    assert len(list((tmp_path / "mine" / "logs").iterdir())) == 2


def test_a_trial_that_says_nothing_has_failed(tmp_path, monkeypatch):
    _, trials = selection(tmp_path)
    finish(trials[0])
    problems = {}

    def ended(trial, problem):
        problems[trial.name] = problem

    signals = train(tmp_path, trials[:2], ended, monkeypatch, "raise SystemExit(3)", 1, [])
    assert signals.received is None
    assert all("exit status 3: without a word" in problem for problem in problems.values())


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("error: no disk\nmore", "exit status 2: error: no disk"),
        (
            "error: this cannot be trained:\n  D has batch norm",
            "exit status 2: error: this cannot be trained: D has",
        ),
    ],
)
def test_why_a_trial_has_failed_is_said(tmp_path, monkeypatch, printed, said):
    _, trials = selection(tmp_path)
    problems = []
    code = f"import sys; print({printed!r}); sys.exit(2)"
    train(tmp_path, trials[:1], lambda _, problem: problems.append(problem), monkeypatch, code, 1, [])
    assert problems[0].startswith(said) and "more" not in problems[0]


def test_it_waits_for_another_selection_and_for_trials_that_outlived_one(tmp_path):
    _, trials = selection(tmp_path)
    held = {folder: take(folder, print) for folder in (tmp_path / "mine", *(t.folder for t in trials[1:]))}
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text.split(" is in use by pid ")[0])
        if len(said) == 1:  # of the selection
            held[tmp_path / "mine"].release()
        elif len(said) == len(held):  # all trials are waited for at once
            for trial in trials[1:]:
                held[trial.folder].release()

    with select_local.hold(tmp_path / "mine", trials, say) as lock:
        assert said[0] == str(tmp_path / "mine") and sorted(said) == sorted(map(str, held))
        lock.check()
    with pytest.raises(LockLostError):
        lock.check()


def test_failures_are_those_of_all_arrays(tmp_path):
    _, trials = selection(tmp_path)
    folder = tmp_path / "mine" / "slurm"
    folder.mkdir(parents=True)
    (folder / "job").write_text("12 13 14 15\n")
    for file, mine in (("runs.txt", trials[:2]), ("runs-2.txt", trials[1:3])):
        (folder / file).write_text("".join(f"job.yaml \"run.name='{trial.name}'\"\n" for trial in mine))
    for log in ("12_1.log", "12_2.log", "14_2.log"):
        (folder / log).write_text(f"error: {log} is full\n")
    failed = select_queue.failures(trials, tmp_path / "mine")
    assert list(failed) == [trials[0].name, trials[2].name], "the second was trained again"
    assert "14_2.log is full" in failed[trials[2].name]
