"""A run is continued with the images it was trained on, wherever they are; with others only if asked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import ADAM, FASHION, RunFolder

import pipeline.train
from pipeline.errors import UserError
from pipeline.run.history import read_history


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a short run, a copy of its data, and other data: shards of the same names and sizes."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "adam.yaml").write_text(ADAM)
    for name in ("copy", "other"):
        shutil.copytree(FASHION, folder / name, ignore=shutil.ignore_patterns(".shardgan"))
    shards = sorted((folder / "other").glob("*.tar"))
    shutil.copy(sorted(FASHION.glob("*.tar"))[1], shards[0])
    (folder / "other" / "index.json").unlink()
    assert train(folder, 0.24) == 0
    return folder


def train(folder: Path, kimg: float, *settings: str) -> int:
    line = [str(folder / "adam.yaml"), f"run.out={folder / 'runs'}", f"run.total_kimg={kimg}", *settings]
    return pipeline.train.main(line)


def test_the_same_data_elsewhere_are_the_same_data(place, signals_kept):
    assert train(place, 0.36, f"data.train={place / 'copy'}") == 0
    assert RunFolder(place / "runs" / "adam").done


def refuse(*_: object) -> None:
    raise UserError("ends before it trains")


def test_other_data_are_refused_unless_asked_for(place, signals_kept, capfd, monkeypatch):
    other = f"data.train={place / 'other'}"
    found = RunFolder(place / "runs" / "adam")
    rows, config = found.rows, (found.path / "config.yaml").read_text()
    reals = (found.path / "samples" / "reals.png").read_bytes()
    capfd.readouterr()
    assert train(place, 0.6, other) == 2
    said = "".join(capfd.readouterr())
    assert said.count("error: ") == 1, said
    assert "was trained on other data" in said and "run.new_data=true" in said
    assert found.rows == rows and (found.path / "config.yaml").read_text() == config
    assert (found.path / "samples" / "reals.png").read_bytes() == reals
    assert train(place, 0.6, other, "run.new_data=true") == 0
    said = "".join(capfd.readouterr())
    assert found.done, said
    assert said.count("warning: ") == 1 and "do not compare" in said
    assert found.rows[: len(rows)] == rows and found.rows[-1]["cur_nimg"] == 600
    (moved,) = [json.loads(line) for line in (found.path / "changes.jsonl").read_text().splitlines()]
    assert (moved["cur_nimg"], moved["key"]) == (rows[-1]["cur_nimg"], "data")
    assert moved["old"] != moved["new"]
    assert (found.path / "samples" / "reals.png").read_bytes() != reals, "what new samples compare with"
    assert train(place, 0.72, other) == 0  # from here on they are the run's
    since = read_history(found.path).data_since
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.train.loop, "train", refuse)
        assert train(place, 0.84, f"data.train={place / 'copy'}", "run.new_data=true") == 2
    assert read_history(found.path).data_since == 720
    assert train(place, 0.84, other) == 0
    assert read_history(found.path).data_since == since == rows[-1]["cur_nimg"], (
        "it has not trained on the copy again"
    )
