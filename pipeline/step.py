"""One alternating update of a GAN: D learns to tell real from fake, G answers, G_ema follows.

    L_D = E[loss on D(x) and D(G(z))] + λ_D ‖W_D‖²        minimised by D
    L_G = E[loss on D(G(z))]          + λ_G ‖W_G‖²        minimised by G

The weight penalties are part of `step()`: their gradient is added on each rank's shards of the weights,
without autograd or communication (pipeline/parallel/weight_penalty.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from pipeline.data.stream import Batch
from pipeline.gan.gradient_penalty import judge
from pipeline.gan.images import to_float
from pipeline.players import Gan
from pipeline.run.stats import Stats


def train_step(gan: Gan, reals: Iterator[Batch], cur_nimg: int, stats: Stats) -> int:
    """One alternating update; returns cur_nimg after it. Nothing in it waits for the device."""
    now = gan.at(cur_nimg)
    for _ in range(gan.D_steps):
        batch = next(reals)
        update_D(gan, batch, cur_nimg, stats)
        cur_nimg += gan.batch_size
    update_G(gan, batch, cur_nimg, stats)
    gan.G_ema.update(now.ema_beta)
    return cur_nimg


def update_D(gan: Gan, batch: Batch, cur_nimg: int, stats: Stats) -> None:
    """D on real images, D on fakes, one step of D."""
    G, D, now = gan.G, gan.D, gan.at(cur_nimg)
    with D.updating(frozen=G, twice=any(penalty.twice for penalty in now.gradient_penalties)):
        for drawn, images, c in D.rounds(gan.draw("D", cur_nimg), batch.images, batch.labels):
            fake_c = c if gan.losses.paired else drawn.c
            seen = partial(judge, D, gan.augment, augmentation=drawn.augmentation)
            real = seen(to_float(images), c, differentiate=now.differentiates("real"))
            fake = seen(G(drawn.z, fake_c).detach(), fake_c, differentiate=now.differentiates("fake"))
            loss = adversarial = gan.losses.d(real.logits, fake.logits)
            for penalty in now.gradient_penalties:
                value = penalty(real, fake, drawn.mix, drawn.key)
                loss = loss + value
                stats.mean(f"Loss/D/{penalty.name}_penalty", value)
            D.backward(loss)
            stats.mean("Loss/D/adversarial", adversarial)
            stats.scores(real.logits, fake.logits, gan.losses.paired)
        stats.add(D.step(now.D))


def update_G(gan: Gan, batch: Batch, cur_nimg: int, stats: Stats) -> None:
    """G through the updated, frozen D, one step of G. batch: D's last, which a paired loss compares with."""
    G, D, now = gan.G, gan.D, gan.at(cur_nimg)
    pairs = (batch.images, batch.labels) if gan.losses.paired else (None, None)
    with G.updating(frozen=D, twice=now.path is not None and now.path.twice):
        for drawn, images, c in G.rounds(gan.draw("G", cur_nimg), *pairs):
            fake_c = c if gan.losses.paired else drawn.c
            real_logits = None
            if images is not None:
                with D.unobserved():  # first: stage 3 keeps gathered what it ran after a pass with gradient
                    real_logits = D(gan.augment(to_float(images), drawn.augmentation), c)
            fakes = G(drawn.z, fake_c)
            fake_logits = D(gan.augment(fakes, drawn.augmentation), fake_c)
            loss = adversarial = gan.losses.g(fake_logits, real_logits)
            if now.path is not None:
                value = now.path(fakes, G.latent, G.moving_mean, drawn.key)
                loss = loss + value
                stats.mean("Loss/G/path_penalty", value)
                stats.mean("Progress/path_length", G.moving_mean.value)
            G.backward(loss)
            stats.mean("Loss/G/adversarial", adversarial)
        stats.add(G.step(now.G))
