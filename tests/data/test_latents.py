"""Latents, `.npy` members in the shards: prepared as they are, streamed exactly, refused by name."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from streams import BATCH, batches, data_of, ids, open_all
from tiny_shards import contents, image_of, png, write_tar

from launch.prepare import prepare as command
from pipeline import config
from pipeline.config import UserError
from pipeline.data.cache import Cache, reserve
from pipeline.data.check import check_images
from pipeline.data.decode import BadImageError, decode_latent, dtype_of
from pipeline.data.index import Index, load_index
from pipeline.data.plan import Split
from pipeline.data.prepare.writer import Options, prepare
from pipeline.data.stream import heldout_batches

SHAPE = (5, 4, 4)  # channels that no image has
LATENTS = {"size": 4, "channels": 5}


def latent(shard: int, row: int, dtype: object = np.float16) -> np.ndarray:
    """Says by its first numbers which sample it is; the others are small, and exact in float16."""
    rng = np.random.default_rng([shard, row])
    array = (rng.integers(-2048, 2048, SHAPE) / 512).astype(dtype)
    array[0, 0, :2] = shard, row
    return array


def npy(array: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def stored(root: Path, sizes: tuple[int, ...] = (10, 7, 9), replaced: dict | None = None) -> Path:
    """Shards of latents: float16, float32 and Fortran's order in turn."""
    kinds = [lambda a: a, lambda a: a.astype(np.float32), np.asfortranarray]
    for shard, rows in enumerate(sizes):
        members = []
        for row in range(rows):
            data = (replaced or {}).get((shard, row)) or npy(kinds[row % 3](latent(shard, row)))
            members += [(f"{row}.cls", b"%d" % (row % 2)), (f"{row}.npy", data)]
        write_tar(root / f"s-{shard}.tar", members)
    return root


def sample_of(image: torch.Tensor) -> tuple[int, int]:
    return int(image[0, 0, 0]), int(image[0, 0, 1])


def is_as_stored(images: torch.Tensor) -> bool:
    """Every number of every latent, bit for bit."""
    whole = np.stack([latent(*sample_of(image), np.float32) for image in images])
    return images.dtype == torch.float32 and np.array_equal(images.numpy(), whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_the_numbers_of_the_shards(tmp_path: Path, workers: int) -> None:
    index, plan = open_all(stored(tmp_path / "d"))
    stream = batches(index, plan, workers=workers, conditional=True, **LATENTS)
    first = next(stream)
    assert first.images.shape == (BATCH, *SHAPE) and is_as_stored(first.images)
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert first.labels is not None
    assert first.labels.tolist() == [row % 2 for _, row in map(sample_of, first.images)]
    seen = [sample_of(image) for batch in (first, next(stream)) for image in batch.images]
    stream.close()
    assert len({*seen[: plan.size]}) == len(seen[: plan.size]), "each once per epoch"
    parts = [next(batches(index, plan, rank=rank, world=2, **LATENTS)).images for rank in range(2)]
    assert torch.equal(torch.cat(parts), first.images)


def test_the_order_is_that_of_images(tmp_path: Path) -> None:
    """Index and plan do not know what is in a member."""
    index, plan = open_all(stored(tmp_path / "d"))
    for shard, rows in enumerate((10, 7, 9)):
        pictures = [(f"{row}.png", image_of(shard, row)) for row in range(rows)]
        write_tar(tmp_path / "i" / f"s-{shard}.tar", pictures)
    theirs = next(batches(*open_all(tmp_path / "i")))
    assert [sample_of(i) for i in next(batches(index, plan, **LATENTS)).images] == ids(theirs)


def test_they_are_kept_in_memory(tmp_path: Path) -> None:
    index, plan = open_all(stored(tmp_path / "d"))
    form = (index.sizes, 4, 5, dtype_of(data_of(**LATENTS)))
    path, line = reserve(*form)
    assert path is not None and "26 decoded images, 8.35 KiB" in line  # 80 numbers of 4 bytes, label and flag
    cache = Cache(path, *form)
    plain, cached = (batches(index, plan, cache=c, **LATENTS) for c in (None, cache))
    for _ in range(4):
        assert torch.equal(next(plain).images, next(cached).images)
    found = cache.get(*plan.samples(0, 1)[0].tolist())
    assert found is not None and is_as_stored(torch.from_numpy(found[0])[None])


def test_held_out_ones(tmp_path: Path) -> None:
    index = load_index(str(stored(tmp_path / "d")))
    plan = Split(index.sizes, 1, 2, holdout=0.3).heldout()
    found = [
        batch.images[:valid] for batch, valid in heldout_batches(index, plan, data_of(**LATENTS), batch=4)
    ]
    images = torch.cat(found)
    assert len(images) == plan.size > 4 and is_as_stored(images)


NOT_FINITE = latent(0, 3)
NOT_FINITE[1, 1, 1] = np.inf


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.zeros((5, 4, 4))), "a .npy of float64 [5, 4, 4]; latents are float16 or float32"),
        (npy(np.zeros((5, 4, 4), ">f4")), "a .npy of >f4"),
        (npy(np.zeros((5, 4, 6), np.float32)), "[5, 4, 6]; latents are float16 or float32 [channels, size"),
        (npy(np.zeros((3, 3), np.float32)), "[3, 3]; latents are"),
        (npy(np.zeros((4, 4, 4), np.float32)), "of shape [4, 4, 4], not [data.channels, data.size, data."),
        (npy(np.array([[[print]]], object), allow_pickle=True), "a .npy of object; only plain numbers"),
        (npy(NOT_FINITE), "not finite"),
        (npy(latent(0, 3))[:-1], "bytes of numbers"),
        (b"\x93NUMPY\x01", "EOF"),
        (b"no array", "not a .npy array"),
    ],
)
def test_what_is_no_latent_is_named_and_replaced(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=re.escape(reason)):
        decode_latent(data, 4, 5)
    index, plan = open_all(stored(tmp_path / "d", replaced={(0, 3): data}))
    with pytest.raises(UserError, match=rf"shard s-0\.tar sample 3 cannot be decoded: .*{re.escape(reason)}"):
        [next(batches(index, plan, max_bad=0, **LATENTS)) for _ in range(3)]
    stream = batches(index, plan, max_bad=1, **LATENTS)
    found = [next(stream) for _ in range(3)]
    assert any(reason in line for batch in found for line in batch.bad)
    assert all(is_as_stored(batch.images) and (0, 3) not in map(sample_of, batch.images) for batch in found)


# Before training starts


def test_the_largest_value_is_told(tmp_path: Path) -> None:
    index = load_index(str(stored(tmp_path / "d", (2,))))
    assert check_images(index, data_of(**LATENTS)) == np.abs(latent(0, 0)).max() > 1


def test_images_where_latents_are_due_and_the_reverse(tmp_path: Path) -> None:
    index = load_index(str(stored(tmp_path / "d")))
    write_tar(tmp_path / "i" / "s.tar", [("a.png", image_of(0, 0)), ("a.npy", npy(latent(0, 0)))])
    write_tar(tmp_path / "m" / "0.tar", [("a.npy", npy(latent(0, 0)))])
    write_tar(tmp_path / "m" / "1.tar", [("a.png", png(np.zeros((3, 3), np.uint8)))])
    for max_bad in (0, 99):  # however many bad images are allowed: these are not bad
        with pytest.raises(UserError, match=r"sample 0 is a latent of 5 channels, .*data\.channels=5 and"):
            check_images(index, data_of(max_bad=max_bad))
        images, mixed = load_index(str(tmp_path / "i")), load_index(str(tmp_path / "m"))
        for other in (images, mixed):
            with pytest.raises(UserError, match=r"sample a is an image, and data\.channels=5 asks for lat"):
                check_images(other, data_of(max_bad=max_bad, **LATENTS))
    with pytest.raises(UserError, match=r"data\.decoder=a:B asks for latents"):
        check_images(images, data_of(decoder="a:B"))


def test_three_channels_are_latents_with_a_decoder(tmp_path: Path) -> None:
    array = np.linspace(-3, 3, 27, dtype=np.float32).reshape(3, 3, 3)
    write_tar(tmp_path / "d" / "s.tar", [("a.npy", npy(array))])
    index = load_index(str(tmp_path / "d"))
    assert check_images(index, data_of(size=3, channels=3, decoder="a:B")) == 3
    with pytest.raises(UserError, match="is a latent of 3 channels"):
        check_images(index, data_of(size=3, channels=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.xflip=true"], r"data\.xflip with data\.channels=4: a mirrored latent"),
        (["augment.ops=[flip,colour]", "augment.p=0.1"], r"augment\.ops: colour means nothing on latents"),
        (["score.metrics=[kid]"], r"score\.metrics: scores compare images"),
    ],
)
def test_settings_that_mean_nothing_on_latents(settings: list[str], message: str) -> None:
    common = ["data.train=x", "score.metrics=[]", *settings]
    config.load(None, common)
    with pytest.raises(UserError, match=message):
        config.load(None, [*common, "data.channels=4"])
    if "score.metrics=[kid]" in settings:
        assert config.load(None, [*common, "data.channels=4", "data.decoder=a:B"]).data.latents


# shardgan prepare


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """7 latents of cats and 5 of dogs, in two precisions."""
    for folder, count, dtype in (("cats", 7, np.float16), ("dogs", 5, np.float32)):
        (tmp_path / "arrays" / folder).mkdir(parents=True)
        for row in range(count):
            (tmp_path / "arrays" / folder / f"{row}.npy").write_bytes(npy(latent(count, row, dtype)))
    return tmp_path / "arrays"


def everything(index: Index) -> torch.Tensor:
    plan = Split(index.sizes, 0, 4).training()
    return next(batches(index, plan, batch_size=plan.size, **LATENTS)).images


def test_a_folder_of_arrays_is_passed_through(arrays: Path, tmp_path: Path) -> None:
    index = prepare(str(arrays), str(tmp_path / "out"), Options(per_shard=5), workers=2)
    assert index.classes == ("cats", "dogs") and index.sizes == (5, 5, 2)
    images = everything(index)
    assert is_as_stored(images)
    assert {*map(sample_of, images)} == {(count, row) for count in (7, 5) for row in range(count)}
    again = prepare(str(tmp_path / "out"), str(tmp_path / "again"), Options(per_shard=5), workers=1)
    assert is_as_stored(everything(again)) and again.num_samples == 12, "shards of arrays are a source too"
    prepare(str(arrays), str(tmp_path / "twice"), Options(per_shard=5), workers=1)
    first, second = contents(tmp_path / "out"), contents(tmp_path / "twice")
    assert first == second and "sources.txt" in first


def test_the_summary_says_how_to_train(arrays: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    done = CliRunner().invoke(command, [str(arrays), str(tmp_path / "out"), "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[1:] == [
        "  5x4x4: 7 latents in float16, 5 latents in float32",
        "  classes, from folders: 0 = cats (7), 1 = dogs (5)",
        f"  Next: shardgan train CONFIG data.train={tmp_path}/out data.size=4 data.channels=5 "
        "data.decoder=package.module:Class",
    ]


def test_bad_arrays_are_left_out_by_name(arrays: Path, tmp_path: Path) -> None:
    bad = {
        "float64": npy(np.zeros(SHAPE)),
        "infinite": npy(NOT_FINITE),
        "long": npy(latent(0, 0)) + b"x",
        "pickled": npy(np.array([[[print]]], object), allow_pickle=True),
        "picture": npy(np.zeros((3, 3, 3), np.uint8)),
        "wide": npy(np.zeros((5, 4, 6), np.float32)),
    }
    for name, data in bad.items():
        (arrays / "cats" / f"{name}.npy").write_bytes(data)
    index = prepare(str(arrays), str(tmp_path / "out"), Options(), workers=1)
    assert index.num_samples == 12 and is_as_stored(everything(index))
    skipped = (tmp_path / "out" / "skipped.txt").read_text()
    reasons = ("float64", "not finite", "bytes of numbers", "object", "an image among", "[5, 4, 6]")
    for name, reason in zip(bad, reasons, strict=True):
        assert re.search(rf"cats/{name}\.npy: .*{re.escape(reason)}", skipped), skipped


def test_what_cannot_be_prepared_as_latents(arrays: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a latent \[5, 4, 4\].* leave out --size and --channels"):
        prepare(str(arrays), str(tmp_path / "out"), Options(size=8, channels=3), workers=1)
    (arrays / "dogs" / "z.npy").write_bytes(npy(np.zeros((4, 4, 4), np.float16)))
    with pytest.raises(UserError, match=r"dogs/z\.npy is a latent \[4, 4, 4\], the first \[5, 4, 4\]"):
        prepare(str(arrays), str(tmp_path / "out"), Options(), workers=1)
    assert not (tmp_path / "out").exists()


def test_beside_images_arrays_are_left_out(arrays: Path, tmp_path: Path) -> None:
    (arrays / "cats" / "a.png").write_bytes(image_of(0, 0))
    (arrays / "dogs" / "a.png").write_bytes(image_of(0, 1))
    index = prepare(str(arrays), str(tmp_path / "out"), Options(), workers=1)
    assert index.num_samples == 2
    assert (tmp_path / "out" / "skipped.txt").read_text().count(".npy: not the name of an image") == 12
