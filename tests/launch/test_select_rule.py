"""The rule by which `shardgan select` chooses, and whether all that it says and writes agrees with it."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from selections import finish, selection, table_of

from launch.select import table as select_table
from launch.select import verdict as select_verdict
from launch.select.choice import PAIRED, UNPAIRED, ScoreTable
from pipeline import config
from pipeline.config import UserError
from pipeline.run.page.selection import Selection


def choose(tmp_path, scores: dict[str, list[float | None]], rule: str = PAIRED) -> ScoreTable:
    """λ → a score per fold."""
    folds = max(2, *map(len, scores.values()))
    _, trials = selection(tmp_path, grid=[f"penalty.l2={','.join(scores)}"], folds=folds)
    return table_of(trials, list(scores.values()), rule)


def chosen(found: ScoreTable) -> tuple[str, str]:
    assert found.minimum is not None and found.choice is not None
    return found.minimum.arm.label, found.choice.arm.label


# In pairs

FOOLED = {"0": [4.7, 5.03], "0.01": [4.72, 5.05], "0.1": [4.754, 5.096]}  # folds differ, candidates plainly


def test_what_folds_have_in_common_is_no_error(tmp_path):
    """Every fold says that 0.1 is worse, by ten standard errors of the difference; means alone hide it."""
    assert chosen(choose(tmp_path, FOOLED, UNPAIRED)) == ("0", "0.1")
    assert chosen(choose(tmp_path, FOOLED)) == ("0", "0")


@pytest.mark.parametrize("folds", [3, 5, 10])
@pytest.mark.parametrize("depth", [1, 8, 1000])
def test_a_collapse_in_one_fold_excuses_nothing(tmp_path, folds, depth):
    """It makes the mean difference and the error of that equally large, depth / folds, however deep; and if
    other folds are a hair better, the error is the larger one."""
    best = [1 + 0.01 * fold for fold in range(folds)]
    collapsed = [*(score - 0.005 for score in best[1:]), best[0] + depth]
    collapsed = [collapsed[-1], *collapsed[:-1]]
    found = choose(tmp_path, {"0": best, "0.001": [score + 0.001 for score in best], "0.01": collapsed})
    difference, error = found.rows[2].against(found.rows[0])
    assert difference < error and chosen(found) == ("0", "0")


def test_differences_are_taken_within_folds(tmp_path):
    first, second = choose(tmp_path, {"0": [1.0, 5, 9], "1": [1.1, 5.1, 9.1]}).rows
    assert second.against(first) == (pytest.approx(0.1), pytest.approx(0, abs=1e-9))
    assert first.error > 2


def test_more_seeds_are_not_more_observations(tmp_path):
    """Each seed cuts the data into folds of its own, so no fold of one belongs to a fold of another; and all
    trainings share most of their images."""
    _, trials = selection(tmp_path, folds=3, seeds=2)
    assert [t.fold for t in trials[::2]] == [0, 1, 2, 0, 1, 2]  # of each arm, seed by seed
    scores, gains = np.array([[1.0, 4.0, 7.0], [5.0, 0.0, 1.0]]), np.array([[0.1, 0.4, 0.1], [0.3, 0.3, 0.0]])

    def error(values: np.ndarray) -> float:
        return np.sqrt((values.var(axis=1, ddof=1) / 3).mean())

    for of_second in ([0, 1, 2], [2, 0, 1]):  # whatever its folds are called
        ours, theirs = scores.copy(), scores - gains
        ours[1], theirs[1] = ours[1][of_second], theirs[1][of_second]
        first, second = table_of(trials, [[*ours.ravel()], [*theirs.ravel()]]).rows
        assert first.error == pytest.approx(error(scores))
        assert second.against(first) == (pytest.approx(-0.2), pytest.approx(error(gains)))
    twice, _ = table_of(trials, [[*np.tile(scores[0], 2)], []]).rows
    assert twice.error == pytest.approx(scores[0].std(ddof=1) / 3**0.5)


def test_seeds_that_disagree_are_not_overlooked(tmp_path):
    """All folds of a seed start from the same weights, and may all gain or all lose by them."""
    _, trials = selection(tmp_path, folds=3, seeds=3)
    base, gains = np.arange(9.0).reshape(3, 3) % 3, np.array([[-0.3], [0.1], [0.25]])
    first, second = table_of(trials, [[*base.ravel()], [*(base - gains).ravel()]]).rows
    assert second.against(first) == (pytest.approx(-gains.mean()), pytest.approx(gains.std(ddof=1) / 3**0.5))
    assert first.error == pytest.approx(1 / 3**0.5), "of the folds: the seeds' means are equal"


def test_without_two_folds_of_a_seed_there_is_no_error(tmp_path):
    """Nor is any spoken of: a trial of each failed in every seed."""
    _, trials = selection(tmp_path, folds=2, seeds=2)
    found = table_of(trials, [[1.0, None, 1.1, None], [1.2, None, 1.3, None]])
    assert math.isnan(found.rows[0].error) and chosen(found) == ("0", "0")
    said = " ".join(select_verdict.sentences(found))
    assert "which has the best mean. Compared by 2 trials" in said and "within one standard error" not in said
    assert "With one fold per seed there is no standard error" in said


@pytest.mark.parametrize(
    ("scores", "best", "choice"),
    [
        ({"0": [1.0, 2, 3], "1": [1.3, 1.9, 3.1]}, "0", "1"),  # +0.1 ± 0.115
        ({"0": [1.0, 2, 3], "1": [1.3, 2.0, 3.1]}, "0", "0"),  # +0.133 ± 0.088
        ({"0": [1.0, 2], "1": [0.9, 2.2]}, "0", "1"),  # two trials: +0.05 ± 0.15
        ({"0": [1.0, 2], "1": [1.1, 2.1]}, "0", "0"),  # no error at all
        ({"0": [1.0, 2], "1": [1.0, 2], "0.1": [1.0, 2]}, "1", "1"),  # the same scores
        ({"1": [1.0, 2], "0": [2.0, 1]}, "1", "1"),  # the same means
        ({"0": [2.0, 1], "1": [1.0, 2]}, "1", "1"),
        ({"0": [1.0], "1": [1.001]}, "0", "0"),  # one trial
        ({"0": [1.0], "1": [1.0]}, "1", "1"),
        ({"0": [1.0, 2, 3], "0.1": [3.0, 4, 5], "1": [1.2, 1.9, 3]}, "0", "1"),  # with a worse one between
        ({"0.01": [1.0, 2, 3], "9e-3": [0.9, 2, 3], "0": [5.0, 5, 5]}, "0.009", "0.01"),  # numbers, not text
        ({"10": [1.0, 2.1], "9": [1.1, 2]}, "10", "10"),
        ({"1": [1.0, 2, 3], "0": [1.3, 1.9, 3.1]}, "1", "1"),  # never a smaller one
        ({"0": [-0.02, 0.01, 0.0], "1": [-0.01, 0.01, -0.005]}, "0", "1"),  # KID may be negative
    ],
)
def test_the_largest_penalty_within_one_standard_error_of_the_difference(tmp_path, scores, best, choice):
    assert chosen(choose(tmp_path, scores)) == (best, choice)


@pytest.mark.parametrize(
    ("scores", "best", "choice"),
    [
        # One of which a trial failed has had an easier time of it, perhaps.
        ({"0": [3.0, 3, 3], "0.01": [0.1, 0.1, None]}, "0", "0"),
        # As long as some are to come, only what all have finished counts.
        ({"0": [1.0, 1, 9], "0.01": [2.0, 2]}, "0", "0"),
        ({"0": [1.0, 2, 0], "1": [0.9, 2.2]}, "0", "1"),
        # A trial failed of each: what is left is compared.
        ({"0": [1.0, 2, None], "1": [0.9, 1.9, None]}, "1", "1"),
        ({"0": [None, 2, 3], "1": [9.0, 1, None]}, "1", "1"),
    ],
)
def test_only_trials_that_all_have_are_compared(tmp_path, scores, best, choice):
    assert chosen(choose(tmp_path, scores)) == (best, choice)


def test_without_a_trial_that_all_have_nothing_is_chosen(tmp_path):
    for scores in ({"0": [1.0], "1": []}, {"0": [None, 1.0], "1": [1.0, None]}, {"0": [None], "1": [None]}):
        found = choose(tmp_path, scores)
        assert found.minimum is found.choice is None
        assert select_verdict.sentences(found)[0].startswith("Nothing to choose by yet")


def test_a_score_along_the_way_does_not_stand_for_the_end(tmp_path):
    base, trials = selection(tmp_path)
    finish(trials[0])
    (trials[0].folder / "DONE").write_text("80\n")
    assert select_table.read_table(base, trials, {}).rows[0].failures == {trials[0].name: "it has no score"}
    with pytest.raises(UserError, match="is finished without the score to choose by"):
        select_table.check_scored(base, trials)


# What has an order


@pytest.mark.parametrize(
    ("grid", "choice"),
    [
        (["penalty.l2=0,1"], "1"),
        (["penalty.l1=0,1"], "1"),
        (["penalty.G.l2=0,1"], "1"),
        (["penalty.D.l1=1,0"], "1"),
        (["penalty.r1.gamma=0,1"], "0"),
        (["D.dropout=0,0.3"], "0"),
        (["G.width=8,16"], "8"),
        (["penalty.on=all,weights"], "all"),
    ],
)
@pytest.mark.parametrize("rule", [PAIRED, UNPAIRED])
def test_only_a_larger_weight_penalty_is_preferred(tmp_path, grid, choice, rule):
    """The first listed has the best mean, or for one that is 1,0 the second is within its error."""
    _, trials = selection(tmp_path, grid=grid)
    scores = [[1.0, 2.0], [1.1, 1.95]]
    found = table_of(trials, scores, rule)
    assert found.choice.arm.label == choice
    if found.penalty is None:
        assert "ordered by regularisation" in select_verdict.markdown(found, trials)


def test_of_several_keys_and_of_arms_the_best_mean_is_chosen(tmp_path):
    _, trials = selection(tmp_path, grid=["penalty.G.l2=0,1", "penalty.D.l2=0,1"])
    found = table_of(trials, [[1.0, 2.0], [1.1, 1.95], [1.1, 2.1], [1.1, 1.95]])
    assert found.choice.arm.label == "G 0, D 0"
    said = select_verdict.sentences(found)
    assert said[0].startswith("Chosen: penalty.G.l2=0, penalty.D.l2=0, which has the best mean.")
    assert said[1] == (
        "Within one standard error of it, by the paired rule: penalty.G.l2=0, penalty.D.l2=1, "
        "penalty.G.l2=1, penalty.D.l2=1."
    )


# What is said and written


@pytest.mark.parametrize("rule", [PAIRED, UNPAIRED])
def test_all_that_is_written_agrees(tmp_path, rule):
    base, trials = selection(tmp_path, grid=["penalty.l2=0,0.01,0.1"])
    found = table_of(trials, list(FOOLED.values()), rule)
    name = {PAIRED: "penalty.l2=0", UNPAIRED: "penalty.l2=0.1"}[rule]
    select_table.write(tmp_path, found, base, trials)
    given = [f"run.out={tmp_path}", "run.name=mine"]
    select_verdict.write(tmp_path, found, trials, str(tmp_path / "job.yaml"), given)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["rule"] == rule and table["minimum"] == "penalty.l2=0" and table["compared"] == 2
    assert table["chosen"] == table["one_standard_error"] == name
    assert table["rows"][2]["minus_minimum"] == [pytest.approx(0.06), pytest.approx(0.006)]
    best = config.load(tmp_path / "best.yaml")
    assert f"penalty.l2={best.penalty.D.l2:g}" == f"penalty.l2={best.penalty.G.l2:g}" == name
    report, said = (tmp_path / "report.md").read_text(), "\n".join(select_verdict.sentences(found))
    assert said in report and f"Chosen: {name}, " in said and f"The {rule} rule: " in report
    assert "worse" not in report and "2 trials of each" in said
    (mark,) = [line for line in report.splitlines() if line.endswith("chosen |")]
    assert mark.startswith(f"| {name.partition('=')[2]} |")
    assert ("The paired rule would choose penalty.l2=0." in said) == (rule == UNPAIRED)
    assert ("penalty.l2=0.1 minus penalty.l2=0, in pairs: +0.060 ± 0.006." in said) == (rule == UNPAIRED)


def test_what_is_shown_of_a_candidate_is_what_is_compared(tmp_path):
    """The third trial of 0 makes it look better than 1, which has none yet."""
    found = choose(tmp_path, {"0": [1.0, 2, 0], "1": [0.9, 1.9]})
    cells = [select_verdict._cells(found, row, []) for row in found.rows]
    assert [row[2] for row in cells] == ["1.500 ± 0.500", "1.400 ± 0.500"]
    assert [row[1] for row in cells] == ["3", "2 (1 not done)"] and cells[1][-1] == "best, chosen"


def test_what_is_written_of_a_candidate_is_what_is_compared(tmp_path):
    """As on the terminal; the page draws what is written."""
    found = choose(tmp_path, {"0": [1.0, 2, 0], "1": [0.9, 1.9]})
    base, trials = selection(tmp_path, folds=3)
    for outcome in (o for row in found.rows for o in row.outcomes):
        finish(outcome.trial, outcome.score)
    found = select_table.read_table(base, trials, {})
    select_table.write(tmp_path / "mine", found, base, trials)
    written = json.loads((tmp_path / "mine" / "table.json").read_text())["rows"]
    assert [row["mean"] for row in written] == pytest.approx([1.5, 1.4])
    assert [row["charts"]["Metrics/kid_efflite0"] for row in written] == pytest.approx([1.5, 1.4])
    assert [row["finished"] for row in written] == [3, 2] and len(written[0]["by_trial"]) == 3
    rows = [*csv.DictReader((tmp_path / "mine" / "table.csv").open())]
    assert [row["trials"] for row in rows] == ["3", "2"] and [row["mean over"] for row in rows] == ["2", "2"]
    assert [row["kid_efflite0"] for row in rows] == [str(row["mean"]) for row in written]
    said = " ".join(select_verdict.conclusion(found))
    assert Selection(tmp_path / "mine").conclusion == said and "The paired rule: " in said
    assert "Not done: 1 trial, which may change the choice." in said
    given = [f"run.out={tmp_path}", "run.name=mine"]
    select_verdict.write(tmp_path / "mine", found, trials, str(tmp_path / "job.yaml"), given)
    now = replace(found, rows=[*found.rows[:1], replace(found.rows[1], pending=["a", "b"])])
    select_table.write(tmp_path / "mine", now, base, trials)
    assert "Not done: 2 trials" in Selection(tmp_path / "mine").conclusion, "not what report.md still says"


def test_small_differences_are_not_shown_as_none():
    assert select_verdict.with_error(0.0002, 0.00005, signed=True) == "+0.000200 ± 0.000050"
    assert select_verdict.with_error(2.0, 0.0) == "2.000 ± 0.000"
    assert select_verdict.with_error(-0.5, 0.058) == "-0.500 ± 0.058"


def test_one_of_a_thing_is_said_so(tmp_path):
    said = select_verdict.sentences(choose(tmp_path, {"0": [1.0], "1": [2.0]}))
    assert "Compared by 1 trial of each candidate." in said[0] and "With one fold" in said[1]
    assert said[-1] == "Not done: 2 trials, which may change the choice."


# On a terminal

MANY_FAILED = ["penalty.l2=0.000123456,0.0234567", "optim.G.lr=0.000123456", "penalty.r1.gamma=0.1234"]
NAMES = {
    "short": ["penalty.l2=0,1e-3,0.01"],
    "two keys": ["penalty.G.l2=0,0.001,0.01", "penalty.D.l2=0,0.001,0.01,0.1"],
    "many failed": MANY_FAILED,
    "long": ["D.norm=none,batch,group", "G.options={a: 123456789},{a: 123456780, bcdefghijklmnopqrstuvw: 2}"],
}


@pytest.mark.parametrize("grid", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_table_fits_the_terminal(tmp_path, monkeypatch, grid, columns):
    _, trials = selection(tmp_path, grid=grid)
    arms = {trial.arm: None for trial in trials}
    found = table_of(trials, [[4.8 + 0.1 * i, 5.0] for i in range(len(arms))])
    if grid is MANY_FAILED:
        (*others, last) = found.rows
        found = replace(found, rows=[*others, replace(last, failures=dict.fromkeys("abcdefghijk", "ended"))])
    monkeypatch.setenv("COLUMNS", str(columns))
    text = select_verdict.terminal(found)
    table, _, _ = text.partition("\nChosen: ")
    assert max(map(len, table.splitlines())) <= columns and "…" not in table
    for row in found.rows:
        assert f"{row.mean:.3f} ± {row.error:.3f}" in table
    if columns == 200:
        assert all(row.arm.label in table for row in found.rows) and "0.0 min" in table
    words = "".join(word for arm in arms for word in arm.label.split())
    assert set(words) <= set(table)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ({"0": [1.0, 1.1], "0.1": [2.0, 2.1]}, "the best mean; no larger penalty.l2 is within one"),
        (
            {"0": [2.0, 2.1], "0.1": [1.0, 1.1]},
            "best mean; it is the largest penalty.l2 tried, so try larger",
        ),
        (
            {"0": [1.0, 2.0], "0.1": [1.1, 1.95]},
            "rule; it is the largest penalty.l2 tried, so try larger ones",
        ),
        ({"0": [1.0, 1.1], "0.1": [None, None]}, "best mean; no larger penalty.l2 could be compared."),
    ],
)
def test_nothing_is_said_of_larger_values_that_were_not_tried(tmp_path, scores, reason):
    said = select_verdict.sentences(choose(tmp_path, scores))[0]
    assert reason in said and ("no larger" in said) != ("try larger" in said)
