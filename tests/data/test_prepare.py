"""`shardgan prepare`: the same bytes each time, readable by anyone, whole or not there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from click.testing import CliRunner
from conftest import MakeShards
from PIL import Image
from tiny_shards import png

from launch.prepare import prepare as command
from pipeline.config import UserError
from pipeline.data.index import load_index
from pipeline.data.plan import training_plan
from pipeline.data.prepare import Options, prepare
from pipeline.data.stream import training_batches

ASSETS = Path(__file__).parents[1] / "assets" / "fashion-mnist-500"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """cats: 7 grey ones of 10x10, dogs: 5 of 12x8 in colour."""
    rng = np.random.default_rng(0)
    for folder, count, shape in [("cats", 7, (10, 10)), ("dogs", 5, (8, 12, 3))]:
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        for i in range(count):
            path = tmp_path / "pictures" / folder / f"{i}.png"
            path.write_bytes(png(rng.integers(0, 256, shape, dtype=np.uint8)))
    return tmp_path / "pictures"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def images(folder: Path, size: int, channels: int) -> np.ndarray:
    index = load_index(str(folder))
    plan = training_plan(index.sizes, 0, 4, 0.0, None, 0)
    stream = training_batches(
        index,
        plan,
        start=0,
        batch_size=plan.size,
        rank=0,
        world=1,
        size=size,
        channels=channels,
        conditional=False,
        workers=0,
    )
    return next(stream).images.numpy()


def test_the_same_bytes_each_time(pictures: Path, tmp_path: Path) -> None:
    options = Options(size=8, per_shard=5)
    for name, workers in [("a", 1), ("b", 3)]:
        prepare(str(pictures), str(tmp_path / name), options, workers=workers)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert list(a) == ["index.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert a == b
    assert (
        hashlib.sha256(a["shard-000001.tar"]).hexdigest()
        == json.loads(a["index.json"])["shardlist"][1]["sha256"]
    )


def test_folders_are_classes(pictures: Path, tmp_path: Path) -> None:
    index = prepare(str(pictures), str(tmp_path / "out"), Options(size=8, per_shard=5), workers=1)
    assert index.classes == ("cats", "dogs") and index.sizes == (5, 5, 2)
    assert sum(shard.labels.get(0, 0) for shard in index.shards) == 7
    assert len(index.shards[0].labels) == 2, "classes are mixed in a shard"
    assert index == load_index(str(tmp_path / "out"))


def test_plain_webdataset_reads_them(pictures: Path, tmp_path: Path) -> None:
    prepare(str(pictures), str(tmp_path / "out"), Options(size=8, per_shard=5), workers=1)
    url = f"{tmp_path}/out/shard-{{000000..000002}}.tar"
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("pil"))
    assert len(samples) == 12 and len({sample["__key__"] for sample in samples}) == 12
    assert all(sample["png"].size == (8, 8) and sample["cls"] in (0, 1) for sample in samples)


def test_a_zip_is_as_good_as_its_folder(pictures: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as file:
        for path in sorted(pictures.rglob("*.png"), reverse=True):
            file.write(path, f"all/{path.relative_to(pictures)}")
        file.writestr("__MACOSX/all/cats/._0.png", b"mac")
        file.writestr("all/README.txt", b"hello")
    a = prepare(str(pictures), str(tmp_path / "a"), Options(size=8), workers=1)
    b = prepare(str(tmp_path / "pictures.zip"), str(tmp_path / "b"), Options(size=8), workers=2)
    assert a.shards == b.shards and b.classes == ("cats", "dogs") and b.name == "pictures"


def test_a_zip_without_size(pictures: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for i in range(40):
            file.write(pictures / "cats" / f"{i % 7}.png", f"{i}.png")
    index = prepare(str(tmp_path / "x.zip"), str(tmp_path / "out"), Options(per_shard=3), workers=3)
    assert index.num_samples == 40 and index.num_classes == 0


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fits(tmp_path: Path, fit: str) -> None:
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 255  # the square in the middle is white
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(png(wide))
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), Options(size=4, fit=fit), workers=1)  # type: ignore[arg-type]
    image = images(tmp_path / "out", 4, 1)[0, 0].astype(int)
    if fit == "crop":
        assert (image == 255).all()
    elif fit == "pad":
        assert (image[[0, 3]] == 0).all() and image[1:3, 1:3].min() > 200
    else:
        assert image[:, 1:3].min() > 200 and image[:, [0, 3]].max() < 60


def test_padding_keeps_the_pixels_of_a_smaller_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (5, 6, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(png(pixels))
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), Options(size=10, fit="pad"), workers=1)
    image = images(tmp_path / "out", 10, 3)[0].transpose(1, 2, 0)
    assert (image[2:7, 2:8] == pixels).all() and (image > 0).sum() == pixels.size


def test_channels(pictures: Path, tmp_path: Path) -> None:
    prepare(str(pictures), str(tmp_path / "g"), Options(size=8, channels=1), workers=1)
    prepare(str(pictures), str(tmp_path / "c"), Options(size=8, channels=3), workers=1)
    for folder, mode in [("g", "L"), ("c", "RGB")]:
        with tarfile.open(tmp_path / folder / "shard-000000.tar") as tar:
            files = [tar.extractfile(m) for m in tar if m.name.endswith("png")]
            assert {Image.open(file).mode for file in files} == {mode}  # type: ignore[arg-type]


def test_unreadable_files_are_left_out_and_named(pictures: Path, tmp_path: Path) -> None:
    (pictures / "cats" / "bad.png").write_bytes(b"no image")
    (pictures / "dogs" / "cut.png").write_bytes((pictures / "dogs" / "0.png").read_bytes()[:100])
    said: list[str] = []
    index = prepare(str(pictures), str(tmp_path / "out"), Options(size=8), workers=1, announce=said.append)
    assert index.num_samples == 12
    assert "2 images could not be read" in said[0] and "cats/bad.png" in "".join(said)


def test_the_same_command_again_does_nothing(pictures: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", []
    first = prepare(str(pictures), str(out), Options(size=8), workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(str(pictures), str(out), Options(size=8), workers=1, announce=said.append) == first
    assert "is there already, made by the same command" in said[0]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match="is there already"):
        prepare(str(pictures), str(out), Options(size=4), workers=1)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", Options(), "no folder, zip or known data set called"),
        ("pictures/cats/0.png", Options(), "neither a folder nor a zip"),
        ("empty", Options(), "There are no images"),
        ("mixed", Options(size=8), "both in sub-folders"),
        ("pictures", Options(), r"--size N"),
        ("pictures/dogs", Options(), "12x8, not square"),
        ("shards", Options(), "--index-only"),
        ("broken", Options(size=8), "None of the 1 images"),
        ("broken", Options(), "None of the 1 images"),
    ],
)
def test_what_cannot_be_prepared(
    pictures: Path, make_shards: MakeShards, tmp_path: Path, source: str, options: Options, message: str
) -> None:
    make_shards([2])
    for folder in ("empty", "mixed/a", "broken"):
        (tmp_path / folder).mkdir(parents=True)
    for path in ("mixed/a/0.png", "mixed/0.png"):
        (tmp_path / path).write_bytes((pictures / "cats" / "0.png").read_bytes())
    (tmp_path / "broken" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=message):
        prepare(str(tmp_path / source), str(tmp_path / "out"), options, workers=1)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*")), "nothing is left behind"


FULL = """
import resource, sys
from pipeline.config import UserError
from pipeline.data.prepare import Options, prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writing more fails, as on a full disk
try:
    prepare(sys.argv[1], sys.argv[2], Options(size=64), workers=1)
except UserError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing(pictures: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(pictures), str(tmp_path / "out")],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.stdout.startswith("No space left for"), run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


def test_leftovers_of_a_killed_run_do_not_matter(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / ".shardgan").mkdir(parents=True)
    (tmp_path / ".out.partial" / "shard-000099.tar").write_bytes(b"half")
    (tmp_path / "out").mkdir()
    assert prepare(str(pictures), str(tmp_path / "out"), Options(size=8), workers=1).num_samples == 12
    assert not (tmp_path / ".out.partial").exists()


def test_the_command(pictures: Path, tmp_path: Path, make_shards: MakeShards) -> None:
    run = CliRunner().invoke(
        command, [str(pictures), str(tmp_path / "out"), "--size", "8", "--channels", "3"]
    )
    assert run.exit_code == 0, run.output
    assert run.output == f"12 images of 2 classes in 1 shard: {tmp_path}/out\n"
    shards = make_shards([3, 4])
    run = CliRunner().invoke(command, [str(shards), "--index-only"])
    assert run.exit_code == 0 and "7 images in 2 shards" in run.output
    assert (shards / "index.json").exists()
    for arguments in (
        [str(pictures)],
        [str(shards), "x", "--index-only"],
        [str(pictures), "x", "--size", "0"],
    ):
        assert CliRunner().invoke(command, arguments).exit_code == 2


def test_the_images_in_the_repository(tmp_path: Path) -> None:
    """The 500 are what their index says, and such as `prepare` writes."""
    record = json.loads((ASSETS / "index.json").read_text())
    for entry in record["shardlist"]:
        assert hashlib.sha256((ASSETS / entry["url"]).read_bytes()).hexdigest() == entry["sha256"]
    index = load_index(str(ASSETS))
    assert index.num_samples == 500 and index.classes[9] == "Ankle boot"
    batch = images(ASSETS, 28, 1)
    assert batch.shape == (500, 1, 28, 28) and 60 < batch.mean() < 90
