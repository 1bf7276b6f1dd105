"""Shards with an odd sample of each kind: trained on what is sound, said once, resumed bit for bit."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from launching import FASHION, RunFolder
from PIL import Image

import pipeline.train

CONFIG = """
data: {train: data, size: 28, channels: 1, conditional: true, batch_size: 12, workers: 0, holdout: 0.1}
G: {width: 4, norm: none, z_dim: 8}
D: {width: 4, norm: none}
run: {tick_kimg: 0.12, checkpoint_kimg: 0.12, total_kimg: 0.24, eval_kimg: 9}
score: {metrics: []}
track: {wandb: false}
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """One shard of 100 images under compound extensions, and beside them what others leave in shards."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "data").mkdir()
    large = io.BytesIO()
    Image.new("L", (30, 30)).save(large, "PNG")
    with tarfile.open(FASHION / "shard-000000.tar") as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    members = [(name.replace(".png", ".photo.png"), data) for name, data in members]
    image = next(data for name, data in members if name.endswith(".png"))
    members += [("failed.json", b"{}"), ("README.md", b"# clothes"), ("LICENSE", b"")]
    members += [("two.png", image), ("two.jpg", image), ("large.png", large.getvalue()), ("large.cls", b"1")]
    members += [("unlabelled.png", image), ("unlabelled.cls", b"boot")]
    with tarfile.open(folder / "data" / "000000.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / "odd.yaml").write_text(CONFIG)
    return folder


def test_trained_on_and_resumed(odd, signals_kept, capfd, monkeypatch):
    monkeypatch.chdir(odd)
    assert pipeline.train.main(["odd.yaml", "run.name=at_once"]) == 0
    said = capfd.readouterr().out
    for once in (
        "2 samples without an image skipped.",
        "1 sample with an image that cannot be used skipped.",
        "warning: 1 of the 102 samples has no label",
    ):
        assert said.count(once) == 1, once
    assert said.count("warning: shard 000000.tar sample large is 30x30") <= 1
    for total in ("0.12", "0.24"):
        assert pipeline.train.main(["odd.yaml", "run.name=again", f"run.total_kimg={total}"]) == 0
    at_once, again = (RunFolder(Path("runs") / name).exported() for name in ("at_once", "again"))
    for network, weights in at_once.items():
        assert all(torch.equal(weight, again[network][name]) for name, weight in weights.items())


def test_refused_where_max_bad_does_not_allow_for_it(odd, signals_kept, capfd, monkeypatch):
    monkeypatch.chdir(odd)
    assert pipeline.train.main(["odd.yaml", "run.name=none", "data.max_bad=0", "data.conditional=false"]) == 2
    assert "1 sample in" in (error := capfd.readouterr().err) and "'two' has 2 images (png, jpg)" in error
    assert not Path("runs/none").exists()
