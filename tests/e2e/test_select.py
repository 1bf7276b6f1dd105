"""`shardgan select`: candidates, trials, table and choice; killed and continued, with the same table."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from launching import FASHION, RunFolder, run, shardgan
from launching import Started as start
from PIL import Image

import pipeline.train
from launch.select import candidates as select_candidates
from launch.select import table as select_table
from launch.select import trials as select_trials
from pipeline import config
from pipeline.config import UserError

CONFIG = f"""
run: {{total_kimg: 0.064, tick_kimg: 0.016, checkpoint_kimg: 0.016, snapshot_kimg: 0.016, eval_kimg: 0.032}}
data: {{train: {FASHION}, size: 28, channels: 1, batch_size: 16, workers: 0}}
G: {{width: 8, norm: none, z_dim: 16}}
D: {{width: 8, norm: none}}
score: {{images: 16}}
track: {{wandb: false}}
"""
ARMS = "none: []\nL2: [penalty.l2=1e-2]\nmissing: ['D.kind=nowhere:Nothing']\n"


@pytest.fixture
def job(tmp_path) -> str:
    (tmp_path / "job.yaml").write_text(CONFIG)
    return str(tmp_path / "job.yaml")


# What is tried


def test_a_grid_is_every_combination_and_ranges_are_even_in_log():
    (arm, *_), names = select_candidates.grid(["penalty.l2=0,1e-6:1e-2:5"]), ["0", "1e-06", "1e-05"]
    arms = select_candidates.grid(["penalty.l2=0,1e-6:1e-2:5"])
    assert [a.values["penalty.l2"] for a in arms] == [*names, "0.0001", "0.001", "0.01"]
    assert arm.settings == ("penalty.l2=0",) and arm.number("penalty.l2") == 0
    both = select_candidates.grid(["penalty.G.l2=0,1e-3", "D.norm=none,batch"])
    assert [a.slug for a in both] == [
        "penalty.G.l2=0,D.norm=none", "penalty.G.l2=0,D.norm=batch",
        "penalty.G.l2=0.001,D.norm=none", "penalty.G.l2=0.001,D.norm=batch",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["penalty.l2"], "not of the form"),
        (["penalty.l2=0:1:3"], "0 < LOW"),
        (["penalty.l2=1e-3:1"], "LOW:HIGH:COUNT"),
        (["penalty.l2=1", "penalty.l2=2"], "each key once"),
    ],
)
def test_a_grid_that_cannot_be_read_is_refused(grid, message):
    with pytest.raises(UserError, match=message):
        select_candidates.grid(grid)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("score.images=32", "score cannot differ between trials"),
        ("data.size=32", "data.size cannot differ"),
        ("run.total_kimg=1", "run.total_kimg cannot differ"),
        ("run.seed=1", "use --seeds"),
        ("penalty.l3=1", "no such key"),
    ],
)
def test_what_would_not_compare_is_refused_before_anything_starts(job, tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        select_trials.trials(job, [], select_candidates.grid([setting]), 2, 1)
    assert list(tmp_path.iterdir()) == [Path(job)]


def test_trials_go_fold_by_fold_and_are_ordinary_runs(job):
    arms = select_candidates.grid(["penalty.l2=0,1"])
    base, trials = select_trials.trials(job, ["run.out=there", "run.name=mine"], arms, 2, 2)
    assert [t.name for t in trials[:4]] == [
        "penalty.l2=0,seed=0,fold=0", "penalty.l2=1,seed=0,fold=0",
        "penalty.l2=0,seed=0,fold=1", "penalty.l2=1,seed=0,fold=1",
    ]  # fmt: skip
    last = trials[-1].config
    assert (last.run.seed, last.data.folds, last.data.fold, last.penalty.G.l2) == (1, 2, 1, 1.0)
    assert last.run.out == "there/mine/trials" and last.track.group == base.run.name == "mine"
    assert config.load(trials[-1].arguments[0], trials[-1].arguments[1:]) == last


def test_trials_are_scored_at_their_end_unless_the_command_says_otherwise(job):
    arms = select_candidates.grid(["penalty.l2=0,1"])
    base, (trial, *_) = select_trials.trials(job, [], arms, 2, 1)
    assert (base.run.eval_kimg, base.run.snapshot_kimg, base.run.keep) == (0.032, 0.016, 2)
    assert (trial.config.run.eval_kimg, trial.config.run.snapshot_kimg) == (1e9, 1e9)
    assert trial.config.run.keep == 1
    _, (trial, *_) = select_trials.trials(job, ["run.eval_kimg=0.016"], arms, 2, 1)
    assert (trial.config.run.eval_kimg, trial.config.run.snapshot_kimg) == (0.016, 1e9)


# For real


def test_killed_and_continued_it_ends_with_the_same_table(job, tmp_path, signals_kept):
    """A candidate that cannot be trained is reported, and stops neither the others nor the choice."""
    (tmp_path / "arms.yaml").write_text(ARMS)
    (tmp_path / "two.yaml").write_text("\n".join(ARMS.splitlines()[:2]))
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"

    scored = "run.eval_kimg=0.032"
    line = shardgan(
        "select", job, scored, "run.name=whole", "--arms", "arms.yaml", "--folds", "2", "--jobs", "2"
    )
    ended = run(line, tmp_path)
    assert ended.status == 0, ended.output
    assert "Training now" in ended.output and (whole / "selection.json").exists()
    expected = json.loads((whole / "table.json").read_text())
    assert [row["finished"] for row in expected["rows"]] == [2, 2, 0]
    assert expected["one_standard_error"] in ("none", "L2")
    (failure, _) = expected["rows"][2]["failed"].values()
    assert "nowhere" in failure and failure in ended.output

    line = shardgan("select", job, scored, "run.name=broken", "--arms", "two.yaml", "--folds", "2")
    first = broken / "trials" / "none,seed=0,fold=0"
    started = start(line, tmp_path).until((first / "DONE").exists)
    os.killpg(started.process.pid, signal.SIGKILL)
    started.process.wait()
    done_at = (first / "DONE").stat().st_mtime_ns
    ended = run(line, tmp_path)
    assert ended.status == 0, ended.output
    found = json.loads((broken / "table.json").read_text())
    assert (first / "DONE").stat().st_mtime_ns == done_at  # not trained again
    without_time = [{k: v for k, v in row.items() if k != "seconds"} for row in expected["rows"][:2]]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in found["rows"]] == without_time

    check_what_is_written(whole)
    check_that_the_best_trains(whole)
    check_references(job, whole)


def check_what_is_written(folder: Path) -> None:
    chosen = json.loads((folder / "table.json").read_text())["one_standard_error"]
    best = config.load(folder / "best.yaml")
    assert best.penalty.D.l2 == (0.01 if chosen == "L2" else 0.0)
    assert best.data.folds is None and best.run.name == "whole-best" and best.run.out == "runs"
    report = (folder / "report.md").read_text()
    assert "| L2 | 2 |" in report and "| missing | 0 (2 failed) |" in report
    assert "| 0.032 | " in report and "| 0.064 | " in report
    for picture in ("curve.png", "weights.png", "learning.png"):
        assert picture in report and min(Image.open(folder / picture).size) > 300


def check_that_the_best_trains(folder: Path) -> None:
    """With sample grids and scores as the config says."""
    here = [f"run.out={folder}", "run.total_kimg=0.032"]
    assert pipeline.train.main([str(folder / "best.yaml"), *here]) == 0
    best, trial = (RunFolder(folder / name) for name in ("whole-best", "trials/none,seed=0,fold=0"))
    scored = [[row["cur_nimg"] for row in run.rows if "Metrics/kid_efflite0" in row] for run in (best, trial)]
    assert scored == [[0, 32], [0, 32, 64]]
    assert (best.path / "samples" / "reals.png").exists()
    assert list((best.path / "samples").glob("fakes*.png"))
    assert len(list((trial.path / "checkpoints").iterdir())) <= 2  # the newest, and the best


def check_references(job: str, folder: Path) -> None:
    """Two trials of a fold that were scored against other images do not stand in one table."""
    arms = select_candidates.arms(folder.parent.parent / "two.yaml")
    given = [f"run.out={folder.parent}", "run.name=whole", "run.eval_kimg=0.032"]
    base, trials = select_trials.trials(job, given, arms, 2, 1)
    assert select_table.read_table(base, trials, {}).minimum is not None
    file = trials[0].folder / "reference.json"
    file.write_text(file.read_text().replace('"images": 16', '"images": 15'))
    with pytest.raises(UserError, match="were scored against different images"):
        select_table.read_table(base, trials, {})
    with pytest.raises(UserError, match="has to be kid or fd"):
        select_table.read_table(replace(base, score=replace(base.score, metrics=("pr",))), trials, {})


@pytest.mark.long
def test_a_search_is_killed_and_ends_as_it_would_have(job, tmp_path, signals_kept):
    """Real trainings; on stubs, and killed at other moments, in tests/launch/test_select_search.py."""
    options = ("--search", "tpe", "--trials", "3", "--grid", "penalty.l2=1e-4..1", "--folds", "2")
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"
    ended = run(shardgan("select", job, "run.name=whole", *options), tmp_path)
    assert ended.status == 0 and "minus penalty.l2=0" in ended.output, ended.output
    line = shardgan("select", job, "run.name=broken", *options)
    started = start(line, tmp_path).until(lambda: len(list(broken.glob("trials/*/DONE"))) >= 3)
    os.killpg(started.process.pid, signal.SIGKILL)
    started.process.wait()
    ended = run(line, tmp_path)
    assert ended.status == 0, ended.output
    for file in ("search.json", "best.yaml"):
        contents = [(folder / file).read_text().split("\n", 1)[1] for folder in (whole, broken)]
        assert contents[0].replace("whole", "broken") == contents[1]
    scores = [json.loads((folder / "table.json").read_text())["rows"] for folder in (whole, broken)]
    assert [row["mean"] for row in scores[0]] == [row["mean"] for row in scores[1]]
    assert min(Image.open(whole / "search.png").size) > 300
