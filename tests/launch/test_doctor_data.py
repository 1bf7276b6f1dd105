"""`shardgan doctor` on data that is broken for real: each check says so, naming shard and byte."""

from __future__ import annotations

import cProfile
import functools
import http.server
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from launch.doctor import data as doctor_data
from launch.doctor.finding import Finding, Job
from pipeline import config
from pipeline.data import cache
from pipeline.data.index import load_index
from pipeline.data.prepare.reindex import build_index
from pipeline.data.prepare.writer import Options, prepare

FASHION = Path(__file__).parents[1] / "assets" / "fashion-mnist-500"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(FASHION, tmp_path / "data", ignore=shutil.ignore_patterns(".shardgan"))
    load_index(str(tmp_path / "data"))  # with its sidecars
    return tmp_path / "data"


def job(folder: Path, *settings: str, procs: int = 1) -> Job:
    resolved = config.load(None, [f"data.train={folder}", "data.size=28", "data.channels=1", *settings])
    return Job(resolved, 1, procs, "ddp", "no")


def examine(folder: Path, *settings: str) -> dict[str, Finding]:
    _, found = doctor_data.examine(job(folder, *settings), lambda done, total: None)
    return {finding.check: finding for finding in found}


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """The same tar with other contents, or without what `change` gives None for."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, old in members:
            new = change(name, old)
            if new is not None:
                info = tarfile.TarInfo(name)
                info.size = len(new)
                tar.addfile(info, io.BytesIO(new))


def test_sound_data(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    index, found = doctor_data.examine(
        job(folder, "score.images=50", "data.batch_size=20"), lambda *done: told.append(done)
    )
    assert index is not None and {f.verdict for f in found} == {"ok"}
    texts = {f.check: f.text for f in found}
    assert "5 shards, 500 images" in texts["shards"] and "index.json and sidecar" in texts["shards"]
    assert "450 images trained on, 50 held out" in texts["split"]
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert len(told) == 5 and told[-1] == (size, size)


def test_a_flipped_bit_in_an_image_is_named_by_byte(folder: Path) -> None:
    table = load_index(str(folder)).table(3)
    flip(folder / "shard-000003.tar", int(table.offset[17]) + 30)
    found = examine(folder)["shards"]
    assert found.verdict == "would fail"
    assert f"shard-000003.tar, byte {table.offset[17]}: sample '{table.key(17)}'" in found.text
    assert "another SHA-256" in found.text and "Fetch" in found.remedy


def test_flipped_bits_elsewhere_are_found_too(folder: Path) -> None:
    """In a header, where the tar itself tells; in padding, where only the SHA-256 does."""
    table = load_index(str(folder)).table(1)
    flip(folder / "shard-000001.tar", 3)
    flip(folder / "shard-000002.tar", int(table.offset[0] + table.size[0]) + 1)
    found = examine(folder)["shards"]
    assert "shard shard-000001.tar, byte 0" in found.text
    assert "shard shard-000002.tar" in found.text


def test_all_broken_shards_are_named_at_once(folder: Path) -> None:
    (folder / "shard-000000.tar").write_bytes((folder / "shard-000000.tar").read_bytes()[:100_000])
    (folder / "shard-000002.tar").unlink()
    shutil.copy(folder / "shard-000001.tar", folder / "shard-000009.tar")
    index, (found,) = doctor_data.examine(job(folder), lambda done, total: None)
    assert index is None and found.verdict == "would fail"
    assert "shard-000000.tar, byte 100000: truncated" in found.text and "has 100,000 bytes" in found.text
    assert "shard-000002.tar" in found.text and "missing" in found.text
    assert "shard-000009.tar" in found.text and "not listed" in found.text


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [("nsamples", 99, "100 samples, index.json says 99"), ("labels", {"0": 100}, "other labels")],
)
def test_an_index_that_lies(folder: Path, key: str, value: object, word: str) -> None:
    record = json.loads((folder / "index.json").read_text())
    record["shardlist"][4][key] = value
    (folder / "index.json").write_text(json.dumps(record))
    found = examine(folder)["shards"]
    assert found.verdict == "would fail" and "shard-000004.tar" in found.text and word in found.text


def test_a_relabelled_shard_is_found_by_its_sidecar(folder: Path) -> None:
    """Somebody rewrote labels, and index.json with them, but not the sidecar."""
    table = load_index(str(folder)).table(0)
    key, other = table.key(5), (int(table.label[5]) + 1) % 10
    rewrite(
        folder / "shard-000000.tar", lambda name, old: str(other).encode() if name == f"{key}.cls" else old
    )
    found = examine(folder)["shards"]
    assert f"sample '{key}' has another label than was indexed" in found.text


def test_shards_in_folders_below_that_are_listed(folder: Path) -> None:
    record = json.loads((folder / "index.json").read_text())
    (folder / "more").mkdir()
    for entry, url in [(record["shardlist"][0], "more/a.tar"), (record["shardlist"][4], "b.TAR")]:
        (folder / entry["url"]).rename(folder / url)
        entry["url"] = url
    (folder / "index.json").write_text(json.dumps(record))
    found = examine(folder)
    assert "5 shards, 500 images" in found["shards"].text and found["duplicates"].verdict == "ok"
    assert "450 images trained on" in found["split"].text


def test_no_shards(tmp_path: Path) -> None:
    found = examine(tmp_path)["shards"]
    assert found.verdict == "would fail" and "shardgan prepare" in found.text


def test_a_missing_label(folder: Path) -> None:
    rewrite(folder / "shard-000002.tar", lambda name, old: None if name.endswith("07.cls") else old)
    build_index(str(folder))
    found = examine(folder, "data.conditional=true", "data.max_bad=0")["labels"]
    assert found.verdict == "would fail" and "1 of the 500" in found.text and "shard-000002.tar" in found.text
    found = examine(folder, "data.conditional=true")["labels"]
    assert found.verdict == "warning" and "1 of the 500" in found.text and "KEY.cls" in found.remedy
    assert examine(folder)["labels"].verdict == "ok"


def identify(folder: Path, largest: int) -> None:
    """Give one image a label far above those of the others, which are 0 to 9."""
    rewrite(
        folder / "shard-000000.tar",
        lambda name, old: b"%d" % largest if name == "000000-000003.cls" else old,
    )
    build_index(str(folder))


@pytest.mark.parametrize("largest", [20_000, 999_999])
def test_labels_that_are_identifiers(folder: Path, largest: int) -> None:
    identify(folder, largest)
    found = examine(folder, "data.conditional=true")["labels"]
    assert found.verdict == ("warning" if largest == 20_000 else "would fail")
    assert f"labels go up to {largest:,}, but only 11 of these classes have images" in found.text
    assert examine(folder)["labels"].verdict == "ok"


def test_work_on_labels_does_not_grow_with_the_square_of_the_largest(folder: Path) -> None:
    """Its calls are counted, for ten times the classes."""
    counts = []
    for largest in (100, 1000):
        identify(folder, largest)
        index, conditional = load_index(str(folder)), job(folder, "data.conditional=true")
        profile = cProfile.Profile()
        (found,) = profile.runcall(list, doctor_data.labels(conditional, index))
        assert found.verdict == "warning"
        counts.append(sum(entry.callcount for entry in profile.getstats()))
    assert counts[1] < 12 * counts[0]


def test_what_is_passed_over_is_said_with_its_reason(folder: Path) -> None:
    def change(name: str, old: bytes) -> bytes | None:
        return None if name.endswith("5.png") else old

    rewrite(folder / "shard-000001.tar", change)
    with tarfile.open(folder / "shard-000002.tar") as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    name, image = next((name, data) for name, data in members if name.endswith(".png"))
    extra = [("README", b"faces"), ("LICENSE", b""), (name.replace(".png", ".jpg"), image)]
    with tarfile.open(folder / "shard-000002.tar", "w") as tar:
        for name, data in [*members, *extra]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    build_index(str(folder))
    found = examine(folder)
    assert found["no image"].verdict == "ok" and found["no image"].text.startswith("10 samples skipped\n")
    assert "only cls" in found["no image"].text and found["no image"].text.endswith("… and 7 more")
    assert (
        found["odd samples"].verdict == "warning" and "has 2 images (png, jpg)" in found["odd samples"].text
    )
    assert (
        found["other files"].verdict == "ok" and "'LICENSE' belongs to no sample" in found["other files"].text
    )
    found = examine(folder, "data.max_bad=0")
    assert found["odd samples"].verdict == "would fail" and "data.max_bad=0" in found["odd samples"].text
    rewrite(folder / "shard-000002.tar", lambda name, old: old if name.endswith(".cls") else None)
    build_index(str(folder))
    assert "100 samples" not in examine(folder)["shards"].text
    assert examine(folder)["no image"].text.startswith("110 samples")


def test_a_class_without_images(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        rewrite(path, lambda name, old: b"8" if name.endswith(".cls") and old == b"3" else old)
    build_index(str(folder))
    found = examine(folder, "data.conditional=true")["labels"]
    assert found.verdict == "warning" and "1 of 10 classes have no image: Dress" in found.text


@pytest.mark.parametrize(
    ("settings", "check", "verdict", "word"),
    [
        (["data.size=32"], "images", "would fail", "28x28 but data.size=32"),
        (["data.channels=3"], "images", "warning", "trained as colour"),
        ([], "hold-out", "warning", "50 images are held out, score.images=1,000"),
        (["data.folds=10"], "hold-out", "warning", "50 images are held out, score.images=1,000"),
        (["data.holdout=0"], "hold-out", "warning", "no score"),
        (["data.holdout=0.002"], "hold-out", "would fail", "1 image held out: too few"),
        (["run.eval_kimg=0.5"], "scores", "warning", "50 images are generated and compared after every 0.5"),
        (["data.folds=501"], "split", "would fail", "500 samples cannot be cut into 501 folds"),
        (["data.batch_size=460"], "split", "warning", "more than once"),
        (["data.batch_size=64"], "split", "warning", "7.0 updates"),
    ],
)
def test_settings_that_do_not_suit_the_data(
    folder: Path, settings: list[str], check: str, verdict: str, word: str
) -> None:
    found = examine(folder, *settings)[check]
    assert found.verdict == verdict and word in found.text


def test_images_that_cannot_be_decoded(folder: Path) -> None:
    """Their CRC is right: they were written so."""
    rewrite(
        folder / "shard-000001.tar",
        lambda name, old: old[:150] if name.endswith(".png") and name[-5] in "02468" else old,
    )
    build_index(str(folder))
    found = examine(folder)["images"]
    assert found.verdict == "would fail" and "shard-000001.tar" in found.text and "max_bad=10" in found.remedy
    assert examine(folder, "data.max_bad=100")["images"].verdict == "warning"


def test_images_that_lack_a_label_count_with_those_that_are_damaged(folder: Path) -> None:
    """As they do in a run: 6 and 6 are more than 10, neither is."""

    def spoilt(name: str, old: bytes) -> bytes:
        if name.endswith(tuple(f"{n}3.png" for n in range(6))):
            return old[:150]
        return b"no number" if name.endswith(tuple(f"{n}4.cls" for n in range(6))) else old

    rewrite(folder / "shard-000001.tar", spoilt)
    build_index(str(folder))
    unlabelled = examine(folder, "data.conditional=true")
    assert examine(folder)["images"].verdict == "warning" == unlabelled["labels"].verdict
    assert unlabelled["images"].verdict == "would fail"


def test_decoded_images_that_do_not_fit_into_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "data.cache" not in examine(folder)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert examine(folder, "data.cache=ram")["data.cache"].verdict == "ok"
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    monkeypatch.setattr(cache, "free_memory", lambda: 100_000)
    found = examine(folder, "data.cache=ram")["data.cache"]
    assert found.verdict == "warning" and "do not fit" in found.text


def test_copies(folder: Path) -> None:
    """A shard under another name: half of the images it doubles are held out in one of the two."""
    rewrite(folder / "shard-000001.tar", lambda name, old: old)
    shutil.copy(folder / "shard-000001.tar", folder / "shard-000005.tar")
    build_index(str(folder))
    found = examine(folder, "data.holdout=0.3")["duplicates"]
    assert found.verdict == "warning" and "100 images are there more than once" in found.text
    assert "in shard-000001.tar = " in found.text and " in shard-000005.tar" in found.text


def test_copies_by_the_names_of_their_files(tmp_path: Path) -> None:
    """Shards that `shardgan prepare` made know which files their samples were."""
    (tmp_path / "in").mkdir()
    with tarfile.open(FASHION / "shard-000000.tar") as tar:
        pictures = [tar.extractfile(m).read() for m in tar if m.name.endswith(".png")]  # type: ignore[union-attr]
    for number, data in enumerate([*pictures[:40], pictures[7]]):
        (tmp_path / "in" / f"photo {number}.png").write_bytes(data)
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), Options(), workers=1)
    found = examine(tmp_path / "out")["duplicates"]
    assert found.verdict == "warning" and "1 image is there more than once" in found.text
    assert sorted(found.text.splitlines()[-1].split(" = ")) == ["photo 40.png", "photo 7.png"]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_shards_behind_a_url(
    folder: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "cache"))
    index, found = doctor_data.examine(
        job(folder, f"data.train={server}", "data.batch_size=20"), lambda *_: None
    )
    texts = {finding.check: finding.text for finding in found}
    assert index is not None and {f.verdict for f in found} == {"ok", "warning"}  # 50 held out for 1000
    assert "shard-000000.tar fetched and intact" in texts["shards"] and server in texts["shards"]
    assert "100 decoded" in texts["images"]
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 1
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "another"))
    flip(folder / "shard-000000.tar", 5000)
    found = doctor_data.examine(
        job(folder, f"data.train={server}", "data.remote.timeout_s=1"), lambda *_: None
    )[1]
    assert [f.verdict for f in found] == ["would fail"] and "shard-000000.tar" in found[0].text
    assert examine(folder, f"data.train={server}/nowhere")["shards"].verdict == "would fail"


def test_latents_are_described_and_what_g_cannot_reach_would_fail(tmp_path):
    (tmp_path / "latents").mkdir()
    for number in range(40):
        np.save(tmp_path / "latents" / f"{number}.npy", np.full((4, 7, 7), 3 * (-1) ** number, np.float16))
    prepare(str(tmp_path / "latents"), str(tmp_path / "out"), Options(), workers=1)
    settings = ("data.channels=4", "data.size=7", "score.metrics=[]", "data.cache=ram")
    found = examine(tmp_path / "out", *settings, "G.kind=r3gan")
    assert found["images"].verdict == "ok"
    assert found["images"].text == "40 decoded: 40 npy arrays; root mean square 3, up to ±3"
    assert "40 decoded images, 31 KiB" in found["data.cache"].text
    told = examine(tmp_path / "out", *settings, "G.kind=dcgan")["data"]
    assert told.verdict == "would fail" and "from -1 to 1, and the latents go up to ±3" in told.text
    told = examine(tmp_path / "out")["images"]
    assert told.verdict == "would fail" and "a latent of 4 channels, not an image" in told.text
