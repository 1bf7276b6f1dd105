"""`shardgan prepare` accounts for every file of its source: as an image, or as left out, with the reason."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tiny_shards import MakeShards, png

from launch.prepare import prepare as command
from pipeline.config import UserError
from pipeline.data.index import load_index
from pipeline.data.prepare.summary import Summary
from pipeline.data.prepare.writer import Options, prepare

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 12, 3), np.uint8)
KINDS = [
    "png",
    "JPG",
    "jpeg",
    "jpe",
    "jfif",
    "webp",
    "avif",
    "gif",
    "bmp",
    "tif",
    "TIFF",
    "jp2",
    "j2k",
    "ppm",
]
SAME = ("grey.pgm", "little.tif", "big.tif", "deep.png", "twelve.tif")  # one grey image


def run(*arguments: object) -> Result:
    wide = CliRunner(env={"COLUMNS": "1000"})  # its summary is not wrapped
    result = wide.invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def pixels(out: Path) -> dict[str, np.ndarray]:
    """The images of a prepared folder, by the file they were made of."""
    origins = dict(line.split("\t") for line in (out / "sources.txt").read_text().splitlines())
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "png":
                    found[origins.pop(key)] = np.asarray(Image.open(tar.extractfile(member)))
    assert not origins, "sources.txt lists exactly the samples that are there"
    return found


def bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def twelve_bits(grey: np.ndarray) -> bytes:
    """A TIFF of 12 bits per pixel, packed, as of scientific cameras."""
    values = -(-grey.astype(int) * 4095 // 255)
    bits = "".join(f"{value:012b}" for value in values.flat)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    side, start = len(grey), 8 + 2 + 9 * 12 + 4
    tags = {256: side, 257: side, 258: 12, 259: 1, 262: 1, 273: start, 277: 1, 278: side, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_formats_that_people_have(tmp_path: Path) -> None:
    """All are taken, whatever their case; what of them is 16-bit, grey, in palettes or CMYK is converted."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    image = Image.fromarray(PIXELS)
    formats = {
        "jpg": "JPEG",
        "jpe": "JPEG",
        "jfif": "JPEG",
        "tif": "TIFF",
        "jp2": "JPEG2000",
        "j2k": "JPEG2000",
    }
    for kind in KINDS:
        image.save(source / f"{kind}.{kind}", formats.get(kind.lower(), kind.upper()))
    grey = RNG.integers(0, 256, (12, 12), np.uint8)
    Image.fromarray(grey).save(source / "grey.pgm")
    for name, order in [("little.tif", "<u2"), ("big.tif", ">u2"), ("deep.png", "<u2")]:
        Image.fromarray((grey.astype(np.uint16) * 257).astype(order)).save(source / name)
    (source / "twelve.tif").write_bytes(twelve_bits(grey))
    for mode in ("CMYK", "YCbCr", "LAB"):
        image.convert(mode).save(source / f"{mode}.tif")
    for name in ("x.heic", "x.svg", "noend"):
        (source / name).write_bytes(b"x")
    output = run(source, out, "--size", 12).output
    found = pixels(out)
    assert sorted(found) == sorted(
        [f"{k}.{k}" for k in KINDS]
        + [p.name for p in source.iterdir() if p.name in (*SAME, "CMYK.tif", "YCbCr.tif", "LAB.tif")]
    )
    for lossless in ("png.png", "bmp.bmp", "tif.tif", "TIFF.TIFF", "ppm.ppm"):
        assert (found[lossless] == PIXELS).all(), lossless
    for same in SAME:
        assert (found[same] == grey).all(), same
    assert all(np.abs(image.astype(int) - PIXELS).mean() < 60 for image in found.values() if image.ndim == 3)
    assert "left out: 3 (.heic 1, .svg 1, no suffix 1), listed in skipped.txt" in output
    assert "17 in colour, 5 in grey" in output
    assert "in/x.heic: not the name of an image" in (out / "skipped.txt").read_text()


def test_everything_that_can_lie_about(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Images and lines of skipped.txt are together what there is."""
    source, out = tmp_path / "in", tmp_path / "out"
    for folder in (".git", "__MACOSX", "sub", "hollow"):
        (source / folder).mkdir(parents=True)
    good = png(PIXELS)
    for name in ("a.png", "A.PNG", "sub/b.png", ".git/c.png", "__MACOSX/d.png"):
        (source / name).write_bytes(good)
    kinds = {
        "Thumbs.db": "Windows's own",
        "desktop.ini": "Windows's own",
        "._a.png": "macOS's own",
        ".DS_Store": "hidden",
        ".b.png": "hidden",
        "x.mp4": ".mp4",
        "notes.": "no suffix",
        "a.b c": "other names",
        "labels.csv": ".csv",
        "metadata.jsonl": ".jsonl",
    }
    bad = {"text.png": b"hello", "cut.png": good[:60], "empty.jpg": b""}
    bad |= {"large.png": bomb(10534, 16000), "larger.png": bomb(30000, 30000), "wide.png": bomb(9500, 9500)}
    for name, data in [*((name, b"x") for name in kinds), *bad.items()]:
        (source / name).write_bytes(data)
    Image.fromarray(RNG.random((12, 12)).astype(np.float32)).save(source / "float.tif")
    for link, to in [("gone.png", "nowhere"), ("loop.png", "loop.png"), ("self", "."), ("etc", "/etc")]:
        (source / link).symlink_to(to)
    (source / "also.png").symlink_to(source / "a.png")
    os.mkfifo(source / "pipe.png")
    output = run(source, out, "--size", 12, "--classes", "none").output
    assert sorted(pixels(out)) == ["A.PNG", "a.png", "also.png", "sub/b.png"]
    skipped = (out / "skipped.txt").read_text().splitlines()
    names = {line.partition(": ")[0].removeprefix("in/") for line in skipped}
    lost = {"gone.png", "loop.png", "pipe.png", "float.tif"}
    assert names == {*kinds, *bad, *lost, "self", "etc", ".git/", "__MACOSX/"} and len(skipped) == len(names)
    said = output.partition("left out: ")[2].partition("\n")[0]
    assert said.startswith(f"{len(skipped)} (") and said.endswith("), listed in skipped.txt")
    for kind in (
        "too many pixels 3",
        "links that lead nowhere 2",
        "links to folders 2",
        "hidden folders 2",
        "unreadable 2",
        "empty 1",
        "32-bit pixels 1",
        "no regular files 1",
        ".mp4 1",
        "hidden 2",
    ):
        assert kind in said, kind
    assert "not read: labels.csv, metadata.jsonl" in output
    assert "warning: links to folders are not followed: etc, self" in output
    assert "larger.png: more than 67,108,864 pixels" in output and "9500x9500 pixels are too many" in output
    # Python 3.12 and newer warn of a fork beside threads: here torch's, and pytest's.
    assert not [text for warning in recwarn.list if "use of fork()" not in (text := str(warning))]
    assert "Warning" not in output and str(tmp_path) not in "".join(skipped)


def test_files_that_nobody_may_read(tmp_path: Path) -> None:
    """The process of a user without rights to them."""
    source = tmp_path / "in"
    (source / "closed").mkdir(parents=True)
    for name in ("a.png", "b.png", "closed/c.png"):
        (source / name).write_bytes(png(PIXELS))
    for path in (source / "b.png", source / "closed"):
        path.chmod(0)
    if os.geteuid() == 0:  # who may read everything, also the modules that are imported here
        run(source, tmp_path / "by-root", "--classes", "none")
    if os.geteuid() == 0 and os.fork() == 0:
        tmp_path.chmod(0o777)
        for parent in tmp_path.parents[: tmp_path.parents.index(Path(tempfile.gettempdir()))]:
            parent.chmod(0o755)
        os.environ["SHARDGAN_CACHE"] = str(tmp_path / "cache")
        os.setuid(65534)
        try:
            run(source, tmp_path / "out", "--classes", "none")
        finally:
            os._exit(0)
    if os.geteuid() == 0:
        os.wait()
    else:
        run(source, tmp_path / "out", "--classes", "none")
    skipped = sorted((tmp_path / "out" / "skipped.txt").read_text().splitlines())
    assert skipped == [
        "in/b.png: Permission denied",
        "in/closed/: a folder that cannot be read: Permission denied",
    ]
    (source / "closed").chmod(0o755)


def test_what_is_done_to_images_is_said(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    image = Image.fromarray(PIXELS)
    image.convert("RGBA").save(source / "rgba.png")
    image.convert("LA").save(source / "la.png")
    image.quantize(8).save(source / "p.png", transparency=0)
    image.resize((6, 3)).save(source / "small.png")
    image.resize((24, 20)).save(source / "wide.png")
    image.resize((24, 24)).save(source / "large.png")  # fills its square: nothing is padded
    image.save(source / "pages.tif", save_all=True, append_images=[image, image])
    image.save(source / "moving.gif", save_all=True, append_images=[image.rotate(90)])
    image.save(source / "moving.webp", save_all=True, append_images=[image.rotate(90)], lossless=True)
    said: list[Summary] = []
    for fit in ("crop", "pad", "stretch"):
        options = Options(size=12, fit=fit)  # type: ignore[arg-type]
        prepare(str(source), str(tmp_path / fit), options, workers=1, report=said.append)
    lines = [next(summary.lines()) for summary in said]
    small = "1 smaller than 12 and enlarged"
    many = "3 of several frames or pages: the first is used"
    clear = "3 with transparency, laid on white"
    assert lines == [
        f"12x12: 8 in colour, 1 in grey, {clear}, 2 cropped to a square, {small}, {many}",
        f"12x12: 8 in colour, 1 in grey, {clear}, 2 padded with black, {many}",
        f"12x12: 8 in colour, 1 in grey, {clear}, 2 stretched to a square, {small}, {many}",
    ]
    assert (pixels(tmp_path / "crop")["moving.webp"] == PIXELS).all()


@pytest.mark.parametrize(
    ("background", "under", "around"),
    [
        (None, (255, 255, 255), (0, 0, 0)),
        ("white", (255, 255, 255), (255, 255, 255)),
        ("BLACK", (0, 0, 0), (0, 0, 0)),
        ("#FF8000", (255, 128, 0), (255, 128, 0)),
    ],
)
def test_background(
    tmp_path: Path, background: str | None, under: tuple[int, ...], around: tuple[int, ...]
) -> None:
    """One colour under transparency of every sort and in padding, in colour and in grey."""
    source = tmp_path / "in"
    source.mkdir()
    clear = Image.new("RGBA", (4, 2), (9, 9, 9, 0))
    clear.save(source / "rgba.png")
    clear.save(source / "rgba.tif")
    clear.convert("LA").save(source / "la.png")
    Image.new("P", (4, 2)).save(source / "p.png", transparency=0)
    Image.new("P", (4, 2)).save(source / "p.gif", transparency=0)
    Image.new("RGB", (4, 2), (7, 7, 7)).save(source / "rgb.png", transparency=(7, 7, 7))
    for channels in (3, 1):
        out = tmp_path / f"out-{channels}"
        chosen = ["--background", background] if background else []
        run(source, out, "--size", 4, "--fit", "pad", "--channels", channels, *chosen)
        for name, image in pixels(out).items():
            colours = [np.array(c, np.uint8) for c in (under, around)]
            if channels == 1:
                colours = [np.asarray(Image.new("RGB", (1, 1), tuple(c)).convert("L"))[0, 0] for c in colours]
            assert (image[1:3] == colours[0]).all() and (image[[0, 3]] == colours[1]).all(), name


@pytest.mark.parametrize("background", ["pink", "#fff", "#12345g", "rgb(0,0,0)", ""])
def test_no_background(tmp_path: Path, background: str) -> None:
    with pytest.raises(UserError, match="give white, black or #rrggbb"):
        prepare(str(tmp_path), str(tmp_path / "out"), Options(size=4, background=background))


def test_the_next_line_to_type(tmp_path: Path) -> None:
    """It names the folder as the person did, quoted where a shell needs it."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(png(PIXELS[:, :, 0]))
    out = tmp_path / "my photos"
    output = run(tmp_path / "in", out, "--size", 8).output
    assert output.startswith(f"1 image in 1 shard: {out}\n")
    assert output.endswith(f"Next: shardgan train '{out}'\n")


def test_where_samples_come_from(pictures: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    """sources.txt says it of folders, zips and shards, by paths inside the source alone."""
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        for path in sorted(pictures.rglob("*.png")):
            file.write(path, path.relative_to(tmp_path))
    for source, name, expected in [
        (pictures, "folder", "dogs/4.png"),
        (tmp_path / "p.zip", "zip", "pictures/dogs/4.png"),
        (make_shards([3, 2]), "from-shards", "s-0001.tar/1-1"),
    ]:
        out = tmp_path / name
        prepare(str(source), str(out), Options(size=8, per_shard=2), workers=2)
        text = (out / "sources.txt").read_text()
        index = load_index(str(out))
        keys = [index.table(s).key(row) for s, size in enumerate(index.sizes) for row in range(size)]
        assert [line.split("\t")[0] for line in text.splitlines()] == keys
        assert f"\t{expected}\n" in text and str(tmp_path) not in text
    assert (pixels(tmp_path / "folder")["dogs/4.png"].shape) == (8, 8, 3)


def test_names_that_would_break_lines(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("new\nline.png", "tab\t.png", "\x1b[31m.png"):
        (tmp_path / "in" / name).write_bytes(png(PIXELS))
    (tmp_path / "in" / "bad\n.png").write_bytes(b"x")
    run(tmp_path / "in", tmp_path / "out")
    assert sorted(pixels(tmp_path / "out")) == ["\\x1b[31m.png", "new\\nline.png", "tab\\t.png"]
    assert (tmp_path / "out" / "skipped.txt").read_text().count("\n") == 1


def test_an_earlier_version_would_write_the_same(
    pictures: Path, make_shards: MakeShards, tmp_path: Path
) -> None:
    """Samples, their order, labels and pixels, of what it took whole."""
    rng = np.random.default_rng(1)
    for name, shape in [("a", (9, 7, 4)), ("b", (7, 9, 2)), ("c", (30, 30))]:
        (pictures / "cats" / f"{name}.png").write_bytes(png(rng.integers(0, 256, shape, np.uint8)))
    shutil.make_archive(str(tmp_path / "zip"), "zip", tmp_path, "pictures")
    digest = hashlib.sha256()
    for source, options in [
        (pictures, Options(size=8, per_shard=5)),
        (pictures, Options(size=16, fit="pad", per_shard=4)),
        (pictures, Options(size=16, fit="stretch", channels=1)),
        (tmp_path / "zip.zip", Options(size=16, fit="pad", channels=3, classes="none")),
        (make_shards([7, 1, 12], classes=3), Options(per_shard=8)),
    ]:
        out = tmp_path / "out"
        prepare(str(source), str(out), options, workers=2)
        for path in sorted(out.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith(".png"):  # which libraries may compress in other ways
                        image = Image.open(io.BytesIO(data))
                        data = f"{image.mode}{image.size}".encode() + image.tobytes()
                    digest.update(member.name.encode() + data)
        classes = json.loads((out / "index.json").read_text()).get("classes", [])
        digest.update(json.dumps([name for name in classes if not name.isdecimal()]).encode())
        shutil.rmtree(out)
    assert digest.hexdigest() == "90ce7126403e720ed6b72feef8ef4ddf0dac168a74c3bf91dc1fa527d60f6f38"
