"""What `shardgan select` refuses before anything starts: what would not compare, what cannot be trained."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace

import pytest
from click.testing import CliRunner
from launching import run, shardgan
from selections import CONFIG, finish, refer, selection

from launch.select import queue as select_queue
from launch.select import select
from launch.select import start as select_start
from launch.select import table as select_table
from launch.select.choice import PAIRED
from launch.select.selection import Selection
from launch.select.trials import LaunchOptions
from launch.slurm import jobs as slurm
from pipeline.config import UserError
from pipeline.data.index import load_index
from pipeline.data.plan import split_of
from pipeline.run.features import load_features
from pipeline.run.images import PLAIN
from pipeline.run.resume import first_state
from pipeline.run.source import Source

# The same command, later


def test_trials_of_another_length_are_not_put_beside_new_ones(tmp_path):
    _, trials = selection(tmp_path)
    finish(trials[1])
    with pytest.raises(UserError, match=r"l2=1,seed=0,fold=0 .*total_kimg: 0.064 → 0.032.*another run"):
        selection(tmp_path, "run.total_kimg=0.032")
    selection(tmp_path, "run.total_kimg=0.05")  # in whole updates the same
    _, longer = selection(tmp_path, "run.total_kimg=0.128")
    assert not longer[1].done  # and is resumed


def test_an_interrupted_trial_is_not_compared_at_a_shorter_length_than_it_has(tmp_path):
    _, trials = selection(tmp_path)
    checkpoints = trials[1].folder / "checkpoints"
    (checkpoints / "16").mkdir(parents=True)
    (checkpoints / "48").mkdir()
    with pytest.raises(UserError, match=r"l2=1,seed=0,fold=0 is already at kimg 0.048 .*at least 0.048, or"):
        selection(tmp_path, "run.total_kimg=0.032")
    selection(tmp_path, "run.total_kimg=0.048")
    selection(tmp_path, "run.total_kimg=0.128")


def test_trials_beside_those_that_an_older_version_trained_are_trained_alike(tmp_path):
    """Without ema.rampup, which it did not have: else scores would not compare."""
    _, trials = selection(tmp_path)
    assert {trial.config.ema.rampup for trial in trials} == {0.05}
    finish(trials[1])
    file = trials[1].folder / "config.yaml"
    file.write_text(file.read_text().replace("  rampup: 0.05\n", ""))
    _, trials = selection(tmp_path)
    assert {trial.config.ema.rampup for trial in trials} == {0.0}
    assert all("ema.rampup=0" in trial.arguments for trial in trials)


def test_a_trial_whose_reference_cannot_be_read_is_used_as_it_is(tmp_path):
    base, trials = selection(tmp_path)
    for trial in trials:
        finish(trial)
        (trial.folder / "reference.json").write_text('{"heldout": {"in')
    assert len(select_table.read_table(base, trials, {}, PAIRED).comparable) == 2
    select_start.check(base, trials, LaunchOptions(), 1)


def test_what_all_trials_share_is_written_and_compared(tmp_path):
    one = LaunchOptions()
    _, trials = selection(tmp_path)
    select_start.write_common(tmp_path / "mine", select_start.common(trials, one))
    assert json.loads((tmp_path / "mine" / "selection.json").read_text()) == {
        "candidates": ["--grid penalty.l2"], "strategy": "single", "procs": 1, "precision": "no",
        "compiled": False,
    }  # fmt: skip
    _, grown = selection(tmp_path, grid=["penalty.l2=0,1,2,3"])
    select_start.check_common(tmp_path / "mine", select_start.common(grown, one))
    _, other = selection(tmp_path, grid=["penalty.l1=0,1"])
    named = [replace(t, arm=replace(t.arm, values={})) for t in trials]
    for these, launch, what in [
        (trials, LaunchOptions("ddp", 2), "strategy: single → ddp; procs: 1 → 2"),
        (trials, LaunchOptions(precision="bf16"), "precision: no → bf16"),
        (trials, LaunchOptions(compiled=True), "compiled: False → True"),
        (other, one, "candidates: .*penalty.l2.* → .*penalty.l1"),
        (named, one, "candidates: .*--grid penalty.l2.* → .*--arms"),
    ]:
        with pytest.raises(UserError, match=f"{what}.*another run.name"):
            select_start.write_common(tmp_path / "mine", select_start.common(these, launch))


def test_a_later_command_that_differs_is_refused_as_such(tmp_path):
    """As a whole, by the command: one message, status 2, and nothing new on the disk."""
    _, trials = selection(tmp_path)
    for trial in trials:
        finish(trial)
    select_start.write_common(tmp_path / "mine", select_start.common(trials, LaunchOptions()))
    (tmp_path / "arms.yaml").write_text("none: []\n")
    before = sorted(tmp_path.rglob("*"))
    common = ["select", "job.yaml", f"run.out={tmp_path}", "run.name=mine", "--folds", "2"]
    ended = run(shardgan(*common, "--arms", "arms.yaml"), tmp_path)
    assert ended.status == 2 and ended.output.startswith("error: ") and "another run.name" in ended.output
    assert [path for path in sorted(tmp_path.rglob("*")) if path.suffix != ".log"] == before


def test_settings_of_another_selection_ask_for_another_name(tmp_path):
    _, trials = selection(tmp_path)
    finish(trials[0])
    with pytest.raises(UserError, match=r"G.width: 8 → 4") as refused:
        selection(tmp_path, "G.width=4")
    assert "another run.name" in str(refused.value) and "resume" not in str(refused.value)
    with pytest.raises(UserError, match=r"run.resume=false: .* another run.name"):
        selection(tmp_path, "run.resume=false")


def test_folds_are_those_of_the_option_alone(tmp_path):
    with pytest.raises(UserError, match=r"data.folds=5: .* give --folds"):
        selection(tmp_path, "data.folds=5")
    with pytest.raises(UserError, match=r"data.fold cannot differ .*; each fold is held out in turn"):
        selection(tmp_path, grid=["data.fold=1,2"])


def test_nothing_is_collected_of_what_has_not_begun(tmp_path):
    base, trials = selection(tmp_path)
    mine = Selection(base, trials, LaunchOptions(), ("job.yaml", ()), print, PAIRED)
    with pytest.raises(UserError, match="nothing to collect"):
        mine.collect()
    assert not mine.folder.exists()


@pytest.mark.parametrize("key", ["run.new_settings", "run.new_data"])
def test_trials_do_not_change_in_mid_run(tmp_path, key):
    _, trials = selection(tmp_path)
    finish(trials[0])
    with pytest.raises(UserError, match=f"{key}=true: .* another run.name"):
        selection(tmp_path, f"{key}=true", "penalty.G.l1=0.1")
    with pytest.raises(UserError, match=f"{key} cannot differ between trials"):
        selection(tmp_path, grid=[f"{key}=false,true"])


def test_finished_trials_without_the_score_to_choose_by_are_named(tmp_path):
    base, trials = selection(tmp_path, "score.metrics=[fd]")
    finish(trials[0])
    with pytest.raises(UserError, match=r"penalty.l2=0,seed=0,fold=0 .*fd.*Set score.metrics=\[kid\]"):
        select_table.check_scored(base, trials)
    base, trials = selection(tmp_path, "score.metrics=[kid,fd]")
    select_table.check_scored(base, trials)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": 15}, "images: 15 → 16"),
        ({"features": ["efflite0", "older"]}, "features"),
        ({"index": "of other images"}, "index: 'of other images'"),
    ],
)
def test_scores_against_other_images_are_refused_at_the_start(tmp_path, changed, message):
    base, trials = selection(tmp_path)
    index = load_index(base.data.train)
    plan = split_of(trials[0].config, index).heldout()
    features = load_features("efflite0")
    about = {
        "index": index.fingerprint, "plan": plan.fingerprint, "images": 16,
        "features": [features.name, features.version], "pixels": PLAIN.version,
    }  # fmt: skip
    finish(trials[0])
    refer(trials[0], about)
    select_start.check(base, trials, LaunchOptions(), 1)
    refer(trials[0], about | changed)
    with pytest.raises(UserError, match=f"penalty.l2=0,seed=0,fold=0 is finished.*{message}"):
        select_start.check(base, trials, LaunchOptions(), 1)


# What `shardgan train` refuses


@pytest.mark.parametrize(
    ("setting", "launch", "message"),
    [
        ("data.train=/nowhere", LaunchOptions(), "There are no shards at /nowhere"),
        ("D.kind=nowhere:Nothing", LaunchOptions(), "nowhere"),
        ("data.size=32", LaunchOptions(), "28"),
        ("data.batch_size=16", LaunchOptions("ddp", 3), "penalty.l2=0: .*cannot be divided"),
        ("data.batch_size=16", LaunchOptions("zero3", 2, compiled=True), "zero3 cannot be compiled"),
        ("score.features=nothing", LaunchOptions(), "no such features"),
        ("run.out=/proc/nowhere", LaunchOptions(), "/proc .*run.out to another"),
    ],
)
def test_what_no_trial_could_do_is_refused_once(tmp_path, setting, launch, message):
    base, trials = selection(tmp_path, setting)
    with pytest.raises(UserError, match=message):
        select_start.check(base, trials, launch, 1)


def test_an_arm_with_a_setting_that_there_is_none_of_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^optim\.D\.lrr=1: (.|\n)*optim\.D\.lrr: no such key"):
        selection(tmp_path, grid=["optim.D.lrr=1,2"])


def test_what_is_asked_of_slurm_needs_slurm(tmp_path):
    (tmp_path / "job.yaml").write_text(CONFIG)
    asked = ["--grid", "penalty.l2=0,1", "--gpus", "2", "--time", "1:00"]
    ended = CliRunner().invoke(select, [str(tmp_path / "job.yaml"), *asked, f"run.out={tmp_path}"])
    assert isinstance(ended.exception, UserError)
    assert str(ended.exception).startswith("--gpus and --time: for jobs. Add --slurm")


def test_one_candidate_that_cannot_be_built_does_not_stop_the_others(tmp_path):
    base, trials = selection(tmp_path, grid=["D.kind=nowhere:Nothing,dcgan"])
    select_start.check(base, trials, LaunchOptions(), 1)


def test_a_batch_that_one_candidate_cannot_divide_is_refused_with_its_name(tmp_path):
    base, trials = selection(tmp_path, grid=["data.batch_size=16,15"])
    with pytest.raises(UserError, match=r"data.batch_size=15: .*cannot be divided equally over 2"):
        select_start.check(base, trials, LaunchOptions("ddp", 2), 1)


def test_more_processes_than_gpus_are_refused(tmp_path, gpus_here):
    base, trials = selection(tmp_path)
    gpus_here(2)
    with pytest.raises(UserError, match="--jobs 2 x --procs 2 need a GPU each, but this machine has 2"):
        select_start.check(base, trials, LaunchOptions("ddp", 2), 2)
    select_start.check(base, trials, LaunchOptions("ddp", 2), None)  # on other machines


def test_bad_data_end_the_command_with_one_message(tmp_path):
    (tmp_path / "job.yaml").write_text(CONFIG)
    ended = run(shardgan("select", "job.yaml", "data.train=/nowhere", "--grid", "penalty.l2=0,1"), tmp_path)
    assert ended.status == 2 and ended.output.count("error:") == 1 and "/nowhere" in ended.output
    assert not (tmp_path / "runs").exists()


def test_a_source_that_was_split_otherwise_is_said_once(tmp_path, monkeypatch, capsys):
    base, trials = selection(tmp_path, "run.init=runs/source")
    index, said = load_index(base.data.train), "may have been trained on images that trials hold out"

    def state(trial):
        return first_state(trial.config, index, split_of(trial.config, index))

    source = Source("runs/source at kimg 1", {}, (base, tmp_path, state(trials[0])))
    monkeypatch.setattr(select_start, "open_source", lambda init: source)
    select_start.check(base, trials, LaunchOptions(), 1)
    assert capsys.readouterr().out.count(said) == 1, "fold 1 of it was trained on"
    alike = [trial for trial in trials if trial.fold == trials[0].fold]
    select_start.check(base, alike, LaunchOptions(), 1)
    for trial in trials[2:]:
        (trial.folder / "checkpoints" / "16").mkdir(parents=True)
    select_start.check(base, trials, LaunchOptions(), 1)
    assert said not in capsys.readouterr().out


def test_a_source_that_is_not_there_is_refused(tmp_path):
    base, trials = selection(tmp_path, "run.init=/nowhere")
    with pytest.raises(UserError, match=r"run.init=/nowhere: there is no run"):
        select_start.check(base, trials, LaunchOptions(), 1)


# Jobs in the queue


def test_trials_in_the_queue_are_not_trained_here_too(tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    select_queue.refuse_queued(tmp_path)
    (tmp_path / "slurm" / "job").write_text("12 13\n")
    monkeypatch.setattr(slurm, "state", {"12": None, "13": "PENDING"}.get)
    with pytest.raises(UserError, match="Job 13 of this selection is PENDING"):
        select_queue.refuse_queued(tmp_path)
    monkeypatch.setattr(slurm, "state", {"12": None, "13": None}.get)
    select_queue.refuse_queued(tmp_path)


def submitted(tmp_path, *words):
    """The trials of a selection as array 12, words before the name of each, and the folder of its logs."""
    _, trials = selection(tmp_path)
    folder = tmp_path / "mine" / "slurm"
    folder.mkdir(parents=True)
    (folder / "job").write_text("12 13\n")
    lines = (shlex.join(["job.yaml", *words, f"run.name='{trial.name}'"]) for trial in trials)
    (folder / "runs.txt").write_text("\n".join(lines))
    return trials, folder


def test_failed_jobs_are_not_taken_for_waiting_ones(tmp_path):
    trials, folder = submitted(tmp_path)
    finish(trials[0])
    (folder / "12_2.log").write_text("error: D cannot be built\nerror: job 12 ended before it was DONE\n")
    (folder / "12_3.log").write_text("error: saving failed, tried again\nkimg 3\n")
    failed = select_queue.failures(trials, tmp_path / "mine")
    assert list(failed) == [trials[1].name] and "D cannot be built" in failed[trials[1].name]


@pytest.mark.parametrize(
    "last",
    [
        "error: this cluster does not requeue: submit again to resume",
        "error: requeued 100 times and runs/a is not DONE: submit again to resume, or set SHARDGAN_REQUEUES",
        "slurmstepd: error: *** JOB 12 ON c1 CANCELLED AT 2026-11-28T10:00:00 DUE TO TIME LIMIT ***",
    ],
)
def test_jobs_out_of_time_have_not_failed(tmp_path, last):
    """Nor is the name of the selection, which the user may have quoted, that of a trial."""
    trials, folder = submitted(tmp_path, "run.name='mine'")
    (folder / "12_1.log").write_text("error: D cannot be built\n")
    (folder / "12_2.log").write_text(f"error: saving failed, tried again\nkimg 3\n{last}\n")
    assert list(select_queue.failures(trials, tmp_path / "mine")) == [trials[0].name]


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ("echo PENDING", "PENDING"),
        ("true", None),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
        ("echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1", UserError),
    ],
)
def test_a_slurm_that_does_not_answer_is_no_empty_queue(tmp_path, monkeypatch, printed, found):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{printed}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if found is UserError:
        with pytest.raises(UserError, match=r"Is job 12 still in the queue.*Socket timed out"):
            slurm.state("12")
    else:
        assert slurm.state("12") == found


def test_a_published_config_by_its_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(select, ["lambda", "--grid", "penalty.l2=0,1"])
    assert "There are no shards at data/fashion-mnist" in str(told.exception)
