"""Labels that training would get wrong in silence: of shards written again, and of shards sorted by class."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_shards import image_of, write_tar

from pipeline.config import UserError
from pipeline.data.check import unlike
from pipeline.data.index import Index, load_index
from pipeline.data.plan import Split
from pipeline.data.prepare.reindex import build_index
from pipeline.data.record import Shard

ROWS = 24


def write(root: Path, shift: int, cls_last: bool = False) -> None:
    for shard in range(3):
        pairs = [
            [(f"{row}.png", image_of(shard, row)), (f"{row}.cls", b"%d" % ((row + shift) % 5))]
            for row in range(ROWS)
        ]
        members = zip(*pairs, strict=True) if cls_last else pairs
        write_tar(root / f"s-{shard}.tar", [member for part in members for member in part])


def test_shards_that_were_written_again_with_other_labels_are_refused(tmp_path: Path) -> None:
    """Their sizes are equal, and a sidecar holds the CRC of the image alone."""
    write(tmp_path, shift=0)
    before = load_index(str(tmp_path))
    write(tmp_path, shift=1)
    assert [path.stat().st_size for path in tmp_path.glob("*.tar")] == [s.filesize for s in before.shards]
    with pytest.raises(UserError, match=r"s-0.tar .* has other labels than index.json .*--index-only"):
        load_index(str(tmp_path))
    rebuilt = build_index(str(tmp_path))
    assert load_index(str(tmp_path)).table(0).label.tolist() == [(row + 1) % 5 for row in range(ROWS)]
    assert rebuilt.fingerprint != before.fingerprint


@pytest.mark.parametrize("cls_last", [False, True])
def test_shards_that_were_only_copied_are_not(tmp_path: Path, cls_last: bool) -> None:
    write(tmp_path, shift=0, cls_last=cls_last)
    before = load_index(str(tmp_path))
    for path in tmp_path.glob("*.tar"):
        later = (tmp_path / "index.json").stat().st_mtime + 1000
        os.utime(path, (later, later))
    said: list[str] = []
    assert load_index(str(tmp_path), said.append) == before and not said


def by_class(shards: int, classes: int, rows: int, in_order: bool) -> Index:
    """in_order: every shard has one class."""
    each = [
        {shard * classes // shards: rows} if in_order else dict.fromkeys(range(classes), rows // classes)
        for shard in range(shards)
    ]
    return Index("x", Path(), tuple(Shard(f"{i}.tar", rows, 1, "", labels) for i, labels in enumerate(each)))


@pytest.mark.parametrize(("holdout", "folds"), [(0.1, None), (0.0, 5)])
def test_shards_sorted_by_class_are_told(holdout: float, folds: int | None) -> None:
    index = by_class(20, 10, 100, in_order=True)
    split = Split(index.sizes, 0, 16, holdout, folds)
    held = {label for shard, n in zip(index.shards, split.held, strict=True) if n for label in shard.labels}
    lacking = 10 - len(held)
    assert lacking >= 6
    assert f"sorted by class: {lacking} of 10 classes are not held out" in (unlike(index, split) or "")


def test_shuffled_shards_are_not() -> None:
    for index in (by_class(20, 10, 100, False), by_class(100, 1000, 1000, False)):
        assert unlike(index, Split(index.sizes, 0, 16, 0.1)) is None
    few = by_class(2, 10, 100, True)  # no whole shard is held out
    assert unlike(few, Split(few.sizes, 0, 16, 0.1)) is None
    none = by_class(20, 10, 100, True)
    assert unlike(none, Split(none.sizes, 0, 16)) is None
