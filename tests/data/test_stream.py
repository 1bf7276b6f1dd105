"""The stream: every planned sample once, in one order, whatever ranks and workers there are."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from streams import BATCH, batches, data_of, ids, open_all
from tiny_shards import SIZE, MakeShards, image_of, write_tar

from pipeline.borrowed import borrowed
from pipeline.config import Data, UserError
from pipeline.data import workers as worker_processes
from pipeline.data.check import remarks
from pipeline.data.index import Index, load_index
from pipeline.data.plan import Plan, Split
from pipeline.data.reader import Reader
from pipeline.data.stream import (
    check_images,
    heldout_batches,
    label_frequencies,
)

LAYOUTS = {
    "one shard": [29],
    "fewer shards than ranks": [11, 7, 13],
    "uneven": [1, 40, 3, 17, 2, 25],
    "single samples": [1] * 19,
}


def ledger(
    index: Index, plan: Plan, world: int, workers: int, steps: int, start: int = 0
) -> list[tuple[int, int]]:
    """What all ranks together consume, in global order."""
    ranks = [
        batches(index, plan, rank=rank, world=world, workers=workers, start=start) for rank in range(world)
    ]
    seen = [pair for _ in range(steps) for rank in ranks for pair in ids(next(rank))]
    for rank in ranks:
        rank.close()
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ledger(make_shards: MakeShards, layout: str, world: int, workers: int) -> None:
    index, plan = open_all(make_shards(LAYOUTS[layout]))
    steps = -(-3 * plan.size // BATCH)
    seen = ledger(index, plan, world, workers, steps)
    assert seen == [tuple(pair) for pair in plan.samples(0, steps * BATCH).tolist()]
    for epoch in range(3):
        once = Counter(seen[epoch * plan.size : (epoch + 1) * plan.size])
        assert once == Counter((s, r) for s, n in enumerate(index.sizes) for r in range(n))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 3), (3, 0)])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_round_is_the_same_images_for_any_ranks(
    make_shards: MakeShards, world: int, workers: int, rounds: int
) -> None:
    """Flipped or not; with a step that begins in one epoch and ends in the next."""
    index, plan = open_all(make_shards(LAYOUTS["uneven"]))
    keys = {"batch_size": 36, "xflip": True, "start": 5, "rounds": rounds}
    alone = batches(index, plan, **keys)
    ranks = [batches(index, plan, rank=rank, world=world, workers=workers, **keys) for rank in range(world)]
    for _ in range(plan.size // 36 + 2):
        parts = [next(rank).images.chunk(rounds) for rank in ranks]
        assert torch.equal(
            torch.cat([part for turn in zip(*parts, strict=True) for part in turn]), next(alone).images
        )
    for rank in ranks:
        rank.close()


def test_stopped_and_resumed_at_other_worlds(make_shards: MakeShards) -> None:
    """Three times within one epoch, with other ranks and workers: nothing twice, nothing missing."""
    index, plan = open_all(make_shards([50, 20, 61, 13]), holdout=0.1)
    position, seen = 0, []
    for world, workers, steps in [(4, 0, 3), (2, 1, 2), (3, 2, 4), (1, 0, 5)]:
        seen += ledger(index, plan, world, workers, steps, start=position)
        position += steps * BATCH
    assert position > plan.size
    assert seen == [tuple(pair) for pair in plan.samples(0, position).tolist()]
    assert len(set(seen[: plan.size])) == plan.size


def test_batch_has_what_its_docstring_says(make_shards: MakeShards) -> None:
    index, plan = open_all(make_shards([20, 20], classes=7))
    batch = next(batches(index, plan, conditional=True, channels=3, world=2, rank=1))
    assert batch.images.shape == (BATCH // 2, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    assert batch.labels is not None and batch.labels.dtype == torch.int64
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    expected = [(shard + row) % 7 for shard, row in plan.samples(BATCH // 2, BATCH // 2).tolist()]
    assert batch.labels.tolist() == expected
    assert next(batches(index, plan)).labels is None


def test_fork_server_gives_the_same(make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way workers start beside CUDA."""
    index, plan = open_all(make_shards([20, 20]))
    assert worker_processes.start_method() == "fork"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert worker_processes.start_method() == "forkserver"
    stream = batches(index, plan, workers=2)
    assert [ids(batch) for batch in islice(stream, 5)] == [ids(b) for b in islice(batches(index, plan), 5)]
    stream.close()


def test_workers_of_a_borrowed_process_have_its_environment_of_now(
    make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork server keeps that of its start, from which credentials set in a later cell would be missing."""
    index, plan = open_all(make_shards([20, 20]))
    (tmp_path / "tells.py").write_text(
        "import os\ndef tell(samples):\n    assert os.environ['NOW'] == 'later', os.environ['NOW']\n"
        "    return samples\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with borrowed():
        assert worker_processes.start_method() == "forkserver"
        for now in ("earlier", "later"):
            monkeypatch.setenv("NOW", now)
            stages = ["tells:tell"] if now == "later" else []
            stream = batches(index, plan, workers=1, stages=stages)
            assert len(ids(next(stream))) == BATCH
            stream.close()
    assert worker_processes.start_method() == "fork"


def test_a_notebook_s_stage_cannot_be_sent_to_workers(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "mine", lambda samples: samples, raising=False)
    index, plan = open_all(make_shards([20, 20]))
    with borrowed():
        next(batches(index, plan, stages=["__main__:mine"]))
        with pytest.raises(UserError, match=r"cannot import __main__:mine here. Put it into a file"):
            batches(index, plan, workers=1, stages=["__main__:mine"])


def test_global_random_state_is_left_alone(make_shards: MakeShards) -> None:
    index, plan = open_all(make_shards([20]))
    before = torch.get_rng_state()
    for workers in (0, 1):
        stream = batches(index, plan, workers=workers)
        next(stream)
        stream.close()
    assert (torch.get_rng_state() == before).all()


def test_close_ends_the_stream(make_shards: MakeShards) -> None:
    index, plan = open_all(make_shards([20]))
    for workers in (0, 2):
        stream = batches(index, plan, workers=workers)
        next(stream)
        stream.close()
        stream.close()
        assert list(stream) == []


def test_flipped_bits_in_images_are_caught(make_shards: MakeShards) -> None:
    root = make_shards([30])
    index, plan = open_all(root)
    table, path = index.table(0), root / "s-0000.tar"
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(50):
        row = rng.randrange(30)
        damaged = bytearray(whole)
        damaged[int(table.offset[row]) + rng.randrange(int(table.size[row]))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        where = f"shard s-0000.tar, byte {table.offset[row]}: sample '0-{row}' .*CRC"
        with pytest.raises(UserError, match=where):
            list(islice(batches(index, plan), 3))


def test_a_shard_cut_or_gone_while_training(make_shards: MakeShards) -> None:
    root = make_shards([30])
    index, plan = open_all(root)
    path = root / "s-0000.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="CRC"):
        list(islice(batches(index, plan), 3))
    path.unlink()
    with pytest.raises(UserError, match=r"s-0000.tar .* cannot be read: No such file"):
        next(batches(index, plan))


@pytest.mark.parametrize("workers", [0, 2])
def test_wrong_size_is_one_clear_message(make_shards: MakeShards, workers: int) -> None:
    index, plan = open_all(make_shards([30]))
    message = (
        rf"^shard s-0000.tar sample 0-\d+ is {SIZE}x{SIZE} but data.size=32; "
        r"run `shardgan prepare … --size 32`\.$"
    )
    with pytest.raises(UserError, match=message):
        next(batches(index, plan, size=32, workers=workers))
    with pytest.raises(UserError, match=message):
        check_images(index, Data(size=32, channels=1))
    check_images(index, Data(size=SIZE, channels=1))


def test_an_image_that_is_none(tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "x.tar", [("a.png", image_of(0, 0)[:40])])
    index, plan = open_all(tmp_path / "d")
    with pytest.raises(UserError, match=r"shard x.tar sample a cannot be decoded"):
        next(batches(index, plan))


def test_labels_that_are_not_there(make_shards: MakeShards, tmp_path: Path) -> None:
    index, plan = open_all(make_shards([30]))
    with pytest.raises(UserError, match="have no labels"):
        check_images(index, Data(size=SIZE, channels=1, conditional=True))
    with pytest.raises(UserError, match="has no label"):
        next(batches(index, plan, conditional=True))
    some = [("a.png", image_of(0, 0)), ("a.cls", b"3"), ("b.png", image_of(0, 1)), ("b.cls", b"cat")]
    write_tar(tmp_path / "d" / "x.tar", some)
    index, plan = open_all(tmp_path / "d")
    conditional = Data(size=SIZE, channels=1, conditional=True, max_bad=0)
    with pytest.raises(
        UserError, match=r"1 of the 2 samples has no label, .* shard x.tar: more than .*KEY.cls"
    ):
        check_images(index, conditional)
    check_images(index, replace(conditional, max_bad=1))
    said = remarks(index, replace(conditional, max_bad=1))
    assert said[0].startswith("warning: 1 of the 2 samples has no label, the first in shard x.tar.")
    stream = batches(index, plan, conditional=True, max_bad=1)
    seen = list(islice(stream, 2))
    assert all((batch.labels == 3).all() and set(ids(batch)) == {(0, 0)} for batch in seen)
    (named,) = {text for batch in seen for text in batch.bad}
    assert "sample b has no label" in named and named in seen[0].bad


def test_pickles_and_pipes_are_off() -> None:
    program = "import pipeline.data.stream, webdataset; assert webdataset.utils.enforce_security"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("sizes", [[10] * 20, [13, 57, 9]])
def test_label_frequencies_are_those_of_what_is_trained_on(make_shards: MakeShards, sizes: list[int]) -> None:
    index, plan = open_all(make_shards(sizes, classes=4), holdout=0.2)
    frequencies = label_frequencies(index, plan)
    labels = [(shard + row) % 4 for shard, row in plan.samples(0, plan.size).tolist()]
    assert frequencies.dtype == np.float64
    assert frequencies == pytest.approx(np.bincount(labels, minlength=4) / plan.size, abs=1e-12)
    assert label_frequencies(*open_all(make_shards([5], folder="unlabelled"))).shape == (0,)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 10])
def test_heldout_batches(make_shards: MakeShards, world: int, limit: int | None) -> None:
    index = load_index(str(make_shards([30, 40, 20], classes=3)))
    plan = Split(index.sizes, 1, 2, 0.3).heldout()
    ranks = [
        list(
            heldout_batches(
                index, plan, data_of(), batch=4, rank=rank, world=world, limit=limit, conditional=True
            )
        )
        for rank in range(world)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(batch.images.shape == (4, 1, SIZE, SIZE) for rank in ranks for batch, _ in rank)
    seen = [pair for rank in ranks for batch, valid in rank for pair in ids(batch)[:valid]]
    expected = [tuple(pair) for pair in plan.samples(0, plan.size if limit is None else limit).tolist()]
    assert sorted(seen) == sorted(expected)
    labels = [int(y) for rank in ranks for b, valid in rank for y in b.labels[:valid]]  # type: ignore[index]
    assert labels == [(shard + row) % 3 for shard, row in seen]


def test_a_window_of_many_shards_opens_each_once(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the process may have fewer files open than that: it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        index = load_index(str(make_shards([2] * 280)))
        opened: Counter[Path] = Counter()
        path = Index.path
        monkeypatch.setattr(Index, "path", lambda self, i: (opened.update([path(self, i)]), path(self, i))[1])
        reader = Reader(index, window=280)
        for row in range(2):
            for shard in range(280):
                reader.read(shard, row)
        reader.close()
        assert len(opened) == 280 and set(opened.values()) == {1}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
