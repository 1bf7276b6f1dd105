"""The table of a selection: what is done, failed, or more regularised than the rest, and what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from launching import run, shardgan
from selections import CONFIG, finish, selection

from launch.select import candidates as select_candidates
from launch.select import weights as select_weights
from launch.select import report as select_report
from launch.select import table as select_table
from launch.select.candidates import Arm
from launch.select.choice import Outcome, Row, Table
from pipeline.config import UserError


def table_of(trials, scores: list[list[float]]) -> Table:
    """One list of scores per arm."""
    rows = []
    for arm, values in zip(dict.fromkeys(t.arm for t in trials), scores, strict=True):
        mine = [t for t in trials if t.arm == arm]
        rows.append(Row(arm, [Outcome(t, v, {}, 1.0) for t, v in zip(mine, values, strict=True)], {}))
    return Table("kid_efflite0", rows)


# What is not there


def test_what_is_not_done_speaks_against_nobody(tmp_path):
    """Of the better candidate one trial is to come: it must not be out of the question for that."""
    base, trials = selection(tmp_path)
    for trial, score in zip(trials, [2.0, 1.0, 2.1], strict=False):
        finish(trial, score)
    found = select_table.table(base, trials, {})
    assert found.minimum.arm.values == found.choice.arm.values == {"penalty.l2": "1"}
    assert [list(row.pending) for row in found.rows] == [[], [trials[3].name]]
    assert select_report._cells(found, found.rows[1], [])[1] == "1 (1 not done)"
    assert any("1 trials are not done" in line for line in select_report._verdict(found))
    assert select_table.as_json(found, base, trials)["rows"][1]["not_done"] == [trials[3].name]


def test_collect_before_all_is_done_chooses_by_what_all_have(tmp_path):
    """The pictures cannot be drawn here, as there are no weights: they come after the table."""
    _, trials = selection(tmp_path)
    for trial, score in zip(trials, [2.0, 1.0, 2.1], strict=False):
        finish(trial, score)
    ended = run(
        shardgan(
            "select", "job.yaml", f"run.out={tmp_path}", "run.name=mine", "--grid", "penalty.l2=0,1",
            "--folds", "2", "--collect",
        ),
        tmp_path,
    )  # fmt: skip
    table = json.loads((tmp_path / "mine" / "table.json").read_text())
    assert table["minimum"] == "penalty.l2=1" and table["rows"][1]["failed"] == {}, ended.output
    assert "1 (1 not done)" in ended.output


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_a_number_is_a_failure(tmp_path, score):
    base, trials = selection(tmp_path)
    for trial, value in zip(trials, [score, 2.0, 1.0, 2.1], strict=True):
        finish(trial, value)
    found = select_table.table(base, trials, {})
    assert found.rows[0].failures == {trials[0].name: "its score is not a number"}
    assert found.minimum.arm.values == {"penalty.l2": "1"}
    select_table.write(tmp_path, found, base, trials)


def test_what_is_chosen_by_is_the_score_on_held_out_images(tmp_path):
    base, trials = selection(tmp_path, "score.metrics=[fd]")
    for trial in trials:
        finish(trial, 2.0, name="fid")
        file = trial.folder / "metrics.jsonl"
        row = json.loads(file.read_text()) | {"Metrics/fid_train": 1.0, "Metrics/fid50k_full": 1.0}
        file.write_text(json.dumps(row) + "\n")
    found = select_table.table(base, trials, {})
    assert found.score == "fid" and found.minimum.mean == 2.0


# The rule


def test_what_the_rule_gives_away_is_said(tmp_path):
    """Folds differ by far more than candidates do, and the rule takes one that is worse in each."""
    _, trials = selection(tmp_path, folds=3)
    worse = table_of(trials, [[1.0, 5, 9], [1.5, 5.6, 9.4]])
    said = "\n".join(select_report._verdict(worse))
    assert "penalty.l2=1 minus penalty.l2=0, fold by fold: +0.500 ± 0.058." in said
    assert "In these folds penalty.l2=1 is worse than penalty.l2=0" in said
    unclear = table_of(trials, [[1.0, 5, 9], [1.5, 4.9, 9.1]])
    said = "\n".join(select_report._verdict(unclear))
    assert "fold by fold: +0.167 ± 0.176." in said and "is worse" not in said
    best = table_of(trials, [[2.0, 6, 10], [1.5, 4.9, 9.1]])
    assert "fold by fold" not in "\n".join(select_report._verdict(best))


@pytest.mark.parametrize(
    ("grid", "chosen", "order"),
    [
        (["penalty.l2=0,1"], "1", "the larger penalty.l2"),
        (["penalty.r1.gamma=0,1"], "1", "the larger penalty.r1.gamma"),
        (["penalty.r1.interval=4,16"], "4", "the first listed"),
        (["D.dropout=0,0.3"], "0.3", "the larger D.dropout"),
        (["optim.D.decoupled_decay=0,0.1"], "0.1", "the larger optim.D.decoupled_decay"),
        (["G.width=8,16"], "8", "the first listed"),
        (["penalty.on=all,weights"], "all", "the first listed"),
    ],
)
def test_what_counts_as_more_regularised(tmp_path, grid, chosen, order):
    settings = ["optim.D.kind=adamw"] if "decay" in grid[0] else []
    _, trials = selection(tmp_path, *settings, grid=grid)
    found = table_of(trials, [[1.0, 2.0], [1.1, 1.9]])
    assert (found.choice.label, found.order) == (chosen, order)
    assert f"the rule takes {order}." in select_report._report(found, trials)


def test_of_several_keys_ranks_are_summed(tmp_path):
    _, trials = selection(tmp_path, grid=["penalty.l2=0,1", "G.width=8,16"])
    found = table_of(trials, [[1.0, 2.0]] * 4)
    assert found.choice.arm.name == "penalty.l2=1, G.width=8"
    assert found.order == "the larger penalty.l2 and the G.width listed first, by the sum of their ranks"


# Names and values


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("1234567", ["1234567"]),
        ("0.1234567", ["0.1234567"]),
        ("1e-3,0.001,1.50", ["0.001", "1.5"]),
        ("1e-6:1e-4:3", ["1e-06", "1e-05", "0.0001"]),
        ("batch,none", ["batch", "none"]),
    ],
)
def test_values_are_what_was_written(written, values):
    assert [arm.values["a.b"] for arm in select_candidates.grid([f"a.b={written}"])] == values


@pytest.mark.parametrize("count", ["0", "1", "-1"])
def test_a_range_has_two_ends(count):
    with pytest.raises(UserError, match="2 ≤ COUNT"):
        select_candidates.grid([f"penalty.l2=1e-3:1:{count}"])


def test_the_window_of_shuffling_decides_what_is_held_out(tmp_path):
    with pytest.raises(UserError, match=r"data.window cannot differ"):
        selection(tmp_path, grid=["data.window=1,2"])


def test_names_are_shown_as_they_are(tmp_path, capsys):
    _, trials = selection(tmp_path)
    arm = Arm("[bold] L2|L1 [/x]", (), {})
    named = [replace(trial, arm=arm) for trial in trials[:2]]
    found = table_of(named, [[1.0, 2.0]])
    select_report.show(found)
    assert "[bold] L2|L1 [/x]" in capsys.readouterr().out
    assert "| [bold] L2\\|L1 [/x] | 2 |" in select_report._report(found, trials)


def test_named_candidates_are_told_apart_by_colour(tmp_path):
    rows = [Row(Arm(f"{n}", (), {}), [], {}) for n in range(25)]
    styles = {str(style) for style in select_weights._styles(rows)}
    assert len(styles) == 25


def test_no_candidate_is_an_arm(tmp_path):
    (tmp_path / "job.yaml").write_text(CONFIG)
    (tmp_path / "arms.yaml").write_text("{}\n")
    with pytest.raises(UserError, match="not a list of arms"):
        select_candidates.arms(tmp_path / "arms.yaml")
