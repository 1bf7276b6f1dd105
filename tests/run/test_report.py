"""What a run says, as a person reads it."""

from __future__ import annotations

import io
import re
import sys

import pytest

from pipeline.run.report import MainReport
from pipeline.run.tracker import Tracker
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


@pytest.mark.parametrize(
    ("columns", "shown", "left_out"),
    [(60, "kid_efflite0", "L_D"), (80, "L_D", "L_G"), (120, "L_G", "…")],
)
def test_the_bar_and_the_score_fit_into_a_narrow_terminal(tmp_path, monkeypatch, columns, shown, left_out):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    report = MainReport(tmp_path, Tracker(), 1_000_000, 0)
    report.row(123_400, VALUES)
    report.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).splitlines()
    line = [line for line in lines if "kimg" in line][-1]
    assert len(line) <= columns
    assert "━" in line and "123.4/1000 kimg" in line and "kid_efflite0 3.1234" in line
    assert shown in line and left_out not in line


def test_one_is_not_many():
    assert [counted(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [counted(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]
