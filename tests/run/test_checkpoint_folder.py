"""What a kill may leave in a checkpoint folder, and what a run resumes from then."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.run import checkpoint
from pipeline.run.report import MainReport
from pipeline.run.tracker import Tracker


def write(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "state.json").write_text(text)
    return folder


def test_a_checkpoint_that_is_replaced_is_there_before_and_after(tmp_path):
    """After a kill between the two renames the older one is restored; after both it is deleted."""
    old, new = write(tmp_path / "240", "old"), write(tmp_path / ".partial-240", "new")
    old.rename(checkpoint.replaced(old))
    checkpoint.recover(tmp_path)
    assert (tmp_path / "240" / "state.json").read_text() == "old" and not list(tmp_path.glob(".replaced*"))
    checkpoint.exchange(new, old)
    assert (tmp_path / "240" / "state.json").read_text() == "new" and checkpoint.replaced(old).is_dir()
    checkpoint.recover(tmp_path)
    assert (tmp_path / "240" / "state.json").read_text() == "new" and not list(tmp_path.glob(".replaced*"))


def test_an_exchange_that_fails_leaves_what_was_there(tmp_path):
    old = write(tmp_path / "240", "old")
    with pytest.raises(OSError, match="No such file"):
        checkpoint.exchange(tmp_path / "absent", old)
    assert (old / "state.json").read_text() == "old" and not checkpoint.replaced(old).exists()


def test_a_row_that_was_put_off_by_a_stop_is_written_once(tmp_path):
    """The checkpoint of a stop has rows up to 120; the job that resumed wrote row 240 and was killed."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"cur_nimg": {nimg}, "x": 1}}\n' for nimg in (0, 120, 240)))
    MainReport(tmp_path, Tracker(), 480, cur_nimg=240, reported=120).row(240, {"x": 2})
    assert metrics.read_text().count('"cur_nimg": 240') == 1 and '"x": 2' in metrics.read_text()
    assert '"cur_nimg": 0' in metrics.read_text()
