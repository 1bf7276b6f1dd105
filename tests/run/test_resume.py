"""What a run may not resume with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from pipeline.config import load
from pipeline.errors import CommonError
from pipeline.gan.sync_batch_norm import SyncBatchNorm2d
from pipeline.parallel.batch import BatchShape
from pipeline.run.checkpoint import SavedBy
from pipeline.run.resume import find_start, on_other_data, refuse_other_rounds
from pipeline.run.state import State

FOLDER = Path("runs/photos")
RANKS: Any = SimpleNamespace(main=True, progress=SimpleNamespace(), broadcast_from_main=lambda make: make())


def gan(batch: BatchShape, G: nn.Module, D: nn.Module) -> Any:
    return SimpleNamespace(
        **{name: SimpleNamespace(module=module, batch=batch) for name, module in (("G", G), ("D", D))}
    )


def test_norms_of_a_round_resume_with_as_many_rounds_only():
    plain, synced = nn.BatchNorm2d(2), nn.Sequential(SyncBatchNorm2d(2))
    saved = SavedBy("ddp", 2, 2)  # of 24 images
    for batch in (BatchShape(1, 2, 12), BatchShape(2, 2, 6), BatchShape(3, 2, 4)):
        refuse_other_rounds(FOLDER, saved, gan(batch, synced, synced))
    other = BatchShape(1, 4, 6)
    refuse_other_rounds(FOLDER, saved, gan(other, plain, plain))
    refuse_other_rounds(FOLDER, saved._replace(rounds=None), gan(other, plain, synced))
    for players in ((plain, synced), (synced, plain)):
        with pytest.raises(CommonError, match=r"2 rounds per update, not 4\. Set data\.batch_gpu=12,"):
            refuse_other_rounds(FOLDER, saved, gan(other, *players))


def test_rounds_that_other_ranks_cannot_have_name_the_ranks_that_can():
    three = gan(BatchShape(8, 1, 3), SyncBatchNorm2d(2), nn.Identity())
    with pytest.raises(CommonError, match=r"8 processes cannot have 2 rounds .* as before \(2\)"):
        refuse_other_rounds(FOLDER, SavedBy("ddp", 2, 2), three)


def test_classes_keep_their_numbers_on_other_data():
    """Labels follow the order of names: one that is renamed may move all others."""

    def of(*names: str) -> State:
        return State(cur_nimg=64, label_frequencies=[0.5] * len(names), class_names=[*names], best=(0.5, 64))

    moved = on_other_data(FOLDER, of("cats", "dogs"), of("cats", "hounds"), True)
    assert (moved.cur_nimg, moved.class_names, moved.best) == (64, ["cats", "hounds"], None)
    with pytest.raises(CommonError, match="knows class 'dogs' as number 1, in these data it is number 0"):
        on_other_data(FOLDER, of("cats", "dogs"), of("dogs", "kittens"), True)
    with pytest.raises(CommonError, match="knows 2 classes, these data 3"):
        on_other_data(FOLDER, of("cats", "dogs"), of("cats", "dogs", "owls"), True)


@pytest.mark.parametrize("gone", ["removed", "removed after a kill", "an unmounted disk"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path, gone):
    """Its rows and grids would be overwritten, without a word."""
    if gone == "removed":
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "STOPPED").write_text("512\n")
    elif gone == "removed after a kill":
        (tmp_path / "SAVED").write_text("128\n")
    else:
        (tmp_path / "checkpoints").symlink_to(tmp_path / "disk" / "run")
    with pytest.raises(CommonError, match=r"(?s)holds no intact checkpoint .*checkpoints is empty or gone"):
        find_start(load(None, ["data.train=x"]), tmp_path, State(), RANKS)


def test_a_run_that_has_not_saved_yet_starts_over(tmp_path):
    """However far it came: saves may have failed."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("data: {train: x}\nrun: {checkpoint_kimg: 0.128}\n")
    (tmp_path / "metrics.jsonl").write_text('{"cur_nimg": 64}\n{"cur_nimg": 1024}\n')
    assert find_start(load(None, ["data.train=x"]), tmp_path, State(), RANKS).checkpoint is None
