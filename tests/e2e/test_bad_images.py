"""Images that cannot be used: named once in a run, counted over its ranks and restarts, too many stop it."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from launching import FASHION, RunFolder, accelerate, run

import pipeline.train

BAD = ("000000-000003", "000002-000050", "000004-000099")  # in three of the five shards


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """The small image set with three images whose pixels end too early, and a config for it."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(FASHION, folder / "data", ignore=shutil.ignore_patterns("*.json", ".*"))
    for path in sorted((folder / "data").glob("*.tar")):
        data = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.removesuffix(".png") in BAD:
                    data[member.offset_data + 60 : member.offset_data + member.size] = bytes(member.size - 60)
        path.write_bytes(data)
    (folder / "bad.yaml").write_text(
        """
data: {train: data, size: 28, channels: 1, batch_size: 12, workers: 0, holdout: 0, max_bad: 3}
G: {width: 4, norm: none, z_dim: 8}
D: {width: 4, norm: none}
run: {tick_kimg: 0.12, checkpoint_kimg: 0.12, total_kimg: 0.24, eval_kimg: 9}
score: {metrics: []}
track: {wandb: false}
"""
    )
    return folder


def counts(found: RunFolder) -> list[float]:
    return [row["Progress/bad_images"] for row in found.rows if row["cur_nimg"]]


def test_over_restarts(damaged, signals_kept, capfd, monkeypatch):
    """Continued in mid-epoch and into a second epoch, with another max_bad, then with too small a one."""
    monkeypatch.chdir(damaged)
    named = []
    for total in ("0.24", "0.6"):
        assert pipeline.train.main(["bad.yaml", "run.name=again", f"run.total_kimg={total}"]) == 0
        named += [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(named) == 3 and all(any(key in line for line in named) for key in BAD)
    assert pipeline.train.main(["bad.yaml", "run.name=at_once", "run.total_kimg=0.6"]) == 0
    again, at_once = counts(RunFolder(Path("runs/again"))), counts(RunFolder(Path("runs/at_once")))
    assert again == at_once and again[0] < 3 and again[4:] == [3], "after one epoch of 500 all are known"
    capfd.readouterr()
    less = ["bad.yaml", "run.name=again", "run.total_kimg=0.9", "data.max_bad=2"]
    assert pipeline.train.main(less) == 2
    assert "3 images cannot be used, more than data.max_bad=2" in capfd.readouterr().err


@pytest.mark.long
def test_over_ranks(damaged):
    """No rank meets more than data.max_bad of them, all together do: all stop at a tick, with one message."""
    rare = ["run.tick_kimg=0.504", "run.checkpoint_kimg=0.504"]  # after the first epoch, of 500 images
    settings = ["run.name=ranks", "run.total_kimg=9", *rare, "data.max_bad=2"]
    stopped = run(accelerate(3, "bad.yaml", *settings), damaged)
    assert stopped.status != 0
    assert stopped.output.count("3 images cannot be used, more than data.max_bad=2") == 1
    assert stopped.output.count("warning: shard") == 3 and "in _train" not in stopped.output
    assert counts(RunFolder(damaged / "runs" / "ranks")) == [3]
