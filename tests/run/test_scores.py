"""Scores of feature sets: against independent implementations, in closed form, and on real images."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_evaluate import stored_images
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from pipeline.config import Score
from pipeline.run import scores
from pipeline.run.features import load_features
from pipeline.run.metrics import METRICS, leading_chart

HALF = 80


@pytest.fixture(scope="module")
def features():
    """Features of real images and of damaged ones, by name: 80 x 1280 each."""
    images, labels = stored_images()
    generator = torch.Generator().manual_seed(0)
    half = images[HALF : 2 * HALF].float()
    sets = {
        "one half": images[:HALF],
        "other half": half,
        "blurred": F.avg_pool2d(half, 5, 1, 2),
        "noisy": half + 40 * torch.randn(half.shape, generator=generator),
        "collapsed": half[:1] + torch.randn(half.shape, generator=generator),
        "one class": images[labels == 3].repeat(3, 1, 1, 1)[:HALF].float()
        + torch.randn(half.shape, generator=generator),
    }
    extractor = load_features("efflite0")
    return {name: extractor(x.round().clamp(0, 255).to(torch.uint8)) for name, x in sets.items()}


@pytest.fixture(scope="module")
def narrow(features):
    """Real and noisy images' features, projected to fewer dimensions than images: float64 [80, 24] each."""
    directions = torch.randn(1280, 24, generator=torch.Generator().manual_seed(1)).double()
    return [features[name].double() @ directions for name in ("one half", "noisy")]


def test_kid_equals_torchmetrics_and_the_double_loop():
    real, fake = torch.rand(2, 23, 40, generator=torch.Generator().manual_seed(0)).double()
    fake = fake + 0.1

    def k(x, y):
        return (float(x @ y) / 40 + 1) ** 3

    n = len(real)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    direct = sum((k(real[i], real[j]) + k(fake[i], fake[j])) / (n * (n - 1)) for i, j in pairs if i != j)
    direct -= 2 * sum(k(real[i], fake[j]) for i, j in pairs) / n**2
    assert scores.kid(real, fake) == pytest.approx(direct, abs=1e-12)
    assert scores.kid(real, fake) == pytest.approx(float(poly_mmd(real, fake)), abs=1e-12)


def test_kid_block_by_block_is_kid(monkeypatch, features):
    real, fake = features["one half"], features["other half"] + 0.05
    whole = scores.kid(real, fake)
    monkeypatch.setattr(scores, "_BLOCK", 7)  # does not divide 80
    assert scores.kid(real, fake) == pytest.approx(whole, abs=1e-11)
    assert whole == pytest.approx(float(poly_mmd(real.double(), fake.double())), abs=1e-11)


def test_kid_of_identical_sets_is_negative_in_closed_form(features):
    """Within a set the U-statistic omits the diagonal, the largest entries; across sets nothing."""
    x = features["one half"].double()
    kernel = (x @ x.T / 1280 + 1) ** 3
    n, total, diagonal = 80, kernel.sum(), kernel.trace()
    expected = 2 * (total - diagonal) / (n * (n - 1)) - 2 * total / n**2
    assert scores.kid(x, x) == pytest.approx(float(expected), abs=1e-11)
    assert scores.kid(x, x) < 0


def test_kid_refuses_what_it_cannot_compare():
    for real, fake in [((5, 4), (4, 4)), ((1, 4), (1, 4)), ((5, 4), (5, 3))]:
        with pytest.raises(ValueError, match="n ≥ 2"):
            scores.kid(torch.zeros(real), torch.zeros(fake))


# The Fréchet distance


def test_frechet_equals_torchmetrics_and_numpy(narrow):
    real, fake = narrow
    moments = [(x.mean(dim=0), x.T.cov()) for x in narrow]
    assert scores.frechet(real, fake) == pytest.approx(
        float(_compute_fid(*moments[0], *moments[1])), rel=1e-9
    )
    (m1, c1), (m2, c2) = ((np.mean(x, 0), np.cov(x.T)) for x in (real.numpy(), fake.numpy()))
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real
    direct = ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * roots.sum()
    assert scores.frechet(real, fake) == pytest.approx(direct, rel=1e-9)


def test_frechet_by_blocks_is_that_of_the_whole(narrow, monkeypatch):
    real, fake = narrow
    whole = scores.frechet(real, fake)
    monkeypatch.setattr(scores, "_ROWS", 7)  # fewer than dimensions; the last block has 3
    assert scores.frechet(real, fake) == pytest.approx(whole, rel=1e-9)


def test_memorisation_by_blocks_is_that_of_the_whole(features, monkeypatch):
    train, heldout, fake = (features[name][:150] for name in ("one half", "other half", "noisy"))
    whole = scores.memorisation(train, heldout, fake)
    monkeypatch.setattr(scores, "_ROWS", 40)
    assert scores.memorisation(train, heldout, fake) == pytest.approx(whole, rel=1e-9)


def test_frechet_of_fewer_images_than_dimensions(features):
    """Against a matrix square root from symmetric eigenvalues of Gram matrices."""
    real, fake = (features[name][:40].double().numpy() for name in ("one half", "noisy"))
    (m1, x), (m2, y) = ((a.mean(0), (a - a.mean(0)) / np.sqrt(39)) for a in (real, fake))
    gram = x @ y.T
    overlap = np.sqrt(np.linalg.eigvalsh(gram @ gram.T).clip(0)).sum()
    direct = ((m1 - m2) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * overlap
    found = scores.frechet(torch.from_numpy(real), torch.from_numpy(fake))
    assert found == pytest.approx(direct, rel=1e-5)
    assert abs(scores.frechet(torch.from_numpy(real), torch.from_numpy(real))) < 1e-8 * (x**2).sum()


def test_frechet_in_one_dimension_is_that_of_means_and_deviations():
    real = torch.tensor([[1.0], [3.0]])
    fake = torch.tensor([[10.0], [16.0]])  # means 2 and 13, deviations √2 and √18
    assert scores.frechet(real, fake) == pytest.approx(121 + (18**0.5 - 2**0.5) ** 2)


# Neighbourhoods


def direct(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """Precision, recall, density and coverage by their definitions, with all differences written out."""

    def distances(x, y):
        return np.sqrt(((x[:, None] - y[None]) ** 2).sum(axis=2))

    r_real, r_fake = (np.sort(distances(x, x), axis=1)[:, k] for x in (real, fake))
    across = distances(fake, real)
    return {
        "precision": (across <= r_real).any(axis=1).mean(),
        "recall": (across <= r_fake[:, None]).any(axis=0).mean(),
        "density": (across < r_real).sum() / (k * len(fake)),
        "coverage": (across < r_real).any(axis=0).mean(),
    }


def test_neighbourhoods_equal_their_definitions(narrow, features, monkeypatch):
    pairs = [narrow, [narrow[0][:50], narrow[1]], [features["one half"].double(), features["noisy"].double()]]
    for block in (2048, 13):  # 13² // 80 = 2 rows at once
        monkeypatch.setattr(scores, "_BLOCK", block)
        for real, fake in pairs:
            expected = direct(real.numpy(), fake.numpy(), 3)
            found = scores.precision_recall(real, fake)
            assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)
            expected = direct(real.numpy(), fake.numpy(), 5)
            found = scores.density_coverage(real, fake)
            assert found == pytest.approx((expected["density"], expected["coverage"]), abs=1e-12)


def test_neighbourhoods_of_identical_and_of_far_sets(narrow):
    real, _ = narrow
    assert scores.precision_recall(real, real) == (1.0, 1.0)
    assert scores.density_coverage(real, real) == (1.0, 1.0)  # k within each radius: itself and k - 1 others
    assert (
        scores.precision_recall(real, real + 1e6) == scores.density_coverage(real, real + 1e6) == (0.0, 0.0)
    )


def test_copies_of_training_images_are_seen(features):
    train, heldout = features["one half"], features["other half"]
    copied = train[:40] + 1e-3
    assert scores.memorisation(train, heldout, copied)[0] < 0.05
    assert scores.memorisation(train, heldout, copied)[1] == 1.0
    ratio, copies = scores.memorisation(train, heldout, heldout)
    assert ratio == 1.0 and copies == pytest.approx(1 / HALF)  # the one below the first hundredth
    half = torch.cat([copied, heldout[:40]])
    assert scores.memorisation(train, heldout, half)[1] == pytest.approx(0.5, abs=0.03)
    # By definition, with all differences written out.
    x, y, pool = (t.double().numpy() for t in (features["noisy"], heldout, train))
    nearest = [np.sqrt(((s[:, None] - pool[None]) ** 2).sum(axis=2)).min(axis=1) for s in (x, y)]
    found = scores.memorisation(train, heldout, features["noisy"])
    lower = [np.sort(n)[(len(n) - 1) // 2] for n in nearest]
    assert found[0] == pytest.approx(lower[0] / lower[1], rel=1e-9)
    assert found[1] == (nearest[0] < np.quantile(nearest[1], 0.01)).mean()


def test_held_out_images_that_are_trained_on_too_hide_no_copies():
    """Data with duplicates: more than a hundredth of the held-out images are at distance 0."""
    numbers = torch.Generator().manual_seed(0)
    train, fresh = torch.randn(300, 32, generator=numbers), torch.randn(100, 32, generator=numbers)
    fake = torch.cat([train[100:130] + 1e-3, torch.randn(70, 32, generator=numbers)])
    # Features of one image, computed in batches of other sizes, differ in their last digits.
    for twins in (train[:5], train[:5] * (1 + 1e-5 * torch.randn(5, 32, generator=numbers))):
        with_twins = torch.cat([fresh, twins])
        assert scores.memorisation(train, with_twins, fake)[1] == scores.memorisation(train, fresh, fake)[1]
    assert scores.memorisation(train, fresh, fake)[1] == pytest.approx(0.3, abs=0.04)
    assert np.isnan(scores.memorisation(train, train[:5], fake)[1])


# On real images


def test_every_score_moves_the_right_way_on_real_images(features):
    real = features["one half"]

    def of(name):
        fake = features[name]
        precision, recall = scores.precision_recall(real, fake)
        density, coverage = scores.density_coverage(real, fake)
        return {
            "kid": scores.kid(real, fake), "fd": scores.frechet(real, fake),
            "precision": precision, "recall": recall, "density": density, "coverage": coverage,
        }  # fmt: skip

    null = of("other half")
    found = {name: of(name) for name in ("blurred", "noisy", "collapsed", "one class")}
    for name, values in {"null": null, **found}.items():
        print(f"{name:10}", {score: round(value, 3) for score, value in values.items()})
    assert abs(null["kid"]) < 0.15  # some three standard deviations for 80 against 80
    for values in found.values():
        assert values["kid"] > 0.5 and values["fd"] > 1.4 * null["fd"]
        assert values["coverage"] < 0.7 * null["coverage"]
        assert values["recall"] < 0.5 * null["recall"]
    for score in (
        "precision",
        "density",
    ):  # odd images; dropped or collapsed sets have good images
        assert found["noisy"][score] < 0.75 * null[score]
        assert found["blurred"][score] < null[score]
        assert found["collapsed"][score] > 0.9 * null[score] < found["one class"][score]


def test_equal_images_are_at_distance_0():
    """By definition, fakes that equal real images count for precision but, with six copies of each, lie in no
    neighbourhood for density, which counts strictly inside."""
    fake = torch.randn(30, 64, generator=torch.Generator().manual_seed(1)) * 3 + 5
    real = fake.repeat(6, 1)
    assert scores.precision_recall(real, fake) == (1.0, 1.0)
    assert scores.density_coverage(real, fake) == (0.0, 0.0)
    assert scores.memorisation(real, fake + 1, fake) == (0.0, 1.0)


# METRICS


def test_the_config_takes_the_metrics_of_the_table():
    literal, _ = get_args(get_type_hints(Score)["metrics"])
    assert list(get_args(literal)) == list(METRICS) == list(scores.FUNCTIONS)


def test_what_leads_is_one_number_and_the_lower_the_better():
    leading = {name: metric for name, metric in METRICS.items() if metric.leads}
    assert list(leading) == ["kid", "fd"]
    assert all(metric.lower_is_better and len(metric.names) == 1 for metric in leading.values())


@pytest.mark.parametrize(
    ("metrics", "chart"),
    [
        (("kid", "fd"), "Metrics/kid_inception"),
        (("pr", "fd", "kid"), "Metrics/fid"),
        (("pr",), None),
        ((), None),
    ],
)
def test_checkpoints_are_compared_by_the_first_that_leads(metrics, chart):
    """On held-out images: not on training images, and not by fid50k_full."""
    charts = [
        "fid50k_full",
        "fid_train",
        "fid",
        "kid_inception_train",
        "kid_inception",
        "precision_inception",
    ]
    assert leading_chart(metrics, [f"Metrics/{name}" for name in charts]) == chart
    charts = ["Metrics/fd_efflite0_train", "Metrics/fd_efflite0"]
    assert leading_chart(["fd"], charts) == "Metrics/fd_efflite0"


def test_the_readme_lists_every_metric():
    readme = (Path(__file__).parents[2] / "launch" / "README.md").read_text()
    assert f"--metrics {','.join(METRICS)} " in readme
