"""The table of a selection: what is done, failed, or more regularised than the rest, and what it says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from launching import run, shardgan
from PIL import Image
from selections import finish, selection, table_of

from launch.select import candidates as select_candidates
from launch.select import curve as select_curve
from launch.select import files, legend
from launch.select import plots as select_plots
from launch.select import table as select_table
from launch.select import verdict as select_verdict
from launch.select.candidates import Arm
from launch.select.choice import PAIRED, Row
from launch.select.selection import Selection
from launch.select.trials import LaunchOptions
from pipeline import config
from pipeline.config import UserError

# What is not there


def test_what_is_not_done_speaks_against_nobody(tmp_path):
    """Of the better candidate one trial is to come: it must not be out of the question for that."""
    base, trials = selection(tmp_path)
    for trial, score in zip(trials, [2.0, 1.0, 2.1], strict=False):
        finish(trial, score)
    found = select_table.read_table(base, trials, {})
    assert found.minimum.arm.values == found.choice.arm.values == {"penalty.l2": "1"}
    assert [list(row.pending) for row in found.rows] == [[], [trials[3].name]]
    assert select_verdict._cells(found, found.rows[1], [])[1] == "1 (1 not done)"
    assert "Not done: 1 trial, which may change the choice." in select_verdict.sentences(found)
    assert select_table.as_json(found, base, trials)["rows"][1]["not_done"] == [trials[3].name]


def test_collect_before_all_is_done_chooses_by_what_all_have(tmp_path):
    """The pictures do without images of G, as there are no checkpoints."""
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
    assert ended.status == 0, ended.output
    table = json.loads((tmp_path / "mine" / "table.json").read_text())
    assert table["minimum"] == "penalty.l2=1" and table["rows"][1]["failed"] == {}, ended.output
    assert "1 (1 not done)" in ended.output
    for picture in ("curve.png", "weights.png"):
        assert min(Image.open(tmp_path / "mine" / picture).size) > 300


def test_an_outdated_choice_is_withdrawn(tmp_path):
    """Run folders of trials were removed: they are to come again, and nothing says what was chosen."""
    base, trials = selection(tmp_path)
    for trial, score in zip(trials, [2.0, 1.0, 2.1, 1.1], strict=True):
        finish(trial, score)
    said = []
    given = (str(tmp_path / "job.yaml"), (f"run.out={tmp_path}", "run.name=mine"))
    mine = Selection(base, trials, LaunchOptions(), given, said.append, PAIRED)
    mine.collect()
    best = tmp_path / "mine" / "best.yaml"
    assert config.load(best).penalty.D.l2 == 1
    of_the_choice = {"report.md", "report.html", "curve.png", "weights.png"}
    assert of_the_choice <= {path.name for path in (tmp_path / "mine").iterdir()}
    for trial in trials[1::2]:
        shutil.rmtree(trial.folder)
    mine.collect()
    assert json.loads((tmp_path / "mine" / "table.json").read_text())["chosen"] is None
    assert not best.exists() and "Not done: 2 trials, which may change the choice." in said[-1]
    assert not of_the_choice & {path.name for path in (tmp_path / "mine").iterdir()}
    assert any("is withdrawn. Removed: best.yaml, report.md, " in line for line in said)


def test_a_mistyped_candidate_withdraws_nothing(tmp_path):
    given = (str(tmp_path / "job.yaml"), (f"run.out={tmp_path}", "run.name=mine"))
    for grid in ("penalty.l2=0,1", "penalty.l2=0,2"):
        base, trials = selection(tmp_path, grid=[grid])
        mine = Selection(base, trials, LaunchOptions(), given, lambda _: None, PAIRED)
        if grid.endswith("1"):
            for trial in trials:
                finish(trial)
            mine.collect()
    with pytest.raises(UserError, match=r"has no penalty\.l2=2,seed=0,fold=0\. Give the candidates"):
        mine.collect()
    assert {"best.yaml", "report.md"} <= {path.name for path in (tmp_path / "mine").iterdir()}


def test_a_picture_of_what_is_no_longer_there_is_removed(tmp_path):
    """A page would show it."""
    for grid, pictures in ((("G.z_dim=16,32", "penalty.l2=0,1"), 3), (("G.z_dim=16", "penalty.l2=0,1"), 2)):
        base, trials = selection(tmp_path, grid=grid)
        for trial in trials:
            finish(trial)
        given = (str(tmp_path / "job.yaml"), (f"run.out={tmp_path}", "run.name=mine"))
        Selection(base, trials, LaunchOptions(), given, lambda _: None, PAIRED).collect()
        assert len([*(tmp_path / "mine").glob("*.png")]) == pictures


@pytest.fixture
def full(monkeypatch) -> Callable[[Path], None]:
    """Makes the disk full for the next file of a path."""
    monkeypatch.setattr("secrets.token_hex", lambda _: "0")
    return lambda path: path.with_name(f".{path.name}.0").symlink_to("/dev/full")


def test_a_file_is_whole_or_as_it_was(tmp_path, full):
    files.write(tmp_path / "table.json", "as it was")
    full(tmp_path / "table.json")
    with pytest.raises(UserError, match=r"table.json cannot be written: No space left"):
        files.write(tmp_path / "table.json", "new" * 10_000)
    assert (tmp_path / "table.json").read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_full_disk_does_not_stop_the_trials(tmp_path, full):
    base, trials = selection(tmp_path)
    finish(trials[0])
    said = []
    mine = Selection(base, trials, LaunchOptions(), ("", ()), said.append, PAIRED)
    mine.folder.mkdir(exist_ok=True)
    full(mine.folder / "table.json")
    mine._ended(trials[0], "")
    assert said[0].startswith("warning: ") and "No space left" in said[0] and "[1/4]" in said[1]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_a_number_is_a_failure(tmp_path, score):
    base, trials = selection(tmp_path)
    for trial, value in zip(trials, [score, 2.0, 1.0, 2.1], strict=True):
        finish(trial, value)
    found = select_table.read_table(base, trials, {})
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
    found = select_table.read_table(base, trials, {})
    assert found.score == "fid" and found.minimum.mean == 2.0


# Names and values


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("1234567", ["1234567"]),
        ("0.1234567", ["0.1234567"]),
        ("1e-3,0.001,1.50", ["0.001", "1.5"]),
        ("1e-6:1e-4:3", ["1e-06", "1e-05", "0.0001"]),
        ("batch,none", ["batch", "none"]),
        ("[0.5,0.9],[0, 0.99]", ["[0.5,0.9]", "[0, 0.99]"]),
        ("{x: 1,y: [2,3]}, {x: 2}", ["{x: 1,y: [2,3]}", "{x: 2}"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("don't,won't", ["don't", "won't"]),
        ("my.nets:D", ["my.nets:D"]),
    ],
)
def test_values_are_what_was_written(written, values):
    assert [arm.values["a.b"] for arm in select_candidates.grid([f"a.b={written}"])] == values


@pytest.mark.parametrize("count", ["0", "1", "-1", "2.5", "many", "1000000000", ""])
def test_a_range_has_two_ends_and_not_too_many_values(count):
    with pytest.raises(UserError, match="2 ≤ COUNT"):
        select_candidates.grid([f"penalty.l2=1e-3:1:{count}"])


@pytest.mark.parametrize("values", ["", " ", ",", "1,,2", "1,", ",1", "[0.5,0.9", "0.5]", "'a,b", "1:2"])
def test_unclear_values_are_refused(values):
    with pytest.raises(UserError, match=r"--grid a\.b="):
        select_candidates.grid([f"a.b={values}"])


def test_a_setting_that_the_grid_replaces_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"penalty.D.l2 .* no effect, .*: --grid penalty.G.l2="):
        selection(tmp_path, "penalty.D.l2=0.1")
    with pytest.raises(UserError, match=r"penalty.l2 on the command line has no effect"):
        selection(tmp_path, "penalty.l2=0.1", grid=["penalty.G.l2=0,1", "penalty.D.l2=0,1"])
    with pytest.raises(UserError, match=r"G.width on the command line has no effect"):
        selection(tmp_path, "G.width=8", grid=["G.width=8,16"])
    _, trials = selection(tmp_path, "penalty.l2=0.1", grid=["penalty.G.l2=0,1"])
    assert [(t.config.penalty.G.l2, t.config.penalty.D.l2) for t in trials[:2]] == [(0, 0.1), (1, 0.1)]


@pytest.mark.parametrize(
    "grid", ["penalty.l2=0.1,'0.1'", "D.norm=none,'none'", "optim.G.betas=[0,0.9],[0, 0.9]"]
)
def test_one_candidate_written_twice_is_refused(tmp_path, grid):
    with pytest.raises(UserError, match="the same settings"):
        selection(tmp_path, grid=[grid])


@pytest.mark.parametrize(
    ("axes", "title", "label"),
    [
        (["penalty.G.l2=0.01", "penalty.D.l2=0"], "penalty.{G,D}.l2", "G 0.01, D 0"),
        (["penalty.l2=1", "penalty.D.l2=0"], "penalty.{l2,D.l2}", "l2 1, D.l2 0"),
        (["optim.G.lr=1", "optim.G.eps=2"], "optim.G.{lr,eps}", "lr 1, eps 2"),
        (["G.width=8", "D.norm=none"], "candidate", "G.width 8, D.norm none"),
        (["penalty.l2=1"], "penalty.l2", "1"),
        (["penalty.r1.gamma=[1, 0.1]"], "penalty.r1.gamma", "1 → 0.1"),
        (["optim.G.betas=[0,[0.9,0.99]]"], "optim.G.betas", "[0,0.9 → 0.99]"),
        (["optim.G.betas=[0,0.9]"], "optim.G.betas", "[0,0.9]"),
        (["G.options.widths=[8,16]"], "G.options.widths", "[8,16]"),
    ],
)
def test_labels_are_short(axes, title, label):
    (arm,) = select_candidates.grid(axes)
    assert (arm.title, arm.label) == (title, label)


def test_schedules_are_values_of_a_grid(tmp_path):
    _, trials = selection(
        tmp_path, "run.burn_in_kimg=1", grid=["penalty.r1.gamma=[1,0.1],[10,1],0.5"], folds=2
    )
    assert [t.config.penalty.r1.gamma for t in trials[:3]] == [(1.0, 0.1), (10.0, 1.0), 0.5]
    assert [t.folder.name for t in trials[:3]] == [
        f"penalty.r1.gamma={value},seed=0,fold=0" for value in ("1to0.1", "10to1", "0.5")
    ]
    table = table_of(trials, [[2.0, 2.0], [1.0, 1.0], [3.0, 3.0]])
    assert table.choice is not None and table.choice.arm.label == "10 → 1"
    base = select_candidates.grid(["optim.G.betas=[0,[0.9,0.99]],[0,0.9]"])
    assert [arm.slug for arm in base] == ["optim.G.betas=_0,0.9to0.99_", "optim.G.betas=_0,0.9_"]


def test_a_long_name_still_makes_a_folder():
    names = [Arm(f"{'λ' * 200} {n}", (), {}).slug for n in range(2)]
    assert names[0] != names[1] and max(len(name.encode()) for name in names) <= 200
    assert Arm("λ = 1", (), {}).slug == "λ_=_1"
    assert Arm(".x/y", (), {}).slug == "x_y"


def test_a_value_that_refers_to_another_setting_stands_in_quotes(tmp_path):
    with pytest.raises(UserError, match=r"must be in quotes, as in \"KEY='\$\{section.key\}',0\""):
        select_candidates.grid(["penalty.r2.gamma=${penalty.r1.gamma},0"])
    _, trials = selection(tmp_path, "penalty.r1.gamma=2", grid=["penalty.r2.gamma='${penalty.r1.gamma}',0"])
    assert [trial.config.penalty.r2.gamma for trial in trials[:2]] == [2, 0]


def test_the_window_of_shuffling_decides_what_is_held_out(tmp_path):
    with pytest.raises(UserError, match=r"data.window cannot differ"):
        selection(tmp_path, grid=["data.window=1,2"])


def test_names_are_shown_as_they_are(tmp_path):
    _, trials = selection(tmp_path)
    arm = Arm("[bold] L2|L1 [/x]", (), {})
    named = [replace(trial, arm=arm) for trial in trials[:2]]
    found = table_of(named, [[1.0, 2.0]])
    assert "[bold] L2|L1 [/x]" in select_verdict.terminal(found)
    assert "| [bold] L2\\|L1 [/x] | 2 |" in select_verdict.markdown(found, trials)


def test_named_candidates_differ_in_colour(tmp_path):
    rows = [Row(Arm(f"{n}", (), {}), [], {}) for n in range(25)]
    styles = {str(style) for style in legend.styles(rows)}
    assert len(styles) == 25


@pytest.mark.parametrize(
    "grid",
    [
        ["penalty.l2=0,1e-3,1e-2"],
        ["penalty.l2=0,1e-7:1e2:11"],
        ["penalty.G.l2=0,0.01", "penalty.D.l2=0,0.001,0.01"],
        [
            "G.norm=none,batch,group",
            "D.norm=none,batch",
            "optim.G.betas=[0.123456789,0.9],[0.123456789,0.99]",
        ],
    ],
    ids=["3", "12", "two keys", "12 long"],
)
def test_nothing_in_the_pictures_is_clipped_or_printed_over(tmp_path, grid):
    _, trials = selection(tmp_path, grid=grid)
    for trial in trials:
        finish(trial)
    arms = len({trial.arm for trial in trials})
    found = table_of(trials, [[2.0 + 0.1 * i, 2.2] for i in range(arms)])
    picture = select_curve.curve(found)
    picture.draw_without_rendering()
    scores, *panels = picture.axes
    on_axis = [*scores.get_xticklabels(), *scores.get_yticklabels()]
    titles = [panel.title for panel in panels if panel.get_title()]
    assert_apart([text.get_window_extent() for text in (*on_axis, *titles)], picture.bbox)
    assert_apart([legend.get_window_extent() for legend in picture.legends] + [scores.bbox], picture.bbox)
    picture = select_plots.weights(found)
    picture.draw_without_rendering()
    (legend,) = picture.legends
    assert len(legend.get_texts()) == arms
    assert_apart([text.get_window_extent() for text in legend.get_texts()], picture.bbox)
    assert_apart([legend.get_window_extent(), *(axes.bbox for axes in picture.axes)], picture.bbox)


def assert_apart(boxes, within):
    """Boxes of text and axes lie inside the picture and beside each other."""
    for number, box in enumerate(boxes):
        assert box.x0 >= within.x0 - 1 and box.x1 <= within.x1 + 1, box
        assert box.y0 >= within.y0 - 1 and box.y1 <= within.y1 + 1, box
        for other in boxes[:number]:
            assert min(box.x1, other.x1) <= max(box.x0, other.x0) + 1 or (
                min(box.y1, other.y1) <= max(box.y0, other.y0) + 1
            ), (box, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "not a list of arms"),
        ("", "not a list of arms"),
        ("[none, L2]\n", "not a list of arms"),
        ("just text\n", "not a list of arms"),
        ("320\n", "not a list of arms"),
        ("none: []\nL2: penalty.l2=1\n", "L2 has no list of settings, as `L2: "),
        ("none: []\nL2: [penalty.l2=1]\nL2: [penalty.l2=2]\n", "duplicate key L2"),
        ("none: []\nL2:\n\t- penalty.l2=1\n", "line 3, column 1: there is a tab"),
    ],
)
def test_a_file_that_lists_no_arms_is_refused(tmp_path, text, message):
    (tmp_path / "arms.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        select_candidates.arms(tmp_path / "arms.yaml")


def test_arms_that_are_not_there_are_refused_in_words(tmp_path):
    with pytest.raises(UserError, match=r"arms cannot be read: No such file or directory\.$"):
        select_candidates.arms(tmp_path / "arms")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory\.$"):
        select_candidates.arms(tmp_path)


def test_the_name_of_an_arm_is_one_line(tmp_path):
    (tmp_path / "arms.yaml").write_text('"two\\nlines": [penalty.l2=1]\nλ = 2: [penalty.l2=2]\n', "utf-8")
    assert [arm.name for arm in select_candidates.arms(tmp_path / "arms.yaml")] == ["two lines", "λ = 2"]
