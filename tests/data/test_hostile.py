"""Shards made to do harm: nothing in them is executed, memory stays bounded, one line says what is wrong."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from streams import data_of
from tiny_shards import SIZE, image_of, sample_of, write_tar
from webdataset.autodecode import DecodingError

from pipeline.config import Data, UserError
from pipeline.data import sidecar, tar
from pipeline.data.index import load_index
from pipeline.data.plan import Split
from pipeline.data.prepare.writer import Options, prepare
from pipeline.data.stages import PlannedSamples
from pipeline.data.stream import check_images, training_batches

MOST = 300 << 20  # bytes that any of this may take, the largest member (64 MiB) and its copies included
PNG = image_of(0, 0)


class Execute:
    """Unpickled, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def bomb_png(width: int, rows: int, row: int, extra: bytes = b"") -> bytes:
    """A grey PNG that says it is width x width, and holds so many rows of so many bytes."""
    pack = zlib.compressobj(1)
    data = b"".join(pack.compress(bytes(row)) for _ in range(rows)) + pack.flush()
    header = chunk(b"IHDR", width.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def use(train: str) -> list[tuple[int, int]]:
    """Index, check, one epoch of training: which samples came."""
    index = load_index(train)
    check_images(index, Data(size=SIZE, channels=1))
    plan = Split(index.sizes, 0, 2).training()
    batches = training_batches(index, plan, data_of(batch_size=1))
    return [sample_of(batch.images.numpy()) for batch in islice(batches, plan.size)]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npy_header(*shape: int) -> bytes:
    text = repr({"descr": "<i8", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def lies() -> dict[str, bytes]:
    """Small files that say they are large, of the formats that only `prepare` reads."""
    found = {}
    for name in ("a.gif", "a.jp2", "a.avif", "a.bmp"):
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, Image.registered_extensions()[name[1:]])
        found[name] = bytearray(file.getvalue())
    found["a.gif"][6:10] = (65535).to_bytes(2, "little") * 2
    found["a.bmp"][18:26] = (60_000).to_bytes(4, "little") * 2
    jp2, size = found["a.jp2"], (8192).to_bytes(4, "big") * 2
    at, box = jp2.index(b"\xff\x51"), jp2.index(b"ihdr")
    jp2[at + 6 : at + 14] = jp2[at + 22 : at + 30] = jp2[box + 4 : box + 12] = size
    at = found["a.avif"].index(b"ispe") + 8
    found["a.avif"][at : at + 8] = size
    tile, data = zlib.compressobj(1), bytes(1 << 20)
    body = b"".join(tile.compress(data) for _ in range(1 << 8)) + tile.flush()  # 16,384 x 16,384 of grey
    small, large = dict.fromkeys((256, 257), 64), dict.fromkeys((322, 323), 16384)  # image and tile
    tags = small | {258: 8, 259: 8, 262: 1, 277: 1} | large | {324: 200, 325: len(body)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    found["a.tif"] = bytearray(head.ljust(200, b"\0") + body)
    found["a.ppm"] = bytearray(b"P6 99999999 99999999 255\n")
    return {name: bytes(data) for name, data in found.items()}


def corpus(folder: Path, canary: Path) -> dict[str, tuple[Callable[[], object], str | None]]:
    """What is done → how, and the one line that is due; None if it does no harm."""
    evil = pickle.dumps(Execute(canary))
    text_bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20)))
    ztxt_png = PNG[:33] + text_bomb + PNG[33:]
    huge, wide = bomb_png(30_000, 30_000, 30_001), io.BytesIO()
    Image.new("L", (8, 8)).save(wide, "JPEG")
    jpeg = bytearray(wide.getvalue())
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = (65500).to_bytes(2, "big") * 2
    shards = {
        "pickles beside": ([("a.png", PNG), ("a.pyd", evil), ("a.pkl", evil), ("a.pickle", evil)], None),
        "pickle as image": ([("a.npy", evil)], "cannot be decoded"),
        "pickled array": ([("a.npy", npy(np.array([Execute(canary)], object)))], "of object"),
        "pickle as label": ([("a.png", PNG), ("a.cls", evil)], None),
        "torch file": ([("a.png", PNG), ("a.pth", evil), ("a.pt", evil)], None),
        "30,000 x 30,000": ([("a.png", huge)], "30000x30000|decompression bomb"),
        "says 4x4": ([("a.png", bomb_png(4, 3_000, 30_001))], None),
        "text": ([("a.png", ztxt_png)], "Decompressed data too large|cannot be decoded"),
        "jpeg 65,500 x 65,500": ([("a.jpg", bytes(jpeg))], "65500x65500|cannot be decoded"),
        "array of terabytes": (
            [("a.npy", npy_header(1 << 20, 1 << 20))],
            "cannot be decoded|1048576x1048576",
        ),
        "outside": ([("../../x.png", PNG), ("/etc/x.png", image_of(0, 1)), ("a\0b.png", PNG)], None),
        "image of 65 MiB": ([("a.png", bytes(65 << 20))], "larger than 64 MiB"),
        "65 MiB beside": ([("a.png", PNG), ("a.txt", bytes(65 << 20))], None),
        "shell": ([("a;touch x.png", PNG), ("$(touch y).png", image_of(0, 1)), ("| touch z.png", PNG)], None),
    }
    cases: dict[str, tuple[Callable[[], object], str | None]] = {}
    for name, (members, message) in shards.items():
        root = folder / name.replace("/", "-").replace(" ", "-")
        write_tar(root / "s.tar", members, tarfile.GNU_FORMAT)
        cases[name] = (lambda root=root: use(str(root)), message)
    pipe = f"pipe:mkdir {canary}"
    listed = folder / "listed"
    write_tar(listed / "s.tar", [("a.png", PNG)])
    (listed / "index.json").write_text(json.dumps({"shardlist": [{"url": pipe}]}))
    cases["pipe in index.json"] = (lambda: use(str(listed)), "not list|missing|not the name of a shard")
    cases["pipe as data.train"] = (lambda: use(pipe), "not on this machine|pipe")
    cases["pipe in a brace list"] = (lambda: use(f"{{{pipe},x.tar}}"), "missing|pipe|no shards")
    cases["pipe to prepare"] = (lambda: prepare(pipe, str(folder / "o1"), Options(), workers=1), "no folder")
    (folder / "huge").mkdir()
    (folder / "huge" / "a.png").write_bytes(huge)
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("a.png", "w") as member:
            for _ in range(400):
                member.write(bytes(1 << 20))
        file.writestr("../../b.png", bomb_png(30_000, 10, 30_001))
    (folder / "lies").mkdir()
    for name, data in lies().items():
        (folder / "lies" / name).write_bytes(data)
    for source in ("huge", "bomb.zip", "lies"):
        out = str(folder / f"{source}-out")
        action = lambda source=source, out=out: prepare(  # noqa: E731
            str(folder / source), out, Options(size=8), workers=1
        )
        cases[f"prepare {source}"] = (action, "None of the . images")
    return cases


def run(cases: dict[str, tuple[Callable[[], object], str | None]], answers: multiprocessing.Queue) -> None:
    for name, (action, _) in cases.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            action()
            said = None
        except UserError as error:
            said = str(error)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # The second: of the processes of `prepare`, which begin with what this one has.
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - after
        answers.put((name, said, (after - before) * 1024, children * 1024))


def test_corpus(tmp_path: Path) -> None:
    """In a process of its own, whose memory is looked at after each."""
    folder, canary = tmp_path / "x" / "y", tmp_path / "canary"
    folder.mkdir(parents=True)
    cases = corpus(folder, canary)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=run, args=(cases, answers))
    process.start()
    for _ in cases:
        name, said, grown, children = answers.get(timeout=120)
        message = cases[name][1]
        assert (said is None) == (message is None), (name, said)
        if said is not None and message is not None:
            assert re.search(message, said) and "\n" not in said, (name, said)
        assert grown < MOST and children < MOST, (name, grown, children)
        print(f"{name}: {grown >> 20} MiB, {said}")
    process.join()
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "nothing was executed or unpacked"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["y"]


def test_webdataset_reads_no_pickles_here(tmp_path: Path) -> None:
    """What a user's own stages are handed has none, and webdataset's decoder, called on all, refuses them."""
    evil = pickle.dumps(Execute(tmp_path / "canary"))
    path = write_tar(tmp_path / "d" / "s.tar", [("a.png", PNG), ("a.pyd", evil), ("a.pkl", evil)])
    index = load_index(str(path.parent))
    plan = Split(index.sizes, 0, 2).training()
    sample = next(iter(PlannedSamples(index, plan, 0, 1, 0, 1)()))
    assert set(sample) == {"__key__", "__url__", "png"}
    with pytest.raises(DecodingError):
        next(iter(webdataset.WebDataset(str(path), shardshuffle=False).decode()))
    assert not (tmp_path / "canary").exists()


def test_a_sidecar_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    """It may have come with the shards, from anyone: it is built anew instead."""
    path = write_tar(tmp_path / "d" / "s.tar", [("a.png", PNG)])
    load_index(str(path.parent))
    place = tmp_path / "d" / ".shardgan" / "s.tar.npz"
    table = sidecar.load(place)
    assert table is not None
    for kind, body in [
        (zipfile.ZIP_DEFLATED, npy_header(1 << 28)),
        (zipfile.ZIP_STORED, npy_header(1 << 45)),
    ]:
        with zipfile.ZipFile(place, "r") as old:
            entries = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(tmp_path / "bomb.npz", "w", kind, compresslevel=1) as new:
            for name, data in entries.items():
                with new.open(name, "w") as file:
                    file.write(body if name == "names.npy" else data)
                    for _ in range(200 if name == "names.npy" and kind == zipfile.ZIP_DEFLATED else 0):
                        file.write(bytes(1 << 20))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert sidecar.load(tmp_path / "bomb.npz") is None
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 50 << 20


def test_more_members_than_a_shard_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers of folders, of names, of nothing: all count, and the walk ends at the limit."""
    monkeypatch.setattr(tar, "MOST_HEADERS", 1000)
    folder = tarfile.TarInfo("x")
    folder.type = tarfile.DIRTYPE
    pax = tarfile.TarInfo("x")
    pax.type = tarfile.XHDTYPE
    for info in (folder, pax, tarfile.TarInfo("x.png"), tarfile.TarInfo("")):
        (tmp_path / "s.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) * 1002 + bytes(1024))
        with pytest.raises(
            UserError, match=r"shard s.tar, byte \d+: (more than 1,000 members|.* there twice)"
        ):
            sidecar.scan(tmp_path / "s.tar", "s.tar")


def test_damage_after_indexing_is_caught_or_harmless(tmp_path: Path) -> None:
    """Every block zeroed, bits turned over, every cut: the right images, or one line about the shard."""
    names = [(f"{row}.png", image_of(0, row)) for row in range(6)]
    path = write_tar(tmp_path / "d" / "s.tar", names)
    index = load_index(str(path.parent))
    plan = Split(index.sizes, 0, 2).training()
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    images = [slice(o, o + n) for o, n in zip(index.table(0).offset, index.table(0).size, strict=True)]
    inside = [at for image in images for at in range(image.start, image.stop)]
    damages = [(at, whole[:at] + bytes(512) + whole[at + 512 :]) for at in range(0, len(whole), 512)]
    damages += [(at, whole[:at]) for at in range(0, len(whole), 512)]
    for at in (*rng.integers(0, len(whole), 100).tolist(), *rng.choice(inside, 100).tolist()):
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        damages.append((at, bytes(data)))
    caught = 0
    for _, data in damages:
        path.write_bytes(data)
        hurt = any(data[image] != whole[image] for image in images)
        source = PlannedSamples(index, plan, 0, 1, 0, 1)()
        if hurt:
            caught += 1
            with pytest.raises(UserError, match=r"^shard s\.tar, byte \d+: sample '\d' .*CRC"):
                list(islice(source, plan.size))
        else:
            assert sorted(s["png"] for s in islice(source, plan.size)) == sorted(d for _, d in names)
        if len(data) != len(whole):
            with pytest.raises(UserError, match=r"s\.tar .* has \d+ bytes, not the \d+"):
                load_index(str(path.parent))
    assert 100 < caught < len(damages) - 50
