"""The score: against independent sums, on real images, over ranks, and from the cache."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.image.kid import poly_mmd

from pipeline.config import Data, UserError
from pipeline.data.index import load_index
from pipeline.data.locate import cache_folder
from pipeline.data.plan import heldout_plan
from pipeline.parallel.ranks import Ranks, read_launch
from pipeline.run import cache, evaluate
from pipeline.run.features import load_features

SHARDS = Path(__file__).parents[1] / "assets" / "fashion-mnist-500"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Several threads that share busy cores wait for each other far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture(scope="module")
def features(real, extractor):
    return extractor(real[0][:160])


# The estimator


def test_kid_equals_torchmetrics_and_the_double_loop():
    real, fake = torch.rand(2, 23, 40, generator=torch.Generator().manual_seed(0)).double()
    fake = fake + 0.1

    def k(x, y):
        return (float(x @ y) / 40 + 1) ** 3

    n = len(real)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    direct = sum((k(real[i], real[j]) + k(fake[i], fake[j])) / (n * (n - 1)) for i, j in pairs if i != j)
    direct -= 2 * sum(k(real[i], fake[j]) for i, j in pairs) / n**2
    assert evaluate.kid(real, fake) == pytest.approx(direct, abs=1e-12)
    assert evaluate.kid(real, fake) == pytest.approx(float(poly_mmd(real, fake)), abs=1e-12)


def test_kid_block_by_block_is_kid(monkeypatch, features):
    real, fake = features[:80], features[80:] + 0.05
    whole = evaluate.kid(real, fake)
    monkeypatch.setattr(evaluate, "_BLOCK", 7)  # does not divide 80
    assert evaluate.kid(real, fake) == pytest.approx(whole, abs=1e-11)
    assert whole == pytest.approx(float(poly_mmd(real.double(), fake.double())), abs=1e-11)


def test_kid_of_identical_sets_is_negative_in_closed_form(features):
    """Within, the U-statistic leaves out the diagonal, the largest entries; across, nothing."""
    x = features[:100].double()
    kernel = (x @ x.T / 1280 + 1) ** 3
    n, total, diagonal = 100, kernel.sum(), kernel.trace()
    expected = 2 * (total - diagonal) / (n * (n - 1)) - 2 * total / n**2
    assert evaluate.kid(x, x) == pytest.approx(float(expected), abs=1e-11)
    assert evaluate.kid(x, x) < 0


def test_kid_refuses_what_it_cannot_compare():
    for real, fake in [((5, 4), (4, 4)), ((1, 4), (1, 4)), ((5, 4), (5, 3))]:
        with pytest.raises(ValueError, match="n ≥ 2"):
            evaluate.kid(torch.zeros(real), torch.zeros(fake))


# On real images


def test_halves_of_one_set_are_near_and_damaged_images_are_far(real, features, extractor):
    images, labels = real
    halves = features[:80], features[80:]
    null = evaluate.kid(*halves)
    generator = torch.Generator().manual_seed(0)
    half = images[80:160].float()
    damaged = {
        "blurred": F.avg_pool2d(half, 5, 1, 2),
        "noisy": half + 40 * torch.randn(half.shape, generator=generator),
        "collapsed": half[:1].expand_as(half),
        "static": torch.randint(0, 256, half.shape, generator=generator),
    }
    found = {
        name: evaluate.kid(halves[0], extractor(d.round().clamp(0, 255).to(torch.uint8)))
        for name, d in damaged.items()
    }
    one_class = images[labels == 3][:40]
    found["one class"] = evaluate.kid(halves[0][:40], extractor(one_class))
    print(f"null {null:.4f}", {name: round(value, 3) for name, value in found.items()})
    assert abs(null) < 0.15  # some three standard deviations for 80 against 80
    assert min(found.values()) > 0.5


def test_features_do_not_depend_on_company_channels_or_precision(real, extractor):
    images = real[0][:40]
    together = extractor(images)
    assert together.shape == (40, extractor.dim) and together.dtype == torch.float32
    assert not together.requires_grad and not extractor.training
    assert torch.allclose(extractor(images[7:9]), together[7:9], atol=1e-5)
    assert torch.equal(extractor(images.expand(-1, 3, -1, -1)), together)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(images), together)


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


def score(ranks: Ranks, limit: int = 12) -> dict[str, float]:
    """Images of the shards, brightened, against held-out ones: sizes that neither 3 ranks nor 8 divide."""
    images = stored_images()[0]
    data = Data(train=str(SHARDS), size=28, channels=1, holdout=0.1)
    index = load_index(str(SHARDS))
    plan = heldout_plan(index.sizes, 0, data.window, data.holdout, data.folds, data.fold)
    extractor = load_features("efflite0")
    real = evaluate.heldout_features(extractor, index, plan, ranks, data, limit, batch=8)
    calls = []

    def generate(start: int, count: int) -> torch.Tensor:
        assert start >= 0 and start + count <= len(real)
        calls.append(count)
        return images[start : start + count].float().mul(1.3).clamp(0, 255).to(torch.uint8)

    scores = evaluate.evaluate(generate, real, extractor, ranks, batch=8)
    assert ranks.gather_objects(calls) == [calls] * ranks.world  # as collective forwards must
    return scores


def run_rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    torch.set_num_threads(1)
    ranks = Ranks(read_launch(), timedelta(seconds=60))
    scores = ranks.gather_objects([score(ranks, 26), score(ranks, 2)])
    if ranks.main:
        Path(folder, "scores.json").write_text(json.dumps(scores))
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
    assert len(list(folder.rglob("*.safetensors"))) == 2
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    for limit, found in zip((26, 2), of_ranks[0], strict=True):
        expected = score(alone, limit)
        assert expected["Metrics/kid_efflite0_real_images"] == limit
        assert expected["Metrics/kid_efflite0_fake_images"] == limit
        assert found == pytest.approx(expected, abs=2e-5)


def test_the_cache_gives_the_same_number_and_a_damaged_one_is_not_believed(alone, own_cache, monkeypatch):
    first = score(alone)
    (file,) = own_cache.rglob("*.safetensors")
    content = file.read_bytes()

    flipped = bytearray(content)
    flipped[-1000] ^= 1
    for damaged in (content[: len(content) // 2], b"", bytes(flipped)):
        file.write_bytes(damaged)
        assert score(alone) == first
        assert file.stat().st_size == len(content)  # written anew

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("the real features were computed again")

    monkeypatch.setattr(evaluate, "heldout_batches", unexpected)
    assert score(alone) == first
    with pytest.raises(AssertionError, match="again"):
        score(alone, limit=11)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, alone, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "file"))
    cache.write_tensor("features", {"of": "nothing"}, torch.ones(2))
    assert "could not be kept" in caplog.text
    assert cache.read_tensor("features", {"of": "nothing"}) is None


def test_too_few_held_out_images_are_refused(alone):
    data = Data(train=str(SHARDS), size=28, channels=1, holdout=0)
    index = load_index(str(SHARDS))
    plan = heldout_plan(index.sizes, 0, data.window, 0, None, 0)
    with pytest.raises(UserError, match=r"0 images are held out.*data\.holdout"):
        evaluate.heldout_features(load_features("efflite0"), index, plan, alone, data, 100)
