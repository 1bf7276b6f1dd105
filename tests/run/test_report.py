"""What a run says, as a person reads it."""

from __future__ import annotations

import io
import re
import sys

import pytest

from pipeline.errors import RunError
from pipeline.run.events import EVENTS
from pipeline.run.report import MainReport
from pipeline.run.rows import rows
from pipeline.wording import counted

VALUES = {
    "Timing/img_per_sec": 152.0,
    "Loss/D/loss": 0.143,
    "Loss/G/loss": 4.56,
    "Metrics/kid_efflite0": 3.1234,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(columns: int, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    return terminal


def bars(terminal: Terminal) -> list[str]:
    """The lines that the bar was drawn as."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).splitlines()
    return [line for line in lines if "kimg" in line]


@pytest.mark.parametrize(
    ("columns", "shown", "left_out"),
    [(60, "kid_efflite0", "L_D"), (80, "L_D", "L_G"), (120, "L_G", "…")],
)
def test_the_bar_and_the_score_fit_into_a_narrow_terminal(tmp_path, monkeypatch, columns, shown, left_out):
    terminal = terminal_of(columns, monkeypatch)
    report = MainReport(tmp_path, [], 1_000_000, 0)
    report.row(123_400, VALUES)
    report.close()
    line = bars(terminal)[-1]
    assert len(line) <= columns
    assert "━" in line and "123.4/1000 kimg" in line and "kid_efflite0 3.1234" in line
    assert shown in line and left_out not in line


def test_a_trial_of_a_few_updates_shows_where_it_is(tmp_path, monkeypatch, capsys):
    report = MainReport(tmp_path, [], 50, 0)
    report.row(48, VALUES)
    report.close()
    assert "kimg    0.048 / 0.05 " in capsys.readouterr().out
    terminal = terminal_of(60, monkeypatch)
    report = MainReport(tmp_path, [], 50, 0)
    report.row(48, VALUES)
    report.close()
    line = bars(terminal)[-1]
    assert len(line) <= 60 and "0.048/0.05 kimg" in line and "kid_efflite0 3.1234" in line


def test_of_many_scores_the_first_stays(tmp_path, monkeypatch):
    terminal = terminal_of(60, monkeypatch)
    report = MainReport(tmp_path, [], 1_000_000, 0)
    others = {f"Metrics/{name}_efflite0": 0.25 for name in ("precision", "recall", "density", "coverage")}
    report.row(123_400, VALUES | others)
    report.close()
    line = bars(terminal)[-1]
    assert "━" in line and "kid_efflite0 3.1234" in line and "…" not in line and "coverage" not in line


def test_the_bar_says_what_happens_between_updates(tmp_path, monkeypatch):
    terminal = terminal_of(100, monkeypatch)
    report = MainReport(tmp_path, [], 1_000_000, 0)
    report.row(123_400, VALUES)
    report.row(127_400, {key: VALUES[key] for key in VALUES if "Metrics" not in key})  # the score stays
    with report.during("drawing samples"):
        (*_, line) = bars(terminal)
        assert "drawing samples …" in line and "kid" not in line
    report.close()
    (*_, line) = bars(terminal)
    assert "kid_efflite0 3.1234" in line and "drawing" not in line


@pytest.mark.parametrize("no_color", [False, True])
def test_a_warning_has_a_colour_where_the_terminal_may_have_one(tmp_path, monkeypatch, no_color):
    terminal = terminal_of(100, monkeypatch)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    report = MainReport(tmp_path, [], 1_000_000, 0)
    report.warn("Slow", "a disk is slow")
    report.close()
    assert ("\x1b[33mwarning: a disk is slow" in terminal.getvalue()) is not no_color
    assert "warning: a disk is slow" in terminal.getvalue()


def test_one_is_not_many():
    assert [counted(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [counted(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]


@pytest.mark.parametrize(
    ("world", "error", "kept"),
    [
        (1, ZeroDivisionError("one over nothing"), True),
        (2, ZeroDivisionError("one over nothing"), False),  # one rank's: the watch finds it
        (2, RunError("one over nothing"), True),
        (1, KeyboardInterrupt(), False),
    ],
)
def test_an_error_that_ends_the_run_is_kept(tmp_path, world, error, kept):
    report = MainReport(tmp_path, [], 1000, 60)
    with pytest.raises(type(error)), report.kept(world):
        raise error
    found = [*rows(tmp_path / EVENTS)] if (tmp_path / EVENTS).exists() else []
    assert [(row["event"], row["cur_nimg"], row["text"]) for row in found] == (
        [("error", 60, "one over nothing")] if kept else []
    )
