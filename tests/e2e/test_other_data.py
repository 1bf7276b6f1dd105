"""A run is continued with the images it was trained on, wherever they are; with others only if asked to."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from launching import ADAM, FASHION, Ended, RunFolder, run


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
    assert train(folder, 0.24).status == 0
    return folder


def train(folder: Path, kimg: float, *settings: str) -> Ended:
    line = [sys.executable, "-m", "pipeline.train", "adam.yaml", f"run.total_kimg={kimg}", *settings]
    return run(line, folder)


def test_the_same_data_elsewhere_are_the_same_data(place):
    ended = train(place, 0.36, "data.train=copy")
    assert ended.status == 0 and RunFolder(place / "runs" / "adam").done, ended.output


def test_other_data_are_refused_unless_asked_for(place):
    found = RunFolder(place / "runs" / "adam")
    rows, config = found.rows, (found.path / "config.yaml").read_text()
    ended = train(place, 0.6, "data.train=other")
    assert ended.status == 2 and ended.output.count("error: ") == 1, ended.output
    assert "was trained on other data" in ended.output and "run.new_data=true" in ended.output
    assert found.rows == rows and (found.path / "config.yaml").read_text() == config
    ended = train(place, 0.6, "data.train=other", "run.new_data=true")
    assert ended.status == 0 and found.done, ended.output
    assert ended.output.count("warning: ") == 1 and "do not compare" in ended.output
    assert found.rows[: len(rows)] == rows and found.rows[-1]["cur_nimg"] == 600
    assert train(place, 0.72, "data.train=other").status == 0  # from here on they are the run's
