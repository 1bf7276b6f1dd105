"""Shards from other hands: what is odd in them is passed over and counted, and the rest is trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset
from streams import BATCH, batches, data_of, ids, named, open_all
from tiny_shards import SIZE, MakeShards, Members, image_of, members_of, png, sample_of, write_tar

from pipeline.config import Data, UserError
from pipeline.data.check import MOST_EMPTY_CLASSES, check_images, remarks
from pipeline.data.index import load_index
from pipeline.data.plan import Split
from pipeline.data.prepare.shards import all_images
from pipeline.data.prepare.writer import Options, prepare
from pipeline.data.reader import Reader
from pipeline.data.stream import heldout_batches, label_frequencies

DATA = Data(size=SIZE, channels=1)
PICTURE = png(np.zeros((SIZE + 1, SIZE + 1), np.uint8))  # of another size


def failed(shard: int, rows: int) -> Members:
    """As downloaders leave it: every tenth sample has no image."""
    for row in range(rows):
        yield f"{row:05d}.json", b"{}"
        if row % 10 != 7:
            yield f"{row:05d}.png", image_of(shard, row)


def paired(shard: int, rows: int) -> Members:
    for row in range(rows):
        yield f"{row}.input.png", image_of(shard, row)
        yield f"{row}.target.png", image_of(shard, 100 + row)


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    for shard in range(2):
        write_tar(tmp_path / "d" / f"s-{shard}.tar", failed(shard, 30))
    return tmp_path / "d"


def test_failed_downloads_are_counted_and_every_image_is_trained_on(downloaded: Path) -> None:
    index, plan = open_all(downloaded)
    assert index.sizes == (27, 27)
    said = remarks(index, DATA)
    assert said == [
        "6 samples without an image skipped. The first: shard s-0.tar, byte 14336: sample '00007' has no "
        "image (png, jpg, jpeg, webp, npy), only json."
    ]
    entries = json.loads((downloaded / "index.json").read_text())["shardlist"]
    assert [(entry["nsamples"], entry["without_image"]) for entry in entries] == [(27, 3)] * 2
    assert all("unusable" not in entry for entry in entries)
    steps = 2 * plan.size // BATCH
    seen = [pair for batch in islice(batches(index, plan), steps) for pair in ids(batch)]
    expected = {(shard, row) for shard in range(2) for row in range(30) if row % 10 != 7}
    assert set(seen[: plan.size]) == expected == set(seen[plan.size : 2 * plan.size])
    later = load_index(str(downloaded))
    assert remarks(later, DATA) == said and later.fingerprint == index.fingerprint
    resumed = [p for batch in islice(batches(later, plan, start=4 * BATCH), 3) for p in ids(batch)]
    assert resumed == seen[4 * BATCH : 7 * BATCH]


def test_indices_of_sound_shards_say_nothing_of_it(make_shards: MakeShards) -> None:
    root = make_shards([3, 4], classes=2)
    index = load_index(str(root))
    assert remarks(index, replace(DATA, conditional=True)) == []
    assert "unusable" not in (root / "index.json").read_text()


def test_samples_without_an_image_may_be_half_of_all(tmp_path: Path) -> None:
    texts = [(f"t{row}.txt", b"") for row in range(3)]
    images = [(f"i{row}.png", image_of(0, row)) for row in range(3)]
    write_tar(tmp_path / "d" / "x.tar", texts + images)
    check_images(load_index(str(tmp_path / "d")), replace(DATA, max_bad=0))
    write_tar(tmp_path / "e" / "x.tar", texts + images[:2])
    with pytest.raises(
        UserError, match=r"3 samples in .* without an image, and only 2 with one.* sample 't0'"
    ):
        check_images(load_index(str(tmp_path / "e")), DATA)


def test_images_that_cannot_be_used_count_against_max_bad(tmp_path: Path) -> None:
    twice = [("b.png", image_of(0, 1)), ("b.jpg", image_of(0, 2))]
    write_tar(tmp_path / "d" / "x.tar", [("a.png", image_of(0, 0)), *twice, ("c.png", image_of(0, 3))])
    index, plan = open_all(tmp_path / "d")
    check_images(index, replace(DATA, max_bad=1))
    said = remarks(index, replace(DATA, max_bad=1))
    assert len(said) == 1 and said[0].startswith("1 sample with an image that cannot be used skipped")
    with pytest.raises(
        UserError, match=r"1 sample in .* more than data.max_bad=0.*'b' has 2 images .*prepare"
    ):
        check_images(index, replace(DATA, max_bad=0))
    assert set(ids(next(batches(index, plan)))) == {(0, 0), (0, 3)}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (list(paired(0, 3)), "no images .* of 3 samples.* '0' has 2 images .* first dot .*shardgan prepare"),
        ([("a.json", b"{}")], "no images .* of 1 sample\\..* 'a' has no image"),
        ([], "There are no samples"),
    ],
)
def test_nothing_can_be_used(tmp_path: Path, members: Members, message: str) -> None:
    write_tar(tmp_path / "d" / "x.tar", members)
    for _ in range(2):  # the second from index.json and the sidecars
        with pytest.raises(UserError, match=message):
            load_index(str(tmp_path / "d"))


def test_an_empty_shard_is_walked_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "x.tar", [])
    write_tar(tmp_path / "d" / "y.tar", [("a.png", image_of(0, 0))])
    index = load_index(str(tmp_path / "d"))
    (tmp_path / "d" / "x.tar").unlink()
    assert len(index.table(0)) == 0


def test_stages_get_an_image_under_its_own_extension(tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "x.tar", [("a.input.png", image_of(0, 0)), ("a.CLS", b" 3\n")])
    index, plan = open_all(tmp_path / "d")
    with_webdataset = next(iter(webdataset.WebDataset(str(tmp_path / "d" / "x.tar"), shardshuffle=False)))
    sample = Reader(index, 1).read(0, 0)
    assert sample["input.png"] == with_webdataset["input.png"] and sample["cls"] == b"3"
    assert set(sample) == {"__key__", "__url__", "input.png", "cls"}
    other = webdataset.map(lambda sample: sample | {"input.png": image_of(0, 9)})
    assert set(ids(next(batches(index, plan, stages=named(other))))) == {(0, 9)}
    png_wins = webdataset.map(lambda sample: sample | {"png": image_of(0, 8)})
    assert set(ids(next(batches(index, plan, stages=named(png_wins))))) == {(0, 8)}


@pytest.mark.parametrize(
    ("label", "word"), [(b"cat", "no label"), ("9", "has label 9; the .* labels end at 2"), (None, "no")]
)
def test_a_stage_that_gives_no_label_of_the_shards(make_shards: MakeShards, label: object, word: str) -> None:
    index, plan = open_all(make_shards([9], classes=3))
    changed = webdataset.map(lambda sample: sample | {"cls": label})
    with pytest.raises(UserError, match=word):
        next(batches(index, plan, conditional=True, stages=named(changed)))
    numbers = webdataset.map(lambda sample: sample | {"cls": np.int64(int(sample["cls"]))})
    assert next(batches(index, plan, conditional=True, stages=named(numbers))).labels is not None


def test_prepare_takes_every_image_of_samples_with_several(tmp_path: Path) -> None:
    members = [(f"22.{n:02d}.png", image_of(0, n)) for n in range(4)] + [
        ("22.01.cls", b"1"),
        ("22.02.cls", b"0"),
    ]
    members += [("a.png", image_of(0, 9)), ("a.jpg", image_of(0, 9)), ("b.photo.png", image_of(0, 10))]
    write_tar(tmp_path / "d" / "x.tar", members)
    write_tar(tmp_path / "d" / "y.tar", [("c.png", image_of(1, 0)), ("c.cls", b"1")])
    index = all_images(str(tmp_path / "d"))
    keys = [index.table(shard).key(row) for shard in range(2) for row in range(index.sizes[shard])]
    assert keys == ["22.00", "22.01", "22.02", "22.03", "b", "c"]
    assert index.table(0).label.tolist() == [-1, 1, 0, -1, -1] and index.passed_over("unusable").count == 1
    reader = Reader(index, 2)
    assert [reader.read(0, row)["png"] for row in range(4)] == [image_of(0, row) for row in range(4)]
    assert load_index(str(tmp_path / "d")).sizes == (1, 1), "for training nothing has changed"
    made = prepare(str(tmp_path / "d"), str(tmp_path / "out"), Options(), workers=1)
    assert made.num_samples == 6 and remarks(made, DATA) == []


def test_prepare_takes_shards_in_capitals(make_shards: MakeShards, tmp_path: Path) -> None:
    root = make_shards([2, 3])
    for shard in sorted(root.glob("*.tar")):
        shard.rename(shard.with_suffix(".TAR"))
    assert prepare(str(root), str(tmp_path / "out"), Options(size=SIZE), workers=1).num_samples == 5


def test_an_image_of_another_size_has_a_stand_in(tmp_path: Path) -> None:
    rows = [(f"{row}.png", PICTURE if row == 0 else image_of(0, row)) for row in range(8)]
    write_tar(tmp_path / "d" / "x.tar", rows)
    index, plan = open_all(tmp_path / "d")
    check_images(index, replace(DATA, max_bad=1))
    seen = list(islice(batches(index, plan, max_bad=1), 2))
    assert {row for batch in seen for _, row in ids(batch)} == set(range(1, 8))
    assert tuple(dict.fromkeys(text for batch in seen for text in batch.bad)) == (
        f"shard x.tar sample 0 is 5x5 but data.size={SIZE}; run `shardgan prepare … --size {SIZE}`.",
    )
    with pytest.raises(UserError, match="sample 0 is 5x5"):
        check_images(index, replace(DATA, max_bad=0))


def test_held_out_stand_ins_are_the_same_in_any_world(tmp_path: Path) -> None:
    for shard in range(3):
        bad = {(0, 1): b"no image", (1, 2): PICTURE}
        rows = [(f"{row}.png", bad.get((shard, row), image_of(shard, row))) for row in range(8)]
        write_tar(tmp_path / "d" / f"s-{shard}.tar", rows)
    index = load_index(str(tmp_path / "d"))
    plan = Split(index.sizes, 0, 3, 0.9).heldout()

    def read(world: int, max_bad: int) -> list[tuple[int, int]]:
        data = data_of(max_bad=max_bad)
        ranks = [
            list(heldout_batches(index, plan, data, batch=4, rank=rank, world=world)) for rank in range(world)
        ]
        bad = {text for rank in ranks for batch, _ in rank for text in batch.bad}
        assert len(bad) == 2 and all("0" in text or "1" in text for text in bad)
        return [
            sample_of(i) for step in zip(*ranks, strict=True) for b, n in step for i in b.images.numpy()[:n]
        ]

    planned = [tuple(pair) for pair in plan.samples(0, plan.size).tolist()]
    assert {(0, 1), (1, 2)} <= set(planned)
    alone = read(1, 2)
    assert [a == b for a, b in zip(alone, planned, strict=True)] == [
        p not in {(0, 1), (1, 2)} for p in planned
    ]
    assert read(2, 2) == alone
    with pytest.raises(UserError, match=r"2 held-out images .* data.max_bad=1.*(cannot be decoded|is 5x5)"):
        read(1, 1)
    shard = bytearray((tmp_path / "d" / "s-2.tar").read_bytes())
    shard[int(index.table(2).offset[planned[0][1] if planned[0][0] == 2 else 3]) + 20] ^= 4
    (tmp_path / "d" / "s-2.tar").write_bytes(shard)
    with pytest.raises(UserError, match=r"A held-out image cannot be used: .*wrong CRC"):
        read(1, 2)


def numbered(folder: Path, largest: int, classes: int = 4) -> Path:
    """40 images of so many classes, and one of class `largest`."""
    rows = [
        member
        for row in range(40)
        for member in (
            (f"{row}.png", image_of(0, row)),
            (f"{row}.cls", b"%d" % (largest if row == 3 else row % classes)),
        )
    ]
    return write_tar(folder / str(largest) / "x.tar", rows).parent


def test_classes_without_images(tmp_path: Path) -> None:
    conditional = replace(DATA, conditional=True)
    said = remarks(load_index(str(numbered(tmp_path, 20_000))), conditional)
    assert len(said) == 1 and "labels go up to 20,000, but only 5 of these classes have images" in said[0]
    assert remarks(load_index(str(numbered(tmp_path, 7))), conditional) == []  # 3 of 8 are empty
    check_images(load_index(str(numbered(tmp_path, MOST_EMPTY_CLASSES + 4))), conditional)
    for largest in (MOST_EMPTY_CLASSES + 5, 999_999):
        index = load_index(str(numbered(tmp_path, largest)))
        with pytest.raises(UserError, match=f"labels go up to {largest:,}, .* at most 100,000 may be empty"):
            check_images(index, conditional)
        check_images(index, DATA)


def test_label_frequencies_do_not_grow_with_shards_times_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of a few labels per shard, not of all there could be."""
    for shard in range(3):
        write_tar(
            tmp_path / "d" / f"s-{shard}.tar",
            [*members_of(shard, 8, 3), ("z.png", image_of(9, shard)), ("z.cls", b"999999")],
        )
    index, plan = open_all(tmp_path / "d", holdout=0.2)
    assert not plan.whole_shards
    monkeypatch.setattr(np, "bincount", lambda *_, **__: pytest.fail("as long as the largest label"))
    frequencies = label_frequencies(index, plan)
    assert frequencies.shape == (1_000_000,) and frequencies.sum() == pytest.approx(1)


def test_labels_among_held_out_images_only(tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "x.tar", [("a.png", image_of(0, 0)), ("a.cls", b"0")])
    write_tar(tmp_path / "d" / "y.tar", [("b.png", image_of(0, 0))])
    found = []
    for fold in (0, 1):
        index, plan = open_all(tmp_path / "d", folds=2, fold=fold)
        try:
            found.append(label_frequencies(index, plan).tolist())
        except UserError as error:
            found.append(str(error))
    assert [1.0] in found and any(
        "None of the images that are trained on has a label" in str(x) for x in found
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_images_than_a_batch(make_shards: MakeShards, rows: int) -> None:
    index, plan = open_all(make_shards([rows]))
    check_images(index, DATA)
    assert set(ids(next(batches(index, plan)))) == {(0, row) for row in range(rows)}
    with pytest.raises(UserError, match="Nothing can be held out of 1 samples"):
        Split((1,), 0, 1, 0.1).heldout()
