"""What a page says of scores that are no numbers, and of runs that were scored only afterwards."""

from __future__ import annotations

import json

import pytest
from runs_on_paper import write_run

from pipeline.run.page import document


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch):
    monkeypatch.setattr(document, "_plotly", lambda: (b"", b""))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_last_score_that_is_no_number_is_the_last(tmp_path, value):
    runs = [write_run(tmp_path / "good"), write_run(tmp_path / "lost", scores=(3.0, 0.5, value))]
    text = document.page(runs)
    assert f"the best first: good 2, lost {value:g}, " in text
    assert f"KID fell from 3 to 0.5 (kimg 1), and ended at {value:g}, " in document.page(runs[1:])


def test_a_run_whose_only_score_is_no_number_was_scored(tmp_path):
    text = document.page([write_run(tmp_path / "lost", scores=(float("nan"),))])
    assert "was not scored" not in text and '<td class="n">nan</td>' in text


def test_a_run_that_was_scored_afterwards(tmp_path):
    run = write_run(tmp_path / "run", scores=())
    assert "This run was not scored while it was trained.</p>" in document.page([run])
    (run / "scores.json").write_text(json.dumps([{"cur_nimg": 4000, "Metrics/kid_efflite0": 1.5}]))
    assert "<code>shardgan evaluate</code> found KID 1.5 at kimg 4.</p>" in document.page([run])
