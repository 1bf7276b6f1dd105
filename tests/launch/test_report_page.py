"""`shardgan report`: a selection's page, and what the command refuses."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from selections import finish, selection, table_of

from launch.report import report
from launch.select import table, verdict
from pipeline.config import UserError
from pipeline.run.page.document import PAGE


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """A selection of three λ, of which one trial has failed."""
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "cache"))
    base, trials = selection(tmp_path, grid=("penalty.l2=0,0.1,1",))
    scores = [[2.0, 2.2], [1.0, 1.4], [3.0, None]]
    found = table_of(trials, scores)
    for row in found.rows:
        for outcome in row.outcomes:
            finish(outcome.trial, outcome.score)
            more = {"cur_nimg": 32, "Metrics/kid_efflite0": 9.0, "Loss/D/loss": outcome.score}
            with (outcome.trial.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(more) + "\n")
    table.write(tmp_path / "mine", found, base, trials)
    verdict.write(tmp_path / "mine", found, trials, str(tmp_path / "job.yaml"), [])
    return tmp_path / "mine"


def test_a_selection_has_its_curve_its_conclusion_and_learning_curves(chosen):
    result = CliRunner().invoke(report, [str(chosen)], catch_exceptions=False)
    assert result.output.startswith(str(chosen / PAGE))
    text = (chosen / PAGE).read_text()
    data = [json.loads(found) for found in re.findall(r'class="data">(.*?)</script>', text)]
    curve = data[0]["candidates"]
    assert [c["label"] for c in curve] == ["0", "0.1", "1"]
    assert [c["mean"] for c in curve] == pytest.approx([2.1, 1.2, 3.0])
    assert [c["scores"] for c in curve] == [[2.0, 2.2], [1.0, 1.4], [3.0]]
    assert data[0]["chosen"] == ["0.1"] and data[0]["upright"]
    kid = next(chart for chart in data if chart["title"] == "KID")
    assert [trace["y"][0] for trace in kid["traces"]] == [9.0] * 5, "at 32 images, in all finished trials"
    shades = [trace["colour"] for trace in kid["traces"]]
    assert shades[0] == shades[1] != shades[2] == shades[3] != shades[4], "by candidate"
    assert "Chosen: penalty.l2=0.1, " in text and "exit status 1" in text
    assert 'row">G.width<' in text and 'row">penalty.G.l2<' not in text, "settings that they share"
    assert re.search(r'<tr class="chosen"><th scope="row">0.1</th>', text)


def test_what_cannot_be_shown_is_refused_in_a_line(chosen, tmp_path):
    for arguments, message in [
        ((chosen, tmp_path), "give it alone"),
        ((tmp_path,), "it is no run"),
        ((chosen, "--out", tmp_path / "x.pdf"), "a page ends in .html"),
    ]:
        out = () if "--out" in arguments else ("--out", tmp_path / "x.html")
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(report, list(map(str, [*arguments, *out])), catch_exceptions=False)
    with pytest.raises(UserError, match="Several runs need --out"):
        CliRunner().invoke(report, [str(chosen), str(tmp_path)], catch_exceptions=False)
    (chosen / "table.json").write_text("{}")
    with pytest.raises(UserError, match=r"table\.json cannot be read"):
        CliRunner().invoke(report, [str(chosen)], catch_exceptions=False)
