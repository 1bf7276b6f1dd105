"""One alternating update of a GAN: D learns to tell real from fake, G answers, G_ema follows.

    L_D = E[loss on D(x) and D(G(z))] + λ_D ‖W_D‖²        minimised by D
    L_G = E[loss on D(G(z))]          + λ_G ‖W_G‖²        minimised by G

The weight penalties are part of `step()`: their gradient is added to each rank's own shards of the
weights, which needs no autograd and no communication (pipeline/parallel/weight_penalty.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.config import R1
from pipeline.data.stream import Batch
from pipeline.gan.draws import Drawn, Draws
from pipeline.gan.gradient_penalty import r1
from pipeline.gan.images import to_float
from pipeline.gan.losses import Adversarial
from pipeline.parallel.ema import Ema
from pipeline.parallel.engine import Engine
from pipeline.run.stats import Stats


@dataclass(frozen=True)
class Gan:
    """Both players, the average that is sampled, and what they play for."""

    G: Engine
    D: Engine
    G_ema: Ema
    losses: Adversarial
    draws: Draws
    r1: R1
    batch_size: int  # global, per D update
    D_steps: int
    ema_beta: Callable[[int], float]  # cur_nimg before an update → the share of G_ema that it keeps

    def latents(self, player: str, cur_nimg: int) -> Drawn:
        return self.draws.latents(player, cur_nimg, self.batch_size)

    def r1_factor(self, cur_nimg: int) -> int:
        """Lazy regularisation: 0 in most D updates and `interval` in every interval-th, told by cur_nimg."""
        return 0 if cur_nimg // self.batch_size % self.r1.interval else self.r1.interval


def train_step(gan: Gan, reals: Iterator[Batch], cur_nimg: int, stats: Stats) -> int:
    """One alternating update; returns cur_nimg after it. Nothing in it waits for the device."""
    beta = gan.ema_beta(cur_nimg)
    for _ in range(gan.D_steps):
        update_D(gan, next(reals), cur_nimg, stats)
        cur_nimg += gan.batch_size
    update_G(gan, cur_nimg, stats)
    gan.G_ema.update(beta)
    return cur_nimg


def update_D(gan: Gan, reals: Batch, cur_nimg: int, stats: Stats) -> None:
    """D on real images, D on fakes, one step of D."""
    G, D = gan.G, gan.D
    r1_factor = gan.r1_factor(cur_nimg) if gan.r1.gamma else 0
    with D.updating(frozen=G):
        for z, fake_c, images, c in D.rounds(gan.latents("D", cur_nimg), reals.images, reals.labels):
            real = to_float(images).requires_grad_(r1_factor > 0)
            real_logits = D(real, c)
            fake_logits = D(G(z, fake_c), fake_c)
            loss = adversarial = gan.losses.d(real_logits, fake_logits)
            if gan.r1.gamma:
                penalty = r1_factor * r1(real, real_logits, gan.r1.gamma) if r1_factor else 0 * adversarial
                loss = loss + penalty
                stats.mean("Loss/D/r1_penalty", penalty)
            D.backward(loss)
            stats.mean("Loss/D/adversarial", adversarial)
            stats.scores("real", real_logits)
            stats.scores("fake", fake_logits)
        stats.add(D.step())


def update_G(gan: Gan, cur_nimg: int, stats: Stats) -> None:
    """G through the updated, frozen D, one step of G."""
    G, D = gan.G, gan.D
    with G.updating(frozen=D):
        for z, fake_c in G.rounds(gan.latents("G", cur_nimg)):
            adversarial = gan.losses.g(D(G(z, fake_c), fake_c))
            G.backward(adversarial)
            stats.mean("Loss/G/adversarial", adversarial)
        stats.add(G.step())
