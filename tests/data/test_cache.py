"""data.cache=ram: the same batches, and nothing read or decoded twice on one machine."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from streams import batches
from tiny_shards import SIZE, MakeShards, image_of, write_tar

from pipeline import cgroups
from pipeline.config import UserError
from pipeline.data.cache import Cache, free_memory, reserve
from pipeline.data.index import Index, load_index
from pipeline.data.plan import Plan, Split
from pipeline.data.stream import TrainingBatches

BATCH = 6


def open_all(root: Path, holdout: float = 0.1) -> tuple[Index, Plan, Cache]:
    index = load_index(str(root))
    path, line = reserve(index.sizes, SIZE, 1)
    assert path is not None and "are kept in memory" in line
    return index, Split(index.sizes, 1, 2, holdout).training(), Cache(path, index.sizes, SIZE, 1)


def stream(index: Index, plan: Plan, cache: Cache | None, **changes: object) -> TrainingBatches:
    changes = {"batch_size": BATCH, "conditional": True, "xflip": True} | changes
    return batches(index, plan, **changes, cache=cache)


def taken(
    index: Index, plan: Plan, cache: Cache | None, steps: int, world: int = 1, **changes: object
) -> list[tuple[torch.Tensor, list[int]]]:
    """What all ranks together get, step by step."""
    ranks = [stream(index, plan, cache, rank=rank, world=world, **changes) for rank in range(world)]
    batches = [next(rank) for _ in range(steps) for rank in ranks]
    for rank in ranks:
        rank.close()
    return [(b.images.clone(), b.labels.tolist()) for b in batches]  # type: ignore[union-attr]


def same(a: list[tuple[torch.Tensor, list[int]]], b: list[tuple[torch.Tensor, list[int]]]) -> bool:
    images = torch.equal(torch.cat([i for i, _ in a]), torch.cat([i for i, _ in b]))
    return images and [x for _, labels in a for x in labels] == [x for _, labels in b for x in labels]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (3, 1)])
def test_the_same_batches_and_no_shard_after_the_first_epoch(
    make_shards: MakeShards, world: int, workers: int
) -> None:
    """The ranks share one cache; when the shards are gone, they and a resumed run go on without."""
    index, plan, cache = open_all(make_shards([20, 7, 33], classes=5))
    steps = 3 * plan.size // BATCH
    expected = taken(index, plan, None, steps)
    one_epoch = -(-plan.size // BATCH)
    assert same(taken(index, plan, cache, one_epoch, world, workers=workers), expected[:one_epoch])
    for shard in range(3):
        index.path(shard).unlink()
    assert same(taken(index, plan, cache, steps, world, workers=workers), expected)
    for resumed in (1, 4):
        later = taken(index, plan, cache, steps - resumed, world, workers=workers, start=resumed * BATCH)
        assert same(later, expected[resumed:])
    assert not any(cache.get(shard, row) for shard, row in _held_out(index, plan)), "only what is asked for"


def _held_out(index: Index, plan: Plan) -> set[tuple[int, int]]:
    every = {(shard, row) for shard, rows in enumerate(index.sizes) for row in range(rows)}
    held_out = every - {(s, r) for s, r in plan.samples(0, plan.size).tolist()}
    assert held_out
    return held_out


@pytest.mark.parametrize("workers", [0, 2])
def test_stand_ins_are_not_taken_for_the_image(tmp_path: Path, workers: int) -> None:
    """Each epoch chooses its own stand-ins, with a cache and without."""
    rows = [(f"{row}.png", image_of(0, row)[: 40 if row in (3, 7) else None]) for row in range(20)]
    members = [(f"{row}.cls", b"1") for row in range(20)]
    both = [m for pair in zip(members, rows, strict=True) for m in pair]
    index, plan, cache = open_all(write_tar(tmp_path / "d" / "x.tar", both).parent, holdout=0.0)
    expected = taken(index, plan, None, 12, max_bad=2)
    for _ in range(2):
        assert same(taken(index, plan, cache, 12, max_bad=2, workers=workers), expected)
    for cached in (None, cache):
        reals = stream(index, plan, cached, max_bad=2, workers=workers)
        named = [text for _ in range(12) for text in next(reals).bad]
        reals.close()
        assert len(set(named)) == 2


def test_what_is_kept_is_never_written_to(make_shards: MakeShards) -> None:
    """A mirrored image is turned in the batch, not in the cache; a batch in use is not one to come."""
    index, plan, cache = open_all(make_shards([30], classes=2))
    batches = stream(index, plan, cache)
    for _ in range(3 * plan.size // BATCH):
        next(batches).images.zero_()
    assert same(taken(index, plan, cache, 12), taken(index, plan, None, 12))


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_given_back_when_its_training_is_over(make_shards: MakeShards, workers: int) -> None:
    """A notebook trains again and again in one process, each time with memory of its own."""
    index, plan, cache = open_all(make_shards([20, 7], classes=5))
    taken(index, plan, cache, 2, workers=workers)
    path = cache.path
    assert Path(path).exists()
    del cache
    gc.collect()
    assert not Path(path).exists()


def _fill(cache: Cache, go: object) -> None:
    go.wait()  # type: ignore[attr-defined]
    for row in range(200):
        cache.put(1, row, torch.full((1, SIZE, SIZE), row % 251).numpy(), row)


def test_processes_put_and_get_at_once(tmp_path: Path) -> None:
    path, _ = reserve([10, 200], SIZE, 1)
    assert path is not None
    context, cache = multiprocessing.get_context("fork"), Cache(path, [10, 200], SIZE, 1)
    barrier = context.Barrier(3)
    others = [context.Process(target=_fill, args=(cache, barrier)) for _ in range(2)]
    for other in others:
        other.start()
    barrier.wait()
    seen = 0
    while seen < 200:
        found = cache.get(1, seen)
        if found is not None:
            assert (found[0] == seen % 251).all() and found[1] == seen
            seen += 1
        assert seen or found is not None or any(other.is_alive() for other in others)
    for other in others:
        other.join()
    assert all(cache.get(0, row) is None for row in range(10))
    again = pickle.loads(pickle.dumps(cache))  # as a fork server's workers get it
    assert again.get(1, 7)[1] == 7 and again.get(0, 7) is None


def test_no_room() -> None:
    assert 1 << 20 < free_memory() < 1 << 50
    path, line = reserve([10**9, 10**9], 256, 3)
    assert path is None
    assert line.startswith("data.cache=ram: 2,000,000,000 decoded images, 366,227.7 GiB")
    assert "do not fit into 75% of the free memory" in line and "decoded again" in line
    with pytest.raises(UserError, match=r"data.cache=ram: .*No such file"):
        Cache("/proc/0/fd/0", [1], SIZE, 1)


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """That of the group or of one above it; what was read from files and can be let go of is free."""
    root = tmp_path / "memory" if version == 1 else tmp_path
    limit, usage, idle = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    job = root / "slurm" / "job_7"
    job.mkdir(parents=True)
    for folder, most, used, files in [(job, "max", 5, 0), (job.parent, 10_000, 4_000, 1_000)]:
        (folder / limit).write_text(f"{most}\n")
        (folder / usage).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"cache 3\n{idle} {files}\n")
    own = tmp_path / "self"
    own.write_text(f"4:{'memory' if version == 1 else ''}:/slurm/job_7\n3:cpu:/slurm\n")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "_OWN", own)
    assert free_memory() == 7_000
