"""Bad images have stand-ins, the same for any ranks and workers, and are counted; flips follow the image."""

from __future__ import annotations

import errno
import os
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from streams import batches, named
from tiny_shards import SIZE, MakeShards, image_of, sample_of, write_tar

from pipeline.config import Data, UserError
from pipeline.data.batches import flips
from pipeline.data.index import Index, load_index
from pipeline.data.plan import Plan, Split
from pipeline.data.stream import Batch, check_images
from pipeline.run.health import BadImages
from pipeline.run.report import Report

BATCH = 6
BAD = {(0, 3), (1, 0), (2, 5)}


def open_all(root: Path) -> tuple[Index, Plan]:
    index = load_index(str(root))
    return index, Split(index.sizes, 1, 2).training()


def stream(index: Index, plan: Plan, steps: int, world: int = 1, **changes: object) -> list[Batch]:
    """Each rank's batches, step by step."""
    changes = {"batch_size": BATCH, "max_bad": 3} | changes
    ranks = [batches(index, plan, rank=rank, world=world, **changes) for rank in range(world)]
    seen = [next(rank) for _ in range(steps) for rank in ranks]
    for rank in ranks:
        rank.close()
    return seen


def count_bad(batches: list[Batch], most: int) -> int:
    """As a run counts them."""
    bad = BadImages(most, [], SimpleNamespace(main=True), Report())  # type: ignore[arg-type]
    for batch in batches:
        bad.add(batch.bad)
    return bad.found


def images(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


@pytest.fixture(params=["undecodable", "flipped bit"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Index, Plan]:
    """Three shards of which the samples BAD are no images, or are not those that were indexed."""
    root = tmp_path / "damaged"
    for shard in range(3):
        rows = [(f"{shard}-{row}.png", image_of(shard, row)) for row in range(8)]
        if request.param == "undecodable":
            rows = [(n, d[:40] if (shard, row) in BAD else d) for row, (n, d) in enumerate(rows)]
        write_tar(root / f"s-{shard}.tar", rows)
    index, plan = open_all(root)
    for shard, row in BAD if request.param == "flipped bit" else ():
        data = bytearray(index.path(shard).read_bytes())
        data[int(index.table(shard).offset[row]) + 20] ^= 4
        index.path(shard).write_bytes(data)
    return index, plan


def test_a_bad_image_is_replaced_by_another(damaged: tuple[Index, Plan]) -> None:
    index, plan = damaged
    batches = stream(index, plan, steps=12)
    planned = [tuple(pair) for pair in plan.samples(0, 12 * BATCH).tolist()]
    seen = [sample_of(image) for image in images(batches).numpy()]
    assert [pair in BAD for pair in planned] == [a != b for a, b in zip(planned, seen, strict=True)]
    assert not BAD & set(seen)
    named = {text for batch in batches for text in batch.bad}
    assert len(named) == 3
    for shard, row in BAD:
        assert any(f"s-{shard}.tar" in text and f"{shard}-{row}" in text for text in named)


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (2, 0), (3, 2)])
def test_the_same_stand_ins_whatever_ranks_and_workers(
    damaged: tuple[Index, Plan], world: int, workers: int
) -> None:
    expected = images(stream(*damaged, steps=8, xflip=True))
    assert (images(stream(*damaged, steps=8, world=world, workers=workers, xflip=True)) == expected).all()
    resumed = stream(*damaged, steps=5, start=3 * BATCH, world=world, workers=workers, xflip=True)
    assert (images(resumed) == expected[3 * BATCH :]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_max_bad_stop_the_run(damaged: tuple[Index, Plan], workers: int) -> None:
    batches = stream(*damaged, steps=12, max_bad=2, workers=workers)  # in three epochs
    assert count_bad(batches, most=3) == 3
    with pytest.raises(UserError, match=r"3 images cannot be used, more than data.max_bad=2.*s-\d.tar"):
        count_bad(batches, most=2)
    with pytest.raises(UserError, match=r"^shard s-\d.tar.*(CRC|cannot be decoded)"):
        stream(*damaged, steps=8, max_bad=0, workers=workers)


@pytest.mark.parametrize(("fails", "bad"), [(1, 0), (6, 0), (99, 1)])
def test_a_disk_that_fails_to_read_one_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int, bad: int
) -> None:
    """A few times (a network disk that was away), and always (a bad sector)."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    write_tar(tmp_path / "s-0.tar", [(f"0-{row}.png", image_of(0, row)) for row in range(8)])
    index, plan = open_all(tmp_path)
    offset, left, read = int(index.table(0).offset[3]), fails, os.pread

    def pread(file: int, size: int, at: int) -> bytes:
        nonlocal left
        if at == offset and left:
            left -= 1
            raise OSError(errno.EIO, "Input/output error")
        return read(file, size, at)

    monkeypatch.setattr("os.pread", pread)
    batches = stream(index, plan, steps=2)
    said = {text for batch in batches for text in batch.bad}
    message = f"shard s-0.tar, byte {offset}: sample '0-3' cannot be read: Input/output error."
    assert said == ({message} if bad else set())
    assert ((0, 3) in {sample_of(image) for image in images(batches).numpy()}) is not bool(bad)
    assert left == 0 or bad
    assert sum(pauses) == {1: 0, 6: 15, 99: 30}[fails], "replacements are not waited for"
    if bad:
        with pytest.raises(UserError, match="'0-3' cannot be read: Input/output error"):
            stream(index, plan, steps=2, max_bad=0)


def test_stand_ins_go_through_a_users_stages(damaged: tuple[Index, Plan]) -> None:
    black = image_of(0, 0)

    def blacken(sample: dict) -> dict:
        return sample if len(sample["png"]) == 40 else sample | {"png": black}

    assert not images(stream(*damaged, steps=8, stages=named(webdataset.map(blacken)))).any()


def test_nothing_to_stand_in(tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "x.tar", [(f"{row}.png", image_of(0, row)[:40]) for row in range(5)])
    with pytest.raises(UserError, match=r"x.tar sample \d cannot be decoded"):
        stream(*open_all(tmp_path / "d"), steps=1, max_bad=100)


def test_a_bad_image_is_no_reason_not_to_start(tmp_path: Path) -> None:
    rows = [("a.png", image_of(0, 0)[:40]), ("b.png", image_of(0, 1))]
    index = load_index(str(write_tar(tmp_path / "d" / "x.tar", rows).parent))
    check_images(index, Data(size=SIZE, channels=1, max_bad=1))
    with pytest.raises(UserError, match="sample a cannot be decoded: not a whole PNG"):
        check_images(index, Data(size=SIZE, channels=1, max_bad=0))


def test_a_missing_shard_has_no_stand_in(make_shards: MakeShards) -> None:
    index, plan = open_all(make_shards([10, 10]))
    index.path(1).unlink()
    with pytest.raises(UserError, match=r"s-0001.tar .* cannot be read"):
        stream(index, plan, steps=4, max_bad=100)


def test_spares_are_of_the_plan_and_of_the_same_window(make_shards: MakeShards) -> None:
    index = load_index(str(make_shards([20, 20, 20, 20, 20, 20])))
    plan = Split(index.sizes, 1, 2, 0.2).training()
    trained_on = {tuple(pair) for pair in plan.samples(0, plan.size).tolist()}
    for position in range(0, 2 * plan.size, 7):
        spares = [plan.replacement(position, attempt) for attempt in range(16)]
        assert set(spares) <= trained_on and len(set(spares)) > 8
        assert spares == [plan.replacement(position, attempt) for attempt in range(16)]
        near = {int(s) for s, _ in plan.samples(position // 40 * 40, 1)} | {s for s, _ in spares[:8]}
        assert len(near) <= 3


def test_flips_are_fair_and_follow_the_image(make_shards: MakeShards) -> None:
    index, plan = open_all(make_shards([60, 60]))
    steps = 3 * plan.size // BATCH
    plain, flipped = (images(stream(index, plan, steps, xflip=x)).numpy() for x in (False, True))
    epochs = np.arange(len(plain)) // plan.size
    mirrored = flips(plan.seed, epochs, plan.samples(0, len(plain)))
    expected = np.where(mirrored[:, None, None, None], plain[..., ::-1], plain)
    assert (flipped == expected).all() and (plain != flipped).any()
    assert abs(mirrored.mean() - 0.5) < 0.1
    order = np.random.default_rng(0).permutation(len(plain))
    assert (flips(plan.seed, epochs[order], plan.samples(0, len(plain))[order]) == mirrored[order]).all()


def test_flips_differ_by_seed_epoch_and_image() -> None:
    pairs = np.stack(np.meshgrid(np.arange(40), np.arange(50)), axis=-1).reshape(-1, 2)
    tosses = [
        flips(seed, np.full(len(pairs), epoch), pairs) for seed in (0, 1, 2**63 - 1) for epoch in range(3)
    ]
    assert all(abs(toss.mean() - 0.5) < 0.05 for toss in tosses)
    alike = [(a == b).mean() for i, a in enumerate(tosses) for b in islice(tosses, i)]
    assert max(abs(share - 0.5) for share in alike) < 0.06
