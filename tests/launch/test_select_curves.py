"""Scores along the way of trials: what would be chosen at each budget, in words, tables and pictures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from selections import finish, score_along, selection
from test_select_choice import assert_apart

from launch.select import table as select_table
from launch.select import verdict as select_verdict
from launch.select.choice import PAIRED
from launch.select.curve import _label
from launch.select.heat import heat
from launch.select.learning import learning

RHYTHM = "run.eval_kimg=0.032"


def read(base, trials, failures=None):
    return select_table.read_table(base, trials, failures or {}, PAIRED)


def test_the_choice_changes_with_the_budget(tmp_path):
    """λ = 1 is better half-way, 0 at the end, which decides. The untrained networks' score is no budget."""
    base, trials = selection(tmp_path, RHYTHM)
    for trial in trials:
        half, end = (5.0, 1.0) if trial.arm.label == "0" else (2.0, 3.0)
        score_along(trial, {0: 9.0, 32: half + trial.fold, 64: end + trial.fold})
    found = read(base, trials)
    assert found.budgets == [0.032, 0.064] and found.choice.arm.label == "0"
    assert [(kimg, row.arm.label) for kimg, row in found.by_budget] == [(0.032, "1"), (0.064, "0")]
    assert found.at(0.032).minimum.mean == 2.5 and found.minimum.mean == 1.5
    said = "The choice by budget: penalty.l2=1 at 0.032 kimg, then penalty.l2=0 at 0.064 kimg."
    assert said in select_verdict.sentences(found)
    report = select_verdict.markdown(found, trials)
    assert "learning.png" in report and "| 0.032 | penalty.l2=1 | 2.500 ± 0.500 | 2 |" in report
    table = select_table.as_json(found, base, trials)
    assert [entry["chosen"] for entry in table["by_budget"]] == ["penalty.l2=1", "penalty.l2=0"]
    assert table["rows"][0]["by_kimg"][0] == {
        "kimg": 0.032, "trials": 2, "mean": 5.5, "standard_error": pytest.approx(0.5),
    }  # fmt: skip


def test_a_point_of_a_learning_curve_is_of_the_trials_that_all_have(tmp_path):
    base, trials = selection(tmp_path, RHYTHM)
    for trial in trials:
        lacks = trial is trials[-1]  # fold 1 of the last candidate has no score at half the budget
        score_along(trial, {64: 1.0} if lacks else {32: 2.0 + trial.fold, 64: 1.0})
    rows = select_table.as_json(read(base, trials), base, trials)["rows"]
    points = [[(at["kimg"], at["trials"], at["mean"]) for at in row["by_kimg"]] for row in rows]
    assert points == [[(0.032, 1, 2.0), (0.064, 2, 1.0)]] * len(rows)


def test_trials_of_before_have_one_score_and_are_compared_by_it(tmp_path):
    base, trials = selection(tmp_path, RHYTHM)
    for trial in trials[::2]:
        finish(trial, 1.0 + trial.fold)
    for trial in trials[1::2]:
        score_along(trial, {32: 4.0, 64: 2.0})
    found = read(base, trials)
    assert [kimg for kimg, _ in found.by_budget] == [0.064] and len(found.minimum.outcomes) == 2
    assert "learning.png" not in select_verdict.markdown(found, trials)


def test_a_budget_is_the_same_whatever_the_batch(tmp_path):
    """The update that passes 32 images ends at 45 in batches of 15. Scores at other times are left out."""
    base, trials = selection(tmp_path, RHYTHM, grid=["data.batch_size=16,15"])
    score_along(trials[0], {16: 8.0, 32: 3.0, 64: 2.0})
    score_along(trials[1], {45: 3.5, 60: 8.0, 75: 2.5})
    found = read(base, trials[:2])
    assert [o.by_kimg for row in found.rows for o in row.outcomes] == [
        {0.032: 3.0, 0.064: 2.0}, {0.032: 3.5, 0.064: 2.5},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "eval_kimg"),
    [
        (("run.total_kimg=1.6",), 0.32),
        (("run.total_kimg=1.6", "run.tick_kimg=0.1"), 0.4),  # at ticks
        (("run.total_kimg=1.6", "score.images=40"), 0.8),  # 20 images of training for each of a score
        (("run.total_kimg=1.6", "run.eval_kimg=0.2"), 0.2),
        ((), 1e9),  # at the end alone
    ],
)
def test_trials_are_scored_five_times_or_as_often_as_is_cheap(tmp_path, settings, eval_kimg):
    _, (trial, *_) = selection(tmp_path, *settings)
    assert trial.config.run.eval_kimg == pytest.approx(eval_kimg)


LONG = [
    "optim.G.betas=[0.123456789,0.9],[0.123456789,0.99],[0,0.9]",
    "G.options={a: 123456789},{a: 123456780, bcdefghijklmnopqrstuvw: 2},{},{a: 1, another_option: 12345}",
]


def test_nothing_of_long_names_is_clipped_or_printed_over(tmp_path):
    base, trials = selection(tmp_path, RHYTHM, grid=LONG)
    for number, trial in enumerate(trials):
        score_along(trial, {32: 9.0 - number % 7, 64: 1.0 + 0.1 * (number % 12)})
    failed = trials[-1]
    (failed.folder / "DONE").unlink()
    found = read(base, trials, {failed.name: "exit status 1"})
    picture = learning(found)
    picture.draw_without_rendering()
    (legend,) = picture.legends
    assert len(legend.get_texts()) == 12
    assert_apart([text.get_window_extent() for text in legend.get_texts()], picture.bbox)
    assert_apart([legend.get_window_extent(), picture.axes[0].bbox], picture.bbox)
    picture = heat(found)
    picture.draw_without_rendering()
    cells, bar = picture.axes
    said = [text.get_text() for text in cells.texts]
    assert said[-1] == "failed" and said[0] == "1.000\n± 0.000" and len(said) == 12
    labels = [*cells.get_xticklabels(), *cells.get_yticklabels(), cells.xaxis.label, cells.yaxis.label]
    assert_apart([text.get_window_extent() for text in (*labels, *cells.texts)], picture.bbox)
    assert_apart([bar.bbox, cells.bbox, *(one.get_window_extent() for one in picture.legends)], picture.bbox)


def test_values_of_a_map_are_in_order(tmp_path):
    _, trials = selection(tmp_path, grid=["penalty.G.l2=1,0,0.1", "D.norm=none,group"])
    found = read(trials[0].config, trials)
    assert found.plane == (["0", "0.1", "1"], ["none", "group"])
    assert replace(found, rows=found.rows[:2]).plane is None  # one value of the first key


def test_pages_have_a_band_for_each_candidate(tmp_path):
    """Here without the page's text: what its script draws."""
    from pipeline.run.page.selection import Selection

    base, trials = selection(tmp_path, RHYTHM)
    for trial in trials:
        score_along(trial, {32: 4.0 + trial.fold, 64: 1.0 + trial.fold})
    select_table.write(tmp_path / "mine", read(base, trials), base, trials)
    page = Selection(tmp_path / "mine")
    (chart,) = page.budgets
    assert [trace["name"] for trace in chart["traces"]] == ["0", "1"] and chart["log"]
    first = {key: chart["traces"][0][key] for key in ("x", "y", "low", "high")}
    assert first == {"x": [0.032, 0.064], "y": [4.5, 1.5], "low": [4.0, 1.0], "high": [5.0, 2.0]}
    assert page.by_budget[0][:3] == (0.032, "1", 4.5)
    file = tmp_path / "mine" / "table.json"
    older = json.loads(file.read_text())
    del older["by_budget"]
    file.write_text(json.dumps(older))
    assert Selection(tmp_path / "mine").budgets == []


def test_a_wide_band_leaves_room_for_the_rest(tmp_path):
    """A mean of 4.5 ± 4.4 in log, by the page's script and in the picture."""
    from pipeline.run.page.selection import Selection

    base, trials = selection(tmp_path, RHYTHM)
    for trial in trials:
        score_along(trial, {32: 0.1 + 8.8 * trial.fold, 64: 1.0 + trial.fold})
    found = read(base, trials)
    select_table.write(tmp_path / "mine", found, base, trials)
    (chart,) = Selection(tmp_path / "mine").budgets
    assert chart["log"] and chart["traces"][0]["low"] == pytest.approx([0.75, 1.0])
    axes = learning(found).axes[0]
    assert axes.get_yscale() == "log" and 0.5 < axes.get_ylim()[0] < 0.75


def test_a_band_around_what_is_below_0_has_two_sides(tmp_path):
    """As KID may be."""
    from pipeline.run.page.selection import Selection

    base, trials = selection(tmp_path, RHYTHM)
    for trial in trials:
        score_along(trial, {32: 1.0 + trial.fold, 64: -1.0 - trial.fold})
    select_table.write(tmp_path / "mine", read(base, trials), base, trials)
    (chart,) = Selection(tmp_path / "mine").budgets
    assert not chart["log"] and chart["traces"][0]["low"] == [1.0, -2.0]


def test_pictures_and_pages_are_in_log_for_the_same_scores(tmp_path):
    """A trial below 0 has no logarithm, and must not vanish."""
    from pipeline.run.page.selection import Selection

    for name, lowest, log in (("a", 0.1, True), ("b", -0.1, False)):
        (tmp_path / name).mkdir()
        base, trials = selection(tmp_path / name)
        for trial, score in zip(trials, (2.0, 1.0, 2.2, lowest), strict=True):
            finish(trial, score)
        found = read(base, trials)
        select_table.write(tmp_path / name / "mine", found, base, trials)
        axes = Figure().subplots()
        _label(axes, found, list(found.rows), ["0", "1"], upright=True)
        assert (axes.get_yscale() == "log") == Selection(tmp_path / name / "mine").curve["log"] == log


def test_a_page_shows_numbers_in_order_however_they_were_proposed(tmp_path):
    from pipeline.run.page.selection import Selection

    base, trials = selection(tmp_path, grid=["penalty.l2=0,1,0.1"])
    for trial in trials:
        finish(trial)
    select_table.write(tmp_path / "mine", read(base, trials), base, trials)
    assert [point["label"] for point in Selection(tmp_path / "mine").curve["candidates"]] == ["0", "0.1", "1"]
