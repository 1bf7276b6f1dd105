"""`shardgan bench loader`: everyone reads the same real images, and every ratio is printed."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.bench import loader as bench_loader
from launch.cli import cli


def test_prints_a_ratio_per_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path))
    found = CliRunner().invoke(
        cli, ["bench", "loader", "--turns", "1", "--images", "50"], env={"COLUMNS": "120"}
    )
    assert found.exit_code == 0, found.output
    for kind in ("28-px PNG", "64-px JPEG", "256-px JPEG"):
        row = found.output.partition(kind)[2].partition("\n")[0]
        assert len(re.findall(r"[\d,]+(?:\.\d+x)?", row)) == 5


def test_all_read_the_same_images(tmp_path: Path) -> None:
    shards = bench_loader.make_shards(tmp_path / "shards", 28, 1, "PNG")
    contestants = bench_loader._contestants(str(shards), 28, 1)
    steps = 2 * bench_loader._PER_SHARD // bench_loader._BATCH
    ours = [batch.images for batch in islice(contestants["ours"], steps)]
    theirs = [images for images, _ in islice(contestants["webdataset + Pillow"], steps)]
    assert sorted(i.numpy().tobytes() for b in ours for i in b) == sorted(
        i.tobytes() for b in theirs for i in b
    )
    kept = [batch.images for batch in islice(contestants["cached"], steps)]
    assert sorted(i.numpy().tobytes() for b in kept for i in b) == sorted(
        i.numpy().tobytes() for b in ours for i in b
    )
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert sum(map(len, islice(contestants["bytes alone"], steps))) == size
