"""Tables of what sets runs apart."""

from __future__ import annotations

import json
import re
import sys
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.cells import cell_len

from launch.compare import blocks, compare, markdown
from pipeline.run import comparison
from pipeline.run.comparison import Column, Comparison
from pipeline.run.history import read_histories

KID = "Metrics/kid_efflite0"


def a_run(folder: Path, scores: list[float], settings: str = "{}", **heldout: object) -> Path:
    """A run that was scored at kimg 1, 2, …"""
    folder.mkdir(parents=True)
    precision = "Metrics/precision_efflite0"
    rows = [{"cur_nimg": 1000 * n, KID: value, precision: n / 8} for n, value in enumerate(scores, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"run": {"name": folder.name}, "data": {"train": "data"}} | yaml.safe_load(settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if heldout:
        (folder / "reference.json").write_text(json.dumps({"heldout": heldout}))
    return folder


def columns(table: Comparison) -> dict[str, tuple[str, ...]]:
    return {column.title: column.cells for column in table.columns}


def test_what_evaluate_has_added_is_shown(tmp_path):
    """The newest score of each run; the best only among those against the same images."""

    def evaluated(folder: Path, *entries: tuple[int, float, str]) -> Path:
        added = [{"cur_nimg": at, KID: value, "against": {"heldout": to}} for at, value, to in entries]
        (a_run(folder, [4.0]) / "scores.json").write_text(json.dumps(added))
        return folder

    a = evaluated(tmp_path / "a", (1000, 1.0, "x"), (2000, 3.0, "x"))
    b, c = evaluated(tmp_path / "b", (3000, 2.0, "x")), evaluated(tmp_path / "c", (1000, 0.5, "y"))
    none = a_run(tmp_path / "none", [4.0])
    (none / "scores.json").write_text("[")
    table = comparison.compare(read_histories([a, b, none]))
    shown = next(column for column in table.columns if "evaluated" in column.title)
    assert shown == Column("kid_efflite0 evaluated (kimg)", ("3 (2)", "2 (3)", "–"), frozenset({1}))
    assert table.notes == ()
    table = comparison.compare(read_histories([a, b, c]))
    shown = next(column for column in table.columns if "evaluated" in column.title)
    assert shown.cells[2] == "0.5 (1)" and shown.best == {1}
    assert table.notes == ("kid_efflite0: evaluated against different images, so these do not compare.",)


def test_runs_without_scores_or_settings_take_nothing_from_others(tmp_path):
    same = {"plan": "a", "images": 1000}
    runs = [a_run(tmp_path / name, [4.0, value], **same) for name, value in (("a", 2.0), ("b", 1.0))]
    unscored, unread = a_run(tmp_path / "unscored", []), a_run(tmp_path / "unread", [3.0], **same)
    (unread / "config.yaml").unlink()
    (unscored / "metrics.jsonl").write_text('{"cur_nimg": 1000}\n')
    table = comparison.compare(read_histories([*runs, unscored, unread]))
    assert table.notes == () and set(columns(table)) == {"kimg", "kid_efflite0 (kimg)", "precision_efflite0"}
    scores = table.columns[1]
    assert scores.cells == ("2 (2)", "1 (2)", "–", "3 (1)") and scores.best == {1}
    equal = comparison.compare(read_histories([runs[1], a_run(tmp_path / "d", [4.0, 1.0], **same), runs[0]]))
    assert equal.columns[1].best == {0, 1}
    (tmp_path / "c").mkdir()
    other = a_run(tmp_path / "c" / "other", [1.0], plan="b")
    apart = comparison.compare(read_histories([*runs, unscored, other]))
    assert columns(apart)["scored against"] == ("A", "A", "–", "B")


def test_only_settings_that_differ_are_shown_and_the_best_is_marked(tmp_path):
    same = {"plan": "a", "images": 1000}
    a_run(tmp_path / "none", [4.0, 3.0], "penalty: {l2: 0}", **same)
    a_run(
        tmp_path / "some", [4.0, 1.5, 2.0], "{penalty: {l2: 1.0e-3}, optim: {G: {betas: [0, 0.9]}}}", **same
    )
    a_run(tmp_path / "much", [4.0, float("nan")], "penalty: {l2: 1}", **same)
    table = comparison.compare(read_histories(tmp_path / name for name in ("none", "some", "much")))
    assert table.names == ("none", "some", "much") and table.notes == ()
    assert columns(table) == {
        "kimg": ("2", "3", "2"),
        "kid_efflite0 lowest (kimg)": ("3 (2)", "1.5 (2)", "4 (1)"),
        "kid_efflite0 last (kimg)": ("3 (2)", "2 (3)", "nan (2)"),
        "penalty.l2": ("0", "0.001", "1"),
        "optim.G.betas": ("[0.5, 0.999]", "[0, 0.9]", "[0.5, 0.999]"),
        "precision_efflite0": ("0.25", "0.375", "0.25"),
    }
    best = {column.title: set(column.best) for column in table.columns if column.best}
    assert best == {"kid_efflite0 lowest (kimg)": {1}, "kid_efflite0 last (kimg)": {1}}


def test_that_a_run_had_other_settings_before_is_said(tmp_path):
    a_run(tmp_path / "a", [4.0], "penalty: {l2: 0}")
    b = a_run(tmp_path / "b", [4.0, 3.0], "penalty: {l2: 1.0e-3}")
    change = {"cur_nimg": 1000, "key": "penalty.G.l2", "old": 0.0, "new": 0.001}
    (b / "changes.jsonl").write_text(json.dumps(change) + "\n")
    table = comparison.compare(read_histories(sorted(tmp_path.iterdir())))
    assert table.notes == ("b: penalty.G.l2 was 0.0 up to kimg 1.",)


def test_players_with_different_penalties_have_a_column_each(tmp_path):
    for number, (G, D) in enumerate([(0.0, 0.0), (0.5, 0.25)]):
        a_run(tmp_path / str(number), [1.0], f"penalty: {{G: {{l2: {G}}}, D: {{l2: {D}}}}}")
    table = columns(comparison.compare(read_histories(sorted(tmp_path.iterdir()))))
    assert table["penalty.G.l2"] == ("0", "0.5") and table["penalty.D.l2"] == ("0", "0.25")
    assert "penalty.l2" not in table


def test_scores_against_other_images_are_not_compared(tmp_path):
    for name, kid, plan, images in [("a", 3.0, "x", 10), ("b", 1.0, "y", 10), ("c", 2.0, "x", 10)]:
        a_run(tmp_path / name, [kid], plan=plan, images=images)
    table = comparison.compare(read_histories(sorted(tmp_path.iterdir())))
    assert columns(table)["scored against"] == ("A", "B", "A")
    scores = next(column for column in table.columns if column.title == "kid_efflite0 (kimg)")
    assert scores.best == {2}, "b is lower, but against other images and alone"
    (note,) = table.notes
    assert "images held out" in note and "number" not in note and "do not compare" in note


def test_scores_against_other_training_images_are_left_out(tmp_path):
    for name in "ab":
        run = a_run(tmp_path / name, [1.0])
        (run / "reference.json").write_text(json.dumps({"heldout": {"plan": 1}, "train": {"plan": name}}))
        row = {"cur_nimg": 9000, "Metrics/nn_ratio_efflite0": 1.0, f"{KID}_train": 2.0}
        row["Metrics/recall_efflite0"] = 0.5
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    table = comparison.compare(read_histories(sorted(tmp_path.iterdir())))
    assert set(columns(table)) == {"kimg", "recall_efflite0"}
    assert "left out" in table.notes[0]


LONG = Comparison(
    ("a-long-name-of-an-experiment-1,seed=0", "a-long-name-of-an-experiment-2,seed=0"),
    (
        *(Column(f"penalty.r{n}.gamma", ("0.001", "1")) for n in range(9)),
        Column("data.train", ("/somewhere/very/far/away/train", "/somewhere/very/near/to/us/train")),
        Column("run.init", (f"{'x' * 40}1{'y' * 40}", f"{'x' * 40}2{'y' * 40}")),
        Column("kid_efflite0 (kimg)", ("1.25 (100)", "1.5 (100)"), frozenset({0})),
    ),
    ("One note.",),
)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_table_fits_into_the_terminal(monkeypatch, width):
    """Whatever is cut stays distinct, and nothing is lost."""

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr("pipeline.run.history.read_histories", lambda runs: runs)
    monkeypatch.setattr(comparison, "compare", lambda _: LONG)
    compare.callback((Path("run"),), None)  # type: ignore[misc]
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert max(map(cell_len, lines)) <= width and "One note." in lines
    assert (
        sum(line.count("gamma") for line in lines) == 9 and sum("1.25 (100)*" in line for line in lines) == 1
    )
    for columns in blocks(LONG, width):
        assert all(len(set(column.cells)) == 2 for column in columns)


def test_elsewhere_it_is_markdown_in_full():
    text = markdown(Comparison(("a|b", "c"), LONG.columns[-2:], ("A note.",)))
    assert text.splitlines() == [
        "| run | run.init | kid_efflite0 (kimg) |",
        "| --- | --- | --- |",
        rf"| a\|b | {'x' * 40}1{'y' * 40} | **1.25 (100)** |",
        f"| c | {'x' * 40}2{'y' * 40} | 1.5 (100) |",
        "",
        "A note.",
    ]
