"""Scoring: features, three ranks, the cache, and which scores compare."""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import json
import os
import socket
import sys
import tarfile
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline import config
from pipeline.config import Score, UserError
from pipeline.data.index import load_index
from pipeline.data.stream import heldout_batches
from pipeline.errors import CommonError
from pipeline.folders import cache_folder
from pipeline.gan.draws import Draws
from pipeline.parallel.launched import read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.run import evaluate, references, scores
from pipeline.run import tensor_cache as cache
from pipeline.run.features import Extractor, Inception, check_features, load_features
from pipeline.run.images import PLAIN
from pipeline.run.scorer import Scorer

SHARDS = Path(__file__).parents[1] / "assets" / "fashion-mnist-500"
TRAIN = 205  # more than three ranks take in one batch, and more than are held out


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# FID is defined by such a file.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def extractor():
    return load_features("efflite0")


def stored_images() -> tuple[torch.Tensor, torch.Tensor]:
    """All of the shards' images, uint8 [500, 1, 28, 28], and labels [500]: read without our reader."""
    images, labels = [], []
    for shard in sorted(SHARDS.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                if member.name.endswith(".cls"):
                    labels.append(int(content))
                else:
                    images.append(np.asarray(Image.open(io.BytesIO(content)).convert("L")))
    return torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels)


@pytest.fixture(scope="module")
def real():
    return stored_images()


# Features


def test_features_do_not_depend_on_company_channels_or_precision(real, extractor):
    images = real[0][:40]
    together = extractor(images)
    assert together.shape == (40, extractor.dim) and together.dtype == torch.float32
    assert not together.requires_grad and not extractor.training
    assert torch.allclose(extractor(images[7:9]), together[7:9], atol=1e-5)
    assert torch.equal(extractor(images.expand(-1, 3, -1, -1)), together)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(images), together)


def test_features_are_never_computed_in_tf32():
    """Nor a user's own, which may have layers other than convolutions, in a process that allows it."""
    matmul, seen = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision

    class Linear(Extractor):
        def extract(self, pixels):
            seen.append((matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
            return pixels.flatten(1)

    try:
        matmul.fp32_precision = "tf32"
        Linear("linear", "", 12)(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
        assert seen == [("ieee", "ieee")] and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_images_of_any_size_are_taken(real, extractor):
    images = real[0][:8]
    large = F.interpolate(images.float(), 131, mode="bicubic", antialias=True).clamp(0, 255)
    near, far = extractor(large.round().to(torch.uint8)), extractor(images.flip(0))
    reference = extractor(images)
    assert (near - reference).norm() < 0.5 * (far - reference).norm()
    assert extractor(F.interpolate(images, (96, 96))).shape == (8, extractor.dim)


def test_unknown_features_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="Known: efflite0"):
        load_features("inception")


# Over ranks, and from the cache


def config_for(limit: int = 12, metrics: str = "kid", train_images: int = 0) -> config.Config:
    return config.load(
        None,
        [
            f"data.train={SHARDS}", "data.size=28", "data.channels=1", "data.holdout=0.1",
            f"score.images={limit}", f"score.metrics=[{metrics}]", f"score.train_images={train_images}",
        ],
    )  # fmt: skip


def score(ranks: Ranks, limit: int = 12, metrics: str = "kid") -> dict[str, float]:
    """Images of the shards, brightened, against real ones: sizes that neither 3 ranks nor 8 divide."""
    images = stored_images()[0]
    settings = config_for(limit, metrics, TRAIN if "nn" in metrics else 0)
    extractor = load_features("efflite0")
    real = references.references(settings, extractor, load_index(str(SHARDS)), ranks)
    calls = []

    def generate(start: int, count: int) -> torch.Tensor:
        assert start >= 0 and start + count <= len(real.heldout)
        calls.append(count)
        return images[start : start + count].float().mul(1.3).clamp(0, 255).to(torch.uint8)

    found = evaluate.evaluate(generate, real, extractor, ranks, settings.score.metrics, batch=8)
    assert ranks.gather_objects(calls) == [calls] * ranks.world  # as collective forwards must
    return found


def score_without_a_shard(ranks: Ranks, folder: str) -> None:
    """During a training, which looks for stop signals before each batch. Rank 1 cannot read its own."""

    def cut_short(*arguments: object, **options: object) -> Iterator[object]:
        if ranks.rank == 1:
            raise UserError("shard x cannot be read")
        yield from heldout_batches(*arguments, **options)

    signals, report = SimpleNamespace(received=None), Mock()
    index = load_index(str(SHARDS))
    scorer = Scorer(config_for(40), Path(folder), index, ranks, report, signals, Mock(), PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "heldout_batches", cut_short)
        scorer.evaluate(Mock())


def run_rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    torch.set_num_threads(1)
    ranks = Ranks(read_launch(), timedelta(seconds=60))
    found = ranks.gather_objects([score(ranks, 26, "kid,fd,pr,dc,nn"), score(ranks, 2)])
    with pytest.raises(CommonError, match=r"^rank 1: shard x cannot be read$"):
        score_without_a_shard(ranks, folder)
    if ranks.main:
        Path(folder, "scores.json").write_text(json.dumps(found))
    ranks.leave()


@pytest.fixture(scope="module")
def alone() -> Ranks:
    return Ranks(read_launch({}), timedelta(seconds=60))


def test_three_ranks_give_the_score_of_one(tmp_path, alone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (3, port, str(tmp_path)), nprocs=3)
    of_ranks = json.loads((tmp_path / "scores.json").read_text())
    assert of_ranks[0] == of_ranks[1] == of_ranks[2]
    folder = cache_folder()
    assert len(list(folder.rglob("*.safetensors"))) == 3
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    for limit, metrics, found in zip((26, 2), ("kid,fd,pr,dc,nn", "kid"), of_ranks[0], strict=True):
        expected = score(alone, limit, metrics)
        assert expected["Metrics/efflite0_real_images"] == expected["Metrics/efflite0_fake_images"] == limit
        assert expected.get("Metrics/efflite0_train_images", TRAIN) == TRAIN
        assert len(expected) == (2 * 6 + 2 + 3 if "nn" in metrics else 1 + 2)
        assert found == pytest.approx(expected, abs=2e-5, rel=2e-5)


def test_the_cache_gives_the_same_number_and_a_damaged_one_is_not_believed(alone, own_cache, monkeypatch):
    first = score(alone)
    (file,) = own_cache.rglob("*.safetensors")
    content = file.read_bytes()

    flipped = bytearray(content)
    flipped[-1000] ^= 1
    for damaged in (content[: len(content) // 2], b"", bytes(flipped)):
        file.write_bytes(damaged)
        assert score(alone) == first
        assert file.stat().st_size == len(content)  # written again

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("the real features were computed again")

    monkeypatch.setattr(references, "heldout_batches", unexpected)
    assert score(alone) == first
    with pytest.raises(AssertionError, match="again"):
        score(alone, limit=11)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, alone, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "file"))
    cache.write_tensor("features", {"of": "nothing"}, torch.ones(2))
    assert "could not be written" in caplog.text
    assert cache.read_tensor("features", {"of": "nothing"}) is None


def test_too_few_held_out_images_are_refused(alone):
    settings = config.load(None, [f"data.train={SHARDS}", "data.holdout=0"])
    with pytest.raises(UserError, match=r"0 images held out.*data\.holdout"):
        references.references(settings, load_features("efflite0"), load_index(str(SHARDS)), alone)


# What compares with what


def against(images: int, **train: object) -> references.References:
    about = {"heldout": {"plan": "a", "images": images}} | ({"train": train} if train else {})
    return references.References(torch.zeros(2, 2), None, False, about)


def test_scores_of_one_run_are_against_the_same_references(tmp_path):
    file = tmp_path / "reference.json"
    references.keep_to(file, against(100))
    references.keep_to(file, against(100, plan=7))
    references.keep_to(file, against(100))
    kept = file.read_text()
    for other, message in (
        (against(99), "heldout, images: 100 → 99"),
        (against(100, plan=8), "train, plan: 7 → 8"),
    ):
        with pytest.raises(UserError, match=message):
            references.keep_to(file, other)
    assert file.read_text() == kept and list(tmp_path.iterdir()) == [file]
    assert against(100).fingerprints == against(100).fingerprints
    assert against(100).fingerprints != against(99).fingerprints


def test_what_scores_are_against_is_written_when_there_is_room(tmp_path, monkeypatch):
    """A full disk costs no score, nor the run; one that has the file already costs nothing."""
    file = tmp_path / "reference.json"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(references, "write", full)
        said = references.keep_to(file, against(100))
        assert said == f"{file}, what scores are against, could not be written: No space left on device."
    assert references.keep_to(file, against(100)) is None and file.exists()
    monkeypatch.setattr(references, "write", full)
    assert references.keep_to(file, against(100)) is None
    assert "could not be written" in str(references.keep_to(file, against(100, plan=7)))
    file.write_text("[]")
    with pytest.raises(UserError, match=r"cannot be read.*remove it"):
        references.keep_to(file, against(100))


# Other features


class Pixels(Extractor):
    """A user's features: the corner pixels times a weight."""

    def __init__(self) -> None:
        super().__init__("pixels", "1", 4)
        self.weight = torch.nn.Parameter(torch.ones(1))

    def extract(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.weight * pixels[:, 0, :2, :2].flatten(1)


class NoName(Pixels):
    def __init__(self) -> None:
        super().__init__()
        self.name = "inception"


class Script(torch.nn.Module):
    """Has the interface of the canonical file; its features are coarse pixels."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return torch.nn.functional.adaptive_avg_pool2d(images, (32, 64)).mean(1).flatten(1)


def test_features_of_a_users_own(real, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    own = load_features("test_evaluate:Pixels")
    assert own(real[0][:3]).shape == (3, 4)
    assert own.version.startswith("1-") and len(own.version) > 10 and not own.canonical
    code = (
        "from test_evaluate import Pixels\nclass Mine(Pixels):\n  def extract(self, pixels):\n    return {}"
    )
    versions = []
    for body in ("super().extract(pixels)", "super().extract(pixels) / 2"):
        (tmp_path / "mine.py").write_text(code.format(body))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        importlib.invalidate_caches()
        versions.append(load_features("mine:Mine").version)
    assert versions[0] != versions[1]  # cached features of real images are of this code
    for wrong, message in (
        ("test_evaluate:NoName", "is named 'inception'"),
        ("test_evaluate:Script", "not a class derived from pipeline.run.features.Extractor"),
        ("test_evaluate:Absent", "cannot be imported"),
    ):
        with pytest.raises(UserError, match=message):
            load_features(wrong)


def test_fid_is_said_of_the_canonical_file_only(real, alone, tmp_path, monkeypatch):
    file = tmp_path / "inception.pt"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        check_features(Score(features=f"inception:{file}"))
    check_features(Score(features=f"inception:{file}", metrics=()))
    file.write_bytes(b"not the network")
    with pytest.raises(UserError, match=r"its SHA-256 is .*…, not f58cb9b6ec323ed6…"):
        load_features(f"inception:{file}")
    torch.jit.script(Script()).save(file)
    monkeypatch.setattr(Inception, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        extractor = load_features(f"inception:{file}")
    assert not shown, "torch 2.15 advises against the format"
    images = real[0][:12]
    features = extractor(images)
    assert features.shape == (12, 2048)
    of_reals = references.References(features, None, False, {})
    found = evaluate.evaluate(
        lambda at, n: images[at : at + n] // 2, of_reals, extractor, alone, ["kid", "fd"]
    )
    assert found["Metrics/fid"] == pytest.approx(scores.frechet(features, extractor(images // 2)))
    assert "Metrics/kid_inception" in found and not [name for name in found if "fd" in name]


def test_the_fid_of_papers_is_of_50_000_images_against_all_that_were_trained_on(
    real, alone, tmp_path, monkeypatch
):
    """With fewer images here; scores against held-out images stay as they are."""
    torch.jit.script(Script()).save(tmp_path / "net.pt")
    monkeypatch.setattr(Inception, "SHA256", hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest())
    monkeypatch.setattr(evaluate, "FULL", 90)
    extractor, G = load_features(f"inception:{tmp_path / 'net.pt'}"), Blots()
    settings, index = config_for(train_images=10_000), load_index(str(SHARDS))
    of_reals = references.references(settings, extractor, index, alone)
    assert of_reals.all_of_train and of_reals.train is not None and len(of_reals.train) == 450
    draws = Draws(0, 8, None)
    found = evaluate.evaluate_generator(G, draws, of_reals, extractor, alone, ["fd"])
    fakes = extractor(evaluate.fixed_images(G, draws, 90, alone.device)(0, 90))
    assert found["Metrics/fid50k_full"] == pytest.approx(scores.frechet(of_reals.train, fakes))
    some = references.references(config_for(train_images=100), extractor, index, alone)
    without = evaluate.evaluate_generator(G, draws, some, extractor, alone, ["fd"])
    assert "Metrics/fid50k_full" not in without and found["Metrics/fid"] == without["Metrics/fid"]


class Blots(torch.nn.Module):
    """A G that needs no training: z [N, 8] → images [N, 1, 28, 28]."""

    def forward(self, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        return z.tanh().repeat(1, 98).view(-1, 1, 28, 28)
