"""`shardgan prepare`: the same bytes each time, readable by anyone, whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from click.testing import CliRunner
from PIL import Image
from tiny_shards import MakeShards, contents, png, sample_of, write_tar

from launch.prepare import prepare as command
from pipeline.config import Data, UserError
from pipeline.data.index import load_index
from pipeline.data.plan import Split
from pipeline.data.prepare.writer import Options, prepare
from pipeline.data.record import write_record
from pipeline.data.stream import training_batches

ASSETS = Path(__file__).parents[1] / "assets" / "fashion-mnist-500"


def images(folder: Path, size: int, channels: int) -> np.ndarray:
    index = load_index(str(folder))
    plan = Split(index.sizes, 0, 4).training()
    stream = training_batches(
        index, plan, Data(size=size, channels=channels, batch_size=plan.size, workers=0)
    )
    return next(stream).images.numpy()


def test_the_same_bytes_each_time(pictures: Path, tmp_path: Path) -> None:
    options = Options(size=8, per_shard=5)
    for name, workers in [("a", 1), ("b", 3)]:
        prepare(str(pictures), str(tmp_path / name), options, workers=workers)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    shards = [f"shard-{number:06d}.tar" for number in range(3)]
    assert list(a) == ["index.json", *shards, "sources.txt"]
    assert a == b
    assert (
        hashlib.sha256(a["shard-000001.tar"]).hexdigest()
        == json.loads(a["index.json"])["shardlist"][1]["sha256"]
    )


def test_colour_profiles_are_left_out(pictures: Path, tmp_path: Path) -> None:
    """They may be larger than the pixels, and than training reads."""
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    for folder, profile in [(plain, None), (profiled, os.urandom(1 << 21))]:
        folder.mkdir()
        for path in sorted(pictures.rglob("*.png")):
            image = Image.open(path).convert("RGB")
            image.save(folder / f"{path.parent.name}-{path.stem}.jpg", icc_profile=profile)
    made = [
        prepare(str(s), str(tmp_path / f"of-{s.name}"), Options(size=8), workers=1) for s in (plain, profiled)
    ]
    assert made[0].num_samples and made[0].shards == made[1].shards


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
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert sorted(listed) == sorted(text.strip() for text in said[1:]) and len(listed) == 2


def test_what_only_looks_like_a_picture_is_left_out(pictures: Path, tmp_path: Path) -> None:
    """Nobody waits for a pipe, and a link to nowhere is no reason to stop."""
    os.mkfifo(pictures / "cats" / "pipe.png")
    (pictures / "cats" / "link.png").symlink_to("nowhere.png")
    (pictures / "cats" / "folder.png").mkdir()
    index = prepare(str(pictures), str(tmp_path / "out"), Options(size=8), workers=2)
    skipped = (tmp_path / "out" / "skipped.txt").read_text()
    assert index.num_samples == 12 and skipped.count("\n") == 2
    assert "pipe.png: not a regular file" in skipped and "link.png" in skipped


@pytest.mark.parametrize(
    ("by", "classes"),
    [
        ("top", ("animals", "plants")),
        ("path", ("animals/cats", "animals/dogs/small", "plants")),
        ("none", ()),
    ],
)
def test_nested_folders(pictures: Path, tmp_path: Path, by: str, classes: tuple[str, ...]) -> None:
    """The same from a folder and from a zip that holds it below two others."""
    names = ["animals/cats/0.png", "animals/dogs/small/1.png", "plants/2.png", "plants/3.png"]
    with zipfile.ZipFile(tmp_path / "n.zip", "w") as file:
        for number, name in enumerate(names):
            (tmp_path / "n" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pictures / "cats" / f"{number}.png", tmp_path / "n" / name)
            file.write(tmp_path / "n" / name, f"data/train/{name}")
    for source in ("n", "n.zip"):
        index = prepare(
            str(tmp_path / source),
            str(tmp_path / f"{source}-out"),
            Options(size=10, classes=by),  # type: ignore[arg-type]
            workers=1,
        )
        assert index.class_names == classes
        expected = {"top": {0: 2, 1: 2}, "path": {0: 1, 1: 1, 2: 2}, "none": {}}[by]
        assert index.shards[0].labels == expected


def test_shards_are_cut_anew(make_shards: MakeShards, tmp_path: Path) -> None:
    """Other sizes of shard, the same images, labels and names of classes; also from one tar."""
    root = make_shards([7, 1, 12], classes=3)
    write_record(root, "", [], {"classes": ["a", "b", "c"]})
    index = prepare(str(root), str(tmp_path / "out"), Options(per_shard=8), workers=2)
    assert index.sizes == (8, 8, 4) and index.classes == ("a", "b", "c")
    samples = webdataset.WebDataset(f"{tmp_path}/out/shard-{{000000..000002}}.tar", shardshuffle=False)
    found = {sample_of(s["png"]): s["cls"] for s in samples.decode("l8")}
    assert found == {(s, r): (s + r) % 3 for s, n in enumerate([7, 1, 12]) for r in range(n)}
    one = prepare(str(root / "s-0002.tar"), str(tmp_path / "one"), Options(size=2, fit="stretch"), workers=1)
    assert one.num_samples == 12 and images(tmp_path / "one", 2, 1).shape == (12, 1, 2, 2)


def test_img2dataset_output(tmp_path: Path) -> None:
    """Its webdataset format: pictures with captions and metadata in tars, tables and statistics beside them;
    and its files format, whose folders are no classes. A damaged picture is left out."""
    rng = np.random.default_rng(0)
    for shard in range(2):
        members = []
        for row in range(6):
            key, file = f"{shard:05d}{row:04d}", io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (9, 16, 3), np.uint8)).save(file, "JPEG")
            data = file.getvalue() if (shard, row) != (1, 2) else file.getvalue()[:60]
            record = json.dumps({"url": "https://x.org/1.jpg", "width": 16, "height": 9, "status": "success"})
            members += [(f"{key}.jpg", data), (f"{key}.json", record.encode()), (f"{key}.txt", b"a cat")]
            for name, text in members[-3:]:
                path = tmp_path / "files" / f"{shard:05d}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text)
        write_tar(tmp_path / "tars" / f"{shard:05d}.tar", members, tarfile.PAX_FORMAT)
        for folder in ("tars", "files"):
            (tmp_path / folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
            (tmp_path / folder / f"{shard:05d}_stats.json").write_text('{"count": 6, "successes": 6}')
    for folder in ("tars", "files"):
        options = Options(size=8, channels=3, classes="none")
        index = prepare(str(tmp_path / folder), str(tmp_path / f"{folder}-out"), options, workers=1)
        assert (index.num_samples, index.num_classes) == (11, 0)
        assert "000010002" in (tmp_path / f"{folder}-out" / "skipped.txt").read_text()
        assert images(tmp_path / f"{folder}-out", 8, 3).shape == (11, 3, 8, 8)


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
        ("nowhere", Options(), "no folder, zip, shard or known data set called .*/nowhere[.]$"),
        ("picture", Options(), "called .*/picture[.] Did you mean .*/pictures[?]$"),
        ("pictures/cats/0.png", Options(), "neither a folder nor a zip"),
        ("empty", Options(), "There are no images"),
        ("mixed", Options(size=8), "both in sub-folders"),
        ("pictures", Options(), r"--size N"),
        ("pictures/dogs", Options(), "12x8, not square"),
        ("mixed", Options(size=8, classes="path"), "--classes none"),
        ("https://x.org/shards", Options(), "not on this machine"),
        ("broken", Options(size=8), "None of the 1 images"),
        ("broken", Options(), "None of the 1 images of broken can be read"),
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
        where = source if "://" in source else str(tmp_path / source)
        prepare(where, str(tmp_path / "out"), options, workers=1)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*")), "nothing is left behind"


def test_a_known_data_set_that_is_misspelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"called fashion_mnist[.] Did you mean fashion-mnist[?]$"):
        prepare("fashion_mnist", "out", Options())


@pytest.mark.parametrize("out", ["pictures/out", "pictures/cats/out", "pictures/../pictures/out"])
def test_shards_inside_their_source_change_nothing_when_it_is_read_again(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = prepare("pictures", "elsewhere", Options(size=8), workers=1)
    assert prepare("pictures", out, Options(size=8), workers=1).fingerprint == expected.fingerprint
    before = contents(tmp_path / out)
    said = list[str]()
    prepare("pictures", out, Options(size=8), workers=1, announce=said.append)
    assert contents(tmp_path / out) == before and "is there already" in said[0]
    prepare("pictures", "again", Options(size=8), workers=1)
    assert contents(tmp_path / "again")["shard-000000.tar"] == before["shard-000000.tar"]


def test_the_summary_fits_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{letter}-{letter}{letter}" for letter in "abcdefghij"]
    for name in names:
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    lines = CliRunner().invoke(command, ["in", "out"]).output.splitlines()[1:]
    assert max(map(len, lines)) <= 60 and all(line.startswith("  ") for line in lines)
    said = ", ".join(f"{number} = {name} (1)" for number, name in enumerate(names))
    assert said in " ".join(line.strip() for line in lines)


def test_the_command(pictures: Path, tmp_path: Path, make_shards: MakeShards) -> None:
    run = CliRunner().invoke(
        command, [str(pictures), str(tmp_path / "out"), "--size", "8", "--channels", "3"]
    )
    assert run.exit_code == 0, run.output
    assert run.output.splitlines() == [
        f"12 images of 2 classes in 1 shard: {tmp_path}/out",
        "  8x8: 12 in colour, 5 cropped to a square",
        "  shorter sides before: 8 to 10 (median 10)",
        "  classes, from folders: 0 = cats (7), 1 = dogs (5)",
        f"  Next: shardgan train {tmp_path}/out",
    ]
    shards = make_shards([3, 4])
    run = CliRunner().invoke(command, [str(shards), "--index-only"])
    assert run.exit_code == 0 and "7 images in 2 shards" in run.output
    assert (shards / "index.json").exists()
    for arguments in (
        [str(pictures)],
        [str(shards), "x", "--index-only"],
        [str(shards), "--index-only", "--classes", "none"],  # which it would not do
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
