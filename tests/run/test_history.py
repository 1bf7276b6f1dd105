"""Reading what runs have recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, UserError
from pipeline.run.changes import data_since, settings_changed
from pipeline.run.history import read_histories, read_history, trials_of
from pipeline.run.panels import panels_of


def a_run(folder: Path, *lines: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


KID = "Metrics/kid_efflite0"


def test_a_curve_is_continuous_whatever_was_resumed_and_damaged(tmp_path):
    run = a_run(
        tmp_path / "run",
        json.dumps({"cur_nimg": 0, "time": 1.0, KID: 4.5}),
        json.dumps({"cur_nimg": 2000, "Loss/D/loss": 0.25, KID: float("nan")}),
        '{"cur_nimg": 3000, "Loss/D/lo',
        json.dumps({"cur_nimg": 4000, "Loss/D/loss": 9.0, "note": "text", "flag": True}),
        json.dumps({"cur_nimg": 1000, "Loss/D/loss": 0.5, KID: 2.5}),
        json.dumps({"cur_nimg": 4000, "Loss/D/loss": 0.125}),
    )
    history = read_history(run)
    assert history.charts == ["Loss/D/loss", KID]
    assert history.series("Loss/D/loss") == ([1.0, 2.0, 4.0], [0.5, 0.25, 0.125])
    assert history.series("Loss/G/loss") == ([], [])
    assert history.leading_scores == history.scores == [KID]
    lowest, last = history.lowest(KID), history.last("Loss/D/loss")
    assert str(lowest) == "2.5 at kimg 1" and str(last) == "0.125 at kimg 4"
    assert history.last("Loss/G/loss") is history.lowest("Loss/G/loss") is None


class Counted(tuple[Any, ...]):
    """Rows that know how often all were read."""

    times = 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        return super().__iter__()


def test_all_curves_are_read_in_one_pass(tmp_path):
    """A run of days has a hundred thousand rows."""
    lines = [json.dumps({"cur_nimg": at, "Loss/D/loss": at + 1.5, KID: 1.0}) for at in range(9)]
    history = read_history(a_run(tmp_path / "run", *lines))
    first, last = (list(history.rows[at]) for at in (0, -1))
    assert all(one is other for one, other in zip(first, last, strict=True)), "each row holds its own names"
    history = replace(history, rows=Counted(history.rows))
    panels = panels_of([history])
    assert len(panels) == 1 and history.series(KID) == ([at / 1000 for at in range(9)], [1.0] * 9)
    assert history.lowest(KID) and history.last("Loss/D/loss") and history.rows.times == 1


def test_a_selection_is_its_trials_in_the_order_of_their_values(tmp_path):
    names = [
        f"penalty.l2={value},seed=0,fold={fold}" for value in ("0", "1e-4", "0.001", "10") for fold in (0, 1)
    ]
    for name in sorted(names):
        a_run(tmp_path / "chosen" / "trials" / name, '{"cur_nimg": 5}')
    (tmp_path / "chosen" / "trials" / "penalty.l2=100,seed=0,fold=0").mkdir()  # it has not begun
    assert [trial.name for trial in trials_of(tmp_path / "chosen")] == names
    found = read_histories([tmp_path / "chosen", tmp_path / "chosen" / "trials" / names[2]])
    assert [run.name for run in found] == names
    assert found[3].candidate == "penalty.l2=1e-4"


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    places = ["a/runs/x", "b/runs/x", "b/runs/y"]
    for place in places:
        a_run(tmp_path / place, '{"cur_nimg": 5}')
    monkeypatch.chdir(tmp_path)
    found = read_histories(map(Path, [*places, "./a/runs/x"]))
    assert [run.name for run in found] == ["a/runs/x", "b/runs/x", "y"]


def test_pictures_beside_the_runs_are_passed_over(tmp_path):
    a_run(tmp_path / "a", '{"cur_nimg": 5}')
    (tmp_path / "strip.png").write_bytes(b"")
    assert [run.name for run in read_histories(sorted(tmp_path.glob("*")))] == ["a"]
    with pytest.raises(UserError, match="no runs"):
        read_histories([tmp_path / "strip.png"])


def test_settings_are_those_of_the_config_without_passwords(tmp_path):
    run = a_run(tmp_path / "run", '{"cur_nimg": 5}')
    assert read_history(run).settings == {}
    text = "data: {train: 'https://me:secret@host/x?token=secret'}\n{rest}"
    (run / "config.yaml").write_text(text.replace("{rest}", "penalty: {l2: 0.01}"))
    settings = read_history(run).settings
    assert settings["penalty.G.l2"] == settings["penalty.D.l2"] == 0.01
    assert settings["data.train"] == "https://host/x"
    assert settings["data.batch_size"] == Config().data.batch_size
    (run / "config.yaml").write_text(text.replace("{rest}", "penalty: {of_the_future: 1}"))
    assert read_history(run).settings == {"data.train": "https://host/x", "penalty.of_the_future": 1}


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run"):
        read_histories([tmp_path / "nowhere"])
    (tmp_path / "trials").mkdir()
    with pytest.raises(UserError, match="no trial has begun"):
        read_histories([tmp_path])
    with pytest.raises(UserError, match="no runs"):
        read_histories([])


def test_a_run_without_results_is_left_out_beside_others(tmp_path, capsys):
    waiting = tmp_path / "b"
    waiting.mkdir()
    (waiting / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="has not begun"):
        read_histories([waiting])
    a_run(tmp_path / "a", '{"cur_nimg": 5}')
    assert [run.name for run in read_histories(sorted(tmp_path.iterdir()))] == ["a"]
    assert f"{waiting} is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("moves", "since"),
    [
        ([], -1),
        ([(200, "a", "b")], 200),
        ([(200, "a", "b"), (300, "b", "c")], 300),
        ([(200, "a", "b"), (200, "b", "a")], -1),  # it left for b, and returned before it trained on it
        ([(100, "a", "b"), (200, "b", "c"), (200, "c", "b")], 100),
        ([(200, "a", "b"), (100, "a", "b")], 100),  # it fell back to an older checkpoint
        ([(200, "a", "b"), (300, "b", "a"), (150, "b", "a")], -1),
    ],
)
def test_since_when_a_run_has_its_present_data(moves, since):
    rows = [{"cur_nimg": at, "key": "data", "old": old, "new": new} for at, old, new in moves]
    assert data_since([{"cur_nimg": 50, "key": "optim.G.lr", "old": 1, "new": 2}, *rows]) == since


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ([], []),
        ([(0, "lr", 1, 2)], []),  # before it had trained
        ([(500, "lr", 1, 2)], []),  # after the checkpoint
        ([(300, "l2", 0, 1), (200, "lr", 1, 2)], [(200, "lr", 1, 2), (300, "l2", 0, 1)]),
        ([(200, "lr", 1, 2), (200, "lr", 2, 1)], []),  # it went back to 1 before it trained with 2
        ([(300, "lr", 1, 2), (100, "lr", 1, 2)], [(100, "lr", 1, 2)]),  # it fell back to an older checkpoint
        ([(200, "data", "a", "b")], []),
    ],
)
def test_which_settings_were_others_before(changes, found):
    keys = ("cur_nimg", "key", "old", "new")
    rows = [dict(zip(keys, change, strict=True)) for change in changes]
    assert [tuple(row[key] for key in keys) for row in settings_changed(rows, 500)] == found
