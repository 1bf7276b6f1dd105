"""run.new_settings: a run continues with another λ, lr, betas or γ, and says since when."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from launching import SGD, RunFolder, identical, without_clocks

import pipeline.train
from pipeline.config import load
from pipeline.run import folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two equal runs of five updates, of which one is to be changed."""
    there = tmp_path_factory.mktemp("new")
    (there / "job.yaml").write_text(SGD)
    torch.set_num_threads(1)
    assert train(there, "same", 0.06) == 0
    shutil.copytree(there / "runs" / "same", there / "runs" / "changed")
    config = there / "runs" / "changed" / "config.yaml"
    config.write_text(config.read_text().replace("name: same", "name: changed"))
    return there


def train(place, name, kimg, *settings):
    given = [f"run.name={name}", f"run.out={place / 'runs'}", f"run.total_kimg={kimg}"]
    return pipeline.train.main([str(place / "job.yaml"), *given, *settings])


def test_only_what_was_changed_differs_from_where_it_was_changed(place, tmp_path, signals_kept, capfd):
    runs = {name: RunFolder(place / "runs" / name) for name in ("same", "changed")}
    changed, file = runs["changed"], place / "runs" / "changed" / "changes.jsonl"
    new = ["penalty.G.l2=1e-2", "optim.D.lr=0.02", "penalty.r2.gamma=1"]
    assert train(place, "changed", 0.12, *new[:1]) == 2
    said = capfd.readouterr().err
    assert "  penalty.G.l2: 0.001 → 0.01\n" in said and "run.new_settings=true" in said
    assert train(place, "changed", 0.12, "G.width=9", *new[:1], "run.new_settings=true") == 2
    said = capfd.readouterr().err
    assert "  G.width: 8 → 9\n" in said and "penalty.G.l2:" not in said and "penalty.G.l2," in said
    assert not file.exists()

    assert train(place, "changed", 0.12, *new, "run.new_settings=true") == 0
    assert "penalty.G.l2: 0.001 → 0.01 from kimg 0.06 on" in capfd.readouterr().out
    assert train(place, "same", 0.12) == 0
    recorded = file.read_text()
    assert [json.loads(line) for line in recorded.splitlines()] == [
        {"cur_nimg": 60, "key": key, "old": old, "new": value}
        for key, old, value in (
            ("penalty.G.l2", 0.001, 0.01), ("penalty.r2.gamma", 0.0, 1.0), ("optim.D.lr", 0.01, 0.02)
        )
    ]  # fmt: skip
    before, after = ([without_clocks(row) for row in runs[name].rows] for name in ("same", "changed"))
    assert [row["cur_nimg"] for row in after] == list(range(12, 121, 12))
    assert before[:5] == after[:5]
    at = [runs[name].exported_at(60, tmp_path / name) for name in ("same", "changed")]
    assert identical(*at)
    # The first update with the new values sees the same images and latents with the same weights.
    for key in ("Loss/D/adversarial", "Loss/scores/real", "Loss/scores/fake", "Loss/D/l2_penalty"):
        assert before[5][key] == after[5][key], key
    assert after[5]["Loss/D/r2_penalty"] > 0 and "Loss/D/r2_penalty" not in before[5]
    assert after[5]["Progress/D/lr"] == 0.02 and after[5]["Progress/G/l2"] == 0.01
    assert before[-1]["Weights/G/norm"] > after[-1]["Weights/G/norm"]

    config = load(changed.path / "config.yaml")
    assert (config.penalty.G.l2, config.optim.D.lr, config.run.new_settings) == (0.01, 0.02, False)
    for repeated in ([*new, "run.new_settings=true"], new):
        assert train(place, "changed", 0.132, *repeated) == 0
    assert pipeline.train.main([str(changed.path / "config.yaml"), "run.total_kimg=0.144"]) == 0
    assert file.read_text() == recorded and changed.rows[-1]["cur_nimg"] == 144
    capfd.readouterr()
    assert train(place, "changed", 0.3) == 2
    said = capfd.readouterr().err
    assert "  penalty.G.l2: 0.01 → 0.001\n" in said and "  optim.D.lr: 0.02 → 0.01\n" in said


def test_changes_are_recorded_once_whatever_happens_in_between(place, monkeypatch):
    """A kill between changes.jsonl and config.yaml; values to and fro; a checkpoint lost after a change."""
    run = place / "runs" / "killed"
    shutil.copytree(place / "runs" / "same", run, ignore=shutil.ignore_patterns("changes.jsonl"))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("name: same", "name: killed"))
    given = ["run.name=killed", f"run.out={run.parent}", "run.new_settings=true"]

    def start(value, cur_nimg=60):
        config = load(place / "job.yaml", [*given, f"penalty.G.l2={value}"])
        folder.open_folder(config, run, cur_nimg, lambda: None)

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(folder, "write", interrupted)
        start(0.5)
    for value in (0.5, 0.5, 0.25, 0.5):
        start(value)
    start(0.5, cur_nimg=48)
    start(0.5, cur_nimg=48)
    recorded = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert [(row["cur_nimg"], row["old"], row["new"]) for row in recorded] == [
        (60, 0.001, 0.5), (60, 0.5, 0.25), (60, 0.25, 0.5), (48, 0.25, 0.5)
    ]  # fmt: skip


def interrupted(*_, **_more):
    raise KeyboardInterrupt
