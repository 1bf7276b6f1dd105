"""What metrics.jsonl says adds up, and is what one computes from the weights that were saved."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from launching import BATCH, UPDATES
from safetensors.torch import load_file

from pipeline import config
from pipeline.data.index import load_index
from pipeline.data.plan import split_of
from pipeline.data.stream import heldout_batches
from pipeline.gan.augment import Augmentation
from pipeline.gan.draws import Draws, Samples
from pipeline.gan.networks import build_D, build_G

PARTS = ("adversarial", "l2_penalty", "l1_penalty", "r1_penalty")


def assert_losses_are_the_sum_of_their_parts(rows) -> None:
    trained = [row for row in rows if row["cur_nimg"]]
    assert trained
    for row in trained:
        for player in "GD":
            parts = [row[f"Loss/{player}/{part}"] for part in PARTS if f"Loss/{player}/{part}" in row]
            assert len(parts) >= 2
            assert math.isclose(row[f"Loss/{player}/loss"], sum(parts), rel_tol=1e-12)


def test_a_logged_loss_is_the_sum_of_its_parts_in_every_row(worlds):
    for run in worlds.all():
        assert_losses_are_the_sum_of_their_parts(run.rows)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_logged_penalty_is_that_of_the_weights_before_the_update(worlds, world):
    """With a row and a checkpoint per update: λ·Σw² in float64 over the kernels in the file before it."""
    run = worlds.sgd[world]
    settings = config.load(run.path / "config.yaml")
    initial = {"G": build_G(settings, 0), "D": build_D(settings, 0)}
    rows = {round(row["cur_nimg"]): row for row in run.rows}
    assert sorted(rows) == [BATCH * update for update in range(1, UPDATES + 1)]
    for player, coefficients in (("G", settings.penalty.G), ("D", settings.penalty.D)):
        for nimg, row in rows.items():
            before = nimg - BATCH
            weights = (
                load_file(run.path / "checkpoints" / str(before) / f"{player}-00000.safetensors")
                if before
                else {f"weights/{name}@0": p.detach() for name, p in initial[player].named_parameters()}
            )
            kernels = [t for name, t in weights.items() if name.startswith("weights/") and ".weight@" in name]
            assert len(kernels) == 3
            squares = sum(float(t.double().square().sum()) for t in kernels)
            gradient = 2 * coefficients.l2 * math.sqrt(squares)
            share = gradient / row[f"Gradients/{player}/norm"]
            assert math.isclose(row[f"Loss/{player}/l2_penalty"], coefficients.l2 * squares, rel_tol=1e-6)
            assert math.isclose(row[f"Gradients/{player}/penalty"], gradient, rel_tol=1e-6)
            assert math.isclose(row[f"Gradients/{player}/penalty_share"], share, rel_tol=1e-6)


def test_the_score_of_held_out_images_is_that_of_augmented_ones(worlds):
    """Over two ranks; p is that of the updates of the tick, and the draw that of one process."""
    run, update = worlds.sgd[2], UPDATES - 3
    settings, rows = config.load(run.path / "config.yaml"), run.rows
    nimg, p = update * BATCH, rows[update - 2]["Progress/augment_p"]
    D = build_D(settings, 0)
    weights = load_file(run.path / "checkpoints" / str(nimg) / "D-00000.safetensors")
    with torch.no_grad():
        for name, parameter in D.named_parameters():
            parameter.copy_(weights[f"weights/{name}@0"].view(parameter.shape))
        index = load_index(settings.data.train)
        plan = split_of(settings, index).heldout()
        images = next(heldout_batches(index, plan, settings.data, batch=BATCH))[0].images.float() / 127.5 - 1
        draws, augment = Draws(settings.run.seed, 32, None), Augmentation(settings.augment.ops, 28)
        parameters = draws.augmentation(augment, p, "heldout", nimg, Samples.all(BATCH))
        plain, augmented = (float(D(x).mean()) for x in (images, augment(images, parameters)))
    assert p > 0.1 and abs(plain - augmented) > 1e-3
    assert rows[update - 1]["Loss/scores/heldout"] == pytest.approx(augmented, abs=1e-5)


def test_logged_norms_are_those_of_the_exported_weights(worlds):
    for run in worlds.all():
        for player, weights in run.exported().items():
            if player != "G_ema":
                whole = torch.cat([t.double().flatten() for t in weights.values()])
                assert math.isclose(run.rows[-1][f"Weights/{player}/norm"], float(whole.norm()), rel_tol=1e-6)
                kernels = {name: t.double() for name, t in weights.items() if t.ndim > 1}
                assert len(kernels) == 3
                for name, kernel in kernels.items():
                    logged = run.rows[-1][f"Weights/{player}/norm/{name}"]
                    assert math.isclose(logged, float(kernel.norm()), rel_tol=1e-6)


def largest(run, player: str) -> list[str]:
    """Names of the three largest kernels that are more than a row."""
    shapes = {name: t.shape for name, t in run.exported()[player].items() if t.ndim > 1 and len(t) > 1}
    return sorted(shapes, key=lambda name: (-shapes[name].numel(), name))[:3]


def test_spectra_are_those_of_the_exported_kernels(worlds):
    """At the end of each run, whatever the world; numpy's singular values of whole matrices."""
    for run in worlds.all():
        *_, last = (json.loads(line) for line in (run.path / "spectrum.jsonl").read_text().splitlines())
        assert last.pop("cur_nimg") == run.rows[-1]["cur_nimg"]
        assert last.keys() == {f"{player}/{name}" for player in "GD" for name in largest(run, player)}
        for name, found in last.items():
            player, _, kernel = name.partition("/")
            whole = run.exported()[player][kernel].double().flatten(1).numpy()
            expected = np.linalg.svd(whole, compute_uv=False)
            assert found == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5 * expected[0])
