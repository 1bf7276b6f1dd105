"""A run's exported weights are those of a GAN written as in a tutorial, in plain torch, on the same images.

The loop below shares nothing with pipeline/step.py and pipeline/parallel: whole batches, contiguous tensors,
λ·Σw² inside the loss, torch's for-loop optimizers, `.backward()` through both networks. It reads the images
with tarfile and PIL, in the order of the plan, and adapts the augmentation's p tick by tick.
"""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from launching import ADAM, AFTER_20, BATCH, FASHION, SGD, UPDATES, RunFolder, largest_difference
from PIL import Image
from torch.nn.functional import softplus

from pipeline import config, train
from pipeline.data.plan import Split
from pipeline.gan.augment import Augmentation
from pipeline.gan.draws import Draws, Samples
from pipeline.gan.networks import build_D, build_G

EVERY = Samples.all(BATCH)


def textbook(settings, updates: int):
    """G and D after so many alternating updates on the real images."""
    torch.set_num_threads(1)
    G, D = build_G(settings, 0), build_D(settings, 0)
    G_optimizer, D_optimizer = (_optimizer(m, o) for m, o in ((G, settings.optim.G), (D, settings.optim.D)))
    images, draws = _images_in_order(settings, updates * BATCH), Draws(settings.run.seed, 32, None)
    augment, p, signs = Augmentation(settings.augment.ops, 28), 0.0, []
    for update in range(updates):
        nimg = update * BATCH
        x = images[nimg : nimg + BATCH].float() / 127.5 - 1
        of_D, of_G = (
            draws.augmentation(augment, p, player, at, EVERY)
            for player, at in (("D", nimg), ("G", nimg + BATCH))
        )
        D_optimizer.zero_grad()
        fakes = G(draws.latents("D", nimg, EVERY).z)
        real = D(augment(x, of_D))
        loss = softplus(-real).mean() + softplus(D(augment(fakes, of_D))).mean()
        (loss + settings.penalty.D.l2 * _sum_of_squared_kernels(D)).backward()
        D_optimizer.step()
        G_optimizer.zero_grad()
        fakes = G(draws.latents("G", nimg + BATCH, EVERY).z)
        loss = softplus(-D(augment(fakes, of_G))).mean()
        (loss + settings.penalty.G.l2 * _sum_of_squared_kernels(G)).backward()
        G_optimizer.step()
        signs += real.sign().tolist()
        if len(signs) == round(1000 * settings.run.tick_kimg) and settings.augment.ops:
            step = len(signs) / (1000 * settings.augment.speed_kimg)
            p += step if sum(signs) > settings.augment.target * len(signs) else -step
            p, signs = min(max(p, 0.0), 1.0), []
    return {"G": {k: p.detach() for k, p in G.named_parameters()}, "D": dict(D.state_dict())}


def _sum_of_squared_kernels(module):
    return sum(p.pow(2).sum() for name, p in module.named_parameters() if not name.endswith("bias"))


def _optimizer(module, settings):
    if settings.kind == "sgd":
        return torch.optim.SGD(module.parameters(), settings.lr, settings.momentum, foreach=False)
    return torch.optim.Adam(module.parameters(), settings.lr, settings.betas, settings.eps, foreach=False)


def _images_in_order(settings, count: int) -> torch.Tensor:
    """The first `count` training images, uint8 [count, 1, 28, 28], in the order of the plan."""
    shards = []
    for path in sorted(FASHION.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = [tar.extractfile(m).read() for m in tar if m.name.endswith(".png")]
        shards.append([np.asarray(Image.open(io.BytesIO(data))) for data in files])
    data = settings.data
    sizes = [len(shard) for shard in shards]
    plan = Split(sizes, settings.run.seed, data.window, data.holdout, data.folds, data.fold).training()
    order = plan.samples(0, count).tolist()
    return torch.from_numpy(np.stack([shards[shard][row] for shard, row in order]))[:, None]


def _only_players(exported):
    return {name: exported[name] for name in ("G", "D")}


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_with_penalties_the_weights_are_those_of_autograd(worlds, kind, scratch):
    settings = config.load(worlds.folder / f"{kind}.yaml")
    trained = getattr(worlds, kind)[1].exported_at(AFTER_20, scratch())
    expected = textbook(settings, UPDATES)
    assert largest_difference(_only_players(trained), expected) <= 1e-6


@pytest.mark.parametrize(("kind", "text"), [("adam", ADAM), ("sgd", SGD)])
def test_without_penalties_the_weights_are_those_of_the_bare_losses(tmp_path, signals_kept, kind, text):
    """λ = 0 and no augmentation, in this process: what is compared is arithmetic.

    Adam divides by the size of the gradient, and without penalties some gradients are all but rounding
    (weights into units that hardly ever fire): one of 1e-9 ± 1e-10 would move its weight by up to the
    learning rate, in a direction that rounding decides. An eps of 1e-5 keeps those where they are, and is
    in the reference too. SGD needs no such thing.
    """
    (tmp_path / "zero.yaml").write_text(text)
    changes = [
        "penalty.l2=0",
        "augment.ops=[]",
        "augment.target=null",
        "run.total_kimg=0.24",
        "score.metrics=[]",
        f"run.out={tmp_path}",
    ]
    changes += ["optim.G.eps=1e-5", "optim.D.eps=1e-5"] if kind == "adam" else []
    arguments = [str(tmp_path / "zero.yaml"), *changes]
    assert train.main(arguments) == 0
    settings = config.load(arguments[0], changes)
    assert settings.penalty.G.l2 == settings.penalty.D.l2 == 0
    trained = RunFolder(tmp_path / "zero").exported()
    assert largest_difference(_only_players(trained), textbook(settings, UPDATES)) <= 1e-6


def test_the_comparison_can_fail(configs):
    """A penalty that is halved, or divided by two ranks, is seen by a wide margin."""
    right, wrong = (config.load(configs / "sgd.yaml", [f"penalty.D.l2={x}"]) for x in (2e-3, 1e-3))
    assert largest_difference(textbook(right, 5), textbook(wrong, 5)) > 1e-5
