"""`shardgan prepare` interrupted, or asked for something else: what is finished is kept, nothing is mixed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
from launching import run, shardgan
from no_flock import without_flock
from tiny_shards import MakeShards, contents, png

from pipeline import lock
from pipeline.config import UserError
from pipeline.data import sidecar
from pipeline.data.prepare import staging, writer
from pipeline.data.prepare.source import Resolved, Source
from pipeline.data.prepare.writer import Options, prepare
from pipeline.data.record import Shard

FASHION = Path(__file__).parents[1] / "assets" / "fashion-mnist-500"
FORK = multiprocessing.get_context("fork")


def fill_the_disk(source: Path, out: Path, per_shard: int, said: multiprocessing.Queue) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # writing more fails, as on a full disk
    try:
        prepare(str(source), str(out), Options(size=200, per_shard=per_shard), workers=1)
    except UserError as error:
        said.put(str(error))


def test_a_full_disk(tmp_path: Path) -> None:
    """It leaves no half shard. What was finished before stays, and is not made again when there is room."""
    (tmp_path / "in").mkdir()
    for i in range(12):  # one of them does not compress
        pixels = np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8) * (i == 7)
        (tmp_path / "in" / f"{i:02}.png").write_bytes(png(pixels.astype(np.uint8)))
    some, none = str(tmp_path / "some"), str(tmp_path / "none")
    queue, messages = FORK.Queue(), []
    for out, per_shard in [(none, 100), (some, 4)]:
        process = FORK.Process(target=fill_the_disk, args=(tmp_path / "in", out, per_shard, queue))
        process.start()
        messages.append(queue.get(timeout=60))
        process.join()
    first, second = messages
    assert first.startswith(f"No space left for {none}") and "Nothing was kept" in first
    assert second.startswith(f"No space left for {some}") and "finished shard" in second
    assert sorted(path.name for path in tmp_path.iterdir()) == [".some.partial", "in"]
    kept = contents(tmp_path / ".some.partial")
    assert len(kept) in (1, 2)
    said: list[str] = []
    prepare(str(tmp_path / "in"), some, Options(size=200, per_shard=4), workers=1, announce=said.append)
    assert f"{len(kept)} of 3 shards are there from an earlier try" in said[0]
    prepare(str(tmp_path / "in"), none, Options(size=200, per_shard=4), workers=1)
    assert contents(tmp_path / "some") == contents(tmp_path / "none")
    assert contents(tmp_path / "some").items() >= kept.items()
    assert {path.name for path in (tmp_path / "some").iterdir() if path.is_dir()} == {".shardgan"}


def test_killed_and_started_again(pictures: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as some shards are there, twice; then a damaged one of them; the end is the same."""
    for i in range(200):
        shutil.copy(pictures / "dogs" / "0.png", pictures / "dogs" / f"more-{i}.png")
    (pictures / "cats" / "bad.png").write_bytes(b"no image")
    partial, options = tmp_path / ".out.partial", Options(size=32, per_shard=1)
    for wanted in (3, 12):
        process = FORK.Process(
            target=prepare, args=(str(pictures), str(tmp_path / "out"), options), kwargs={"workers": 2}
        )
        process.start()
        while len(list(partial.glob(".progress/*.json"))) < wanted:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
    assert not (tmp_path / "out").exists()
    damaged = min(partial.glob("shard-*.tar"))
    before = {path.name: path.stat().st_ino for path in partial.glob("shard-*.tar")}
    damaged.write_bytes(damaged.read_bytes()[:-512])
    said: list[str] = []
    prepare(str(pictures), str(tmp_path / "out"), options, announce=said.append)
    assert "shards are there from an earlier try" in said[0]
    prepare(str(pictures), str(tmp_path / "whole"), options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("shard-*.tar")}
    assert sum(before[name] == after[name] for name in before) >= 11


def test_where_processes_may_not_be_started(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    """Those that were started end, and what an earlier try has made is kept."""
    partial, options = tmp_path / ".out.partial", Options(size=8, per_shard=5)
    others = multiprocessing.active_children()
    with monkeypatch.context() as broken:
        broken.setattr(writer, "publish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(str(pictures), str(tmp_path / "out"), options, workers=1)
    before = {path.name: path.stat().st_ino for path in partial.glob("*.tar")}
    for name in sorted(before)[:2]:
        (partial / name).unlink()
    fork, forks = os.fork, iter(range(9))

    def first_alone() -> int:
        if next(forks):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    with monkeypatch.context() as broken:
        broken.setattr(os, "fork", first_alone)
        with pytest.raises(
            UserError, match=r"^2 processes cannot be started here \(.*unavailable\)\..* fewer"
        ):
            prepare(str(pictures), str(tmp_path / "out"), options, workers=2)
    for child in {*multiprocessing.active_children()} - {*others}:
        child.join(9)
        assert child.exitcode == -9
    prepare(str(pictures), str(tmp_path / "out"), options, workers=2)
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert len(after) > 2 and before.keys() == after.keys()
    assert all(before[name] == after[name] for name in sorted(before)[2:])


@pytest.mark.parametrize("size", [8, 4])
def test_another_that_ends_while_this_one_lists_its_images(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The same command finds its shards there; one of other options is refused."""
    out, resolve, others = tmp_path / "out", writer.resolve, [Options(size=8)]

    def made_before(images: Source, options: Options) -> Resolved:
        if others:
            prepare(str(pictures), str(out), others.pop(), workers=1)
        return resolve(images, options)

    monkeypatch.setattr(writer, "resolve", made_before)
    said: list[str] = []
    if size == 8:
        prepare(str(pictures), str(out), Options(size=8), workers=1, announce=said.append)
        assert said == [f"{out} is there already, made by the same command; remove it to make it again."]
    else:
        with pytest.raises(UserError, match=r"is there already\. Give the name of a new"):
            prepare(str(pictures), str(out), Options(size=4), workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]


def test_other_images_or_options_start_anew(pictures: Path, tmp_path: Path) -> None:
    """What an earlier try left is of use only to the same command on the same files."""
    partial = tmp_path / ".out.partial"
    for change in ("options", "images"):
        prepare(str(pictures), str(tmp_path / "out"), Options(size=8, per_shard=2), workers=1)
        recipe = json.dumps([{"source": "pictures"}, "another"])
        (tmp_path / "out").rename(partial)
        (partial / ".progress").mkdir()
        (partial / ".progress" / "recipe").write_text(recipe)
        (partial / ".progress" / "0.json").write_text("{}")
        said: list[str] = []
        index = prepare(
            str(pictures), str(tmp_path / "out"), Options(size=4, per_shard=9), announce=said.append
        )
        assert index.sizes == (9, 3) and not said, change
        shutil.rmtree(tmp_path / "out")


def test_leftovers_of_a_killed_run_do_not_matter(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / ".shardgan").mkdir(parents=True)
    (tmp_path / ".out.partial" / "shard-000099.tar").write_bytes(b"half")
    (tmp_path / "out").mkdir()
    assert prepare(str(pictures), str(tmp_path / "out"), Options(size=8), workers=1).num_samples == 12
    assert not (tmp_path / ".out.partial").exists()


def test_images_of_another_folder_of_that_name(pictures: Path, tmp_path: Path) -> None:
    """They are not what is there already; the same folder by another path is, and an exact copy of it."""
    other = tmp_path / "other" / "pictures"
    shutil.copytree(pictures, other)
    (tmp_path / "link").symlink_to(pictures)
    out = str(tmp_path / "out")
    index = prepare(str(pictures), out, Options(size=8), workers=1)
    assert json.loads((tmp_path / "out" / "index.json").read_text())["prepared"]["path"]
    assert str(pictures) not in (tmp_path / "out" / "index.json").read_text()
    assert prepare(str(tmp_path / "link"), out, Options(size=8), workers=1) == index
    assert prepare(str(other), out, Options(size=8), workers=1) == index
    shutil.copy(other / "cats" / "0.png", other / "cats" / "new.png")
    with pytest.raises(UserError, match="Give the name of a new folder"):
        prepare(str(other), out, Options(size=8), workers=1)


def test_what_an_older_version_made_is_there_already(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = prepare(str(pictures), str(out), Options(size=8), workers=1)
    record = json.loads((out / "index.json").read_text())
    del record["prepared"]["path"]
    (out / "index.json").write_text(json.dumps(record))
    assert prepare(str(pictures), str(out), Options(size=8), workers=1) == index


def try_to_prepare(pictures: Path, out: Path, said: multiprocessing.Queue) -> None:
    try:
        prepare(str(pictures), str(out), Options(size=32, per_shard=1), workers=1)
    except UserError as error:
        said.put(str(error))
    else:
        said.put("made")


def begun(pictures: Path, out: Path, said: multiprocessing.Queue, go: Event) -> list[psutil.Process]:
    """The processes of one that has recorded a shard and writes no other until `go` is set."""

    def record(*arguments: Any) -> None:
        staging.record(*arguments)
        go.wait()

    process = FORK.Process(target=try_to_prepare, args=(pictures, out, said))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "record", record)
        process.start()
    while not list(out.with_name(f".{out.name}.partial").glob(".progress/*.json")):
        assert process.is_alive()
        time.sleep(0.001)
    one = psutil.Process(process.pid)
    return [one, *one.children()]


def test_of_two_one_is_refused_and_the_other_goes_on(pictures: Path, tmp_path: Path) -> None:
    said, go = FORK.Queue(), FORK.Event()
    first, *_ = begun(pictures, tmp_path / "out", said, go)
    try:
        with pytest.raises(
            UserError, match=rf"Another `shardgan prepare` is writing .*/out .* pid {first.pid} "
        ):
            prepare(str(pictures), str(tmp_path / "out"), Options(size=32, per_shard=1), workers=1)
    finally:
        go.set()
    assert said.get(timeout=60) == "made"
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "out").glob(".lock*"))


def test_one_that_was_suspended_leaves_the_shards_to_the_other(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.5)
    said, go = FORK.Queue(), FORK.Event()
    processes = begun(pictures, tmp_path / "out", said, go)
    for process in processes:
        process.suspend()
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):  # not at once, if busy
            time.sleep(0.001)
    try:
        prepare(str(pictures), str(tmp_path / "out"), Options(size=32, per_shard=1), workers=1)
        made = contents(tmp_path / "out")
    finally:
        for process in processes:
            process.resume()
        go.set()
    assert ".out.partial was removed" in said.get(timeout=60)
    assert contents(tmp_path / "out") == made and not list(tmp_path.glob(".*"))


def test_what_is_recorded_makes_no_folder_that_another_process_removed(tmp_path, monkeypatch):
    """As when this process was suspended just before it writes."""
    folder = tmp_path / ".out.partial"
    monkeypatch.setattr(staging, "_lock", SimpleNamespace(check=lambda: None))
    with pytest.raises(FileNotFoundError):
        staging.record(folder, 0, staging.Written(Shard("0.tar", 1, 1, "", {}), (), {}))
    table = sidecar.scan(FASHION / "shard-000000.tar", "shard-000000.tar")
    with pytest.raises(FileNotFoundError):
        sidecar.save(table, folder / "0.idx", make_folder=False)
    assert not folder.exists()


def test_a_file_system_without_flock(pictures: Path, tmp_path: Path) -> None:
    ended = run(shardgan("prepare", str(pictures), "out", "--size", "8"), tmp_path, **without_flock(tmp_path))
    assert ended.status == 0 and (tmp_path / "out" / "index.json").exists(), ended.output


def as_zip(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def test_a_changed_source(pictures: Path, tmp_path: Path) -> None:
    """What is there was made of other images, and the same command says so, of a folder and of a zip."""
    for kind in ("folder", "zip"):
        out = tmp_path / kind

        def again(kind: str = kind, out: Path = out) -> list[str]:
            said: list[str] = []
            source = as_zip(pictures) if kind == "zip" else pictures
            prepare(str(source), str(out), Options(size=8), workers=1, announce=said.append)
            return said

        again()
        before = contents(out)
        assert "made by the same command" in again()[0]
        (pictures / "cats" / "notes.txt").write_text("no image: nothing changes")
        assert "made by the same command" in again()[0]
        for number in range(3):
            shutil.copy(pictures / "cats" / "0.png", pictures / "cats" / f"new-{number}.png")
        with pytest.raises(
            UserError, match=r"has 3 images more than when it was made\. Remove that folder, or"
        ):
            again()
        for number in range(3):
            (pictures / "cats" / f"new-{number}.png").unlink()
        assert "made by the same command" in again()[0]
        shutil.move(pictures / "cats" / "0.png", tmp_path / "0.png")
        with pytest.raises(UserError, match="has 1 image fewer"):
            again()
        shutil.copy(pictures / "cats" / "1.png", pictures / "cats" / "0.png")
        with pytest.raises(UserError, match=r"the images of .* have other names, sizes, times or labels"):
            again()
        shutil.move(tmp_path / "0.png", pictures / "cats" / "0.png")
        assert "made by the same command" in again()[0] and contents(out) == before


def test_changed_labels(pictures: Path, tmp_path: Path) -> None:
    names = [f"{folder}/{n}.png" for folder, count in (("cats", 7), ("dogs", 5)) for n in range(count)]
    for shift in (0, 1):
        labels = [[name, (i + shift) % 3] for i, name in enumerate(names)]
        (pictures / "dataset.json").write_text(json.dumps({"labels": labels}))
        if not shift:
            prepare(str(pictures), str(tmp_path / "out"), Options(size=8), workers=1)
    with pytest.raises(UserError, match="other names, sizes, times or labels"):
        prepare(str(pictures), str(tmp_path / "out"), Options(size=8), workers=1)


def test_changed_shards(make_shards: MakeShards, tmp_path: Path) -> None:
    root = make_shards([3, 2])
    prepare(str(root), str(tmp_path / "out"), Options(), workers=1)
    prepare(str(root), str(tmp_path / "out"), Options(), workers=1)
    (root / "index.json").unlink()
    make_shards([3, 2, 4])
    with pytest.raises(UserError, match="has 4 images more than when it was made"):
        prepare(str(root), str(tmp_path / "out"), Options(), workers=1)


def test_a_source_that_moved_or_is_gone(pictures: Path, tmp_path: Path) -> None:
    """Shards of images that have been put elsewhere, or deleted since, are as good as before."""
    out, moved = str(tmp_path / "out"), tmp_path / "moved"
    index = prepare(str(pictures), out, Options(size=8), workers=1)
    pictures.rename(moved)
    assert prepare(str(moved), out, Options(size=8), workers=1) == index
    assert prepare(str(pictures), out, Options(size=8), workers=1) == index
    with pytest.raises(UserError, match="There is no folder, zip"):
        prepare(str(tmp_path / "never"), out, Options(size=8), workers=1)
    (moved / "cats" / "0.png").unlink()
    with pytest.raises(UserError, match="Give the name of a new folder"):
        prepare(str(moved), out, Options(size=8), workers=1)


def test_older_versions_kept_no_files_of_the_source(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = prepare(str(pictures), str(out), Options(size=8), workers=1)
    record = json.loads((out / "index.json").read_text())
    del record["source"], record["prepared"]["background"]
    (out / "index.json").write_text(json.dumps(record))
    (pictures / "cats" / "0.png").unlink()
    assert prepare(str(pictures), str(out), Options(size=8), workers=1) == index


def test_shards_inside_their_source(pictures: Path) -> None:
    """They are no part of it the next time."""
    out = pictures / "shards"
    for _ in range(2):
        index = prepare(str(pictures), str(out), Options(size=8), workers=1)
        assert index.num_samples == 12 and not (out / "skipped.txt").exists()
