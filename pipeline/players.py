"""The Gan that is trained: a config's networks as engines, under the strategy of the launcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.config import Config, WeightPenalty
from pipeline.gan.adaptive import AdaptiveP
from pipeline.gan.augment import Augmentation
from pipeline.gan.draws import Drawn, Draws, Samples
from pipeline.gan.frozen import constants_of
from pipeline.gan.images import is_channels_last
from pipeline.gan.losses import Adversarial, adversarial
from pipeline.gan.networks import build_D, build_G
from pipeline.gan.penalised import penalised, resolved
from pipeline.gan.schedules import Now, at
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.build import build_engine
from pipeline.parallel.copying import whole_copy
from pipeline.parallel.ema import Ema
from pipeline.parallel.engine import Engine, PlayerSettings
from pipeline.parallel.ranks import Ranks


@dataclass(frozen=True)
class Gan:
    """Both players, G's moving average, which is sampled, and their losses."""

    G: Engine
    D: Engine
    G_ema: Ema
    losses: Adversarial
    draws: Draws
    at: Callable[[int], Now]  # images shown so far → all that depends on progress
    batch_size: int  # global, per D update
    D_steps: int
    augment: Augmentation  # of all that D sees
    mixes: bool = False  # whether D's turn looks between real and fake images
    style_mixing: float = 0.0  # the share of images with two latents
    adaptive: AdaptiveP | None = None  # where p is neither given nor scheduled

    def draw(self, player: str, cur_nimg: int) -> Drawn:
        """The random inputs of a player's turn, for this rank's samples in the order of rounds."""
        mine = self.D.samples
        drawn = self.draws.latents(player, cur_nimg, mine, labels=not self.losses.paired)
        drawn = drawn._replace(augmentation=self.augmentation(player, cur_nimg, mine))
        if self.style_mixing:
            drawn = drawn._replace(z=self.draws.mixed(drawn.z, self.style_mixing, player, cur_nimg, mine))
        if self.mixes and player == "D":
            drawn = drawn._replace(mix=self.draws.uniform("mix", cur_nimg, mine))
        return drawn

    def augmentation(self, purpose: str, cur_nimg: int, samples: Samples) -> Tensor | None:
        """Parameters of `augment` for these samples; None while p is 0."""
        if not (p := self.augment_p(cur_nimg)):
            return None
        return self.draws.augmentation(self.augment, p, purpose, cur_nimg, samples)

    def augment_p(self, cur_nimg: int) -> float:
        """The probability of each operation in the update that begins after cur_nimg images."""
        return self.adaptive.p if self.adaptive else self.at(cur_nimg).augment_p

    def adapt(self, sums: Mapping[str, tuple[float, float]], cur_nimg: int) -> None:
        """At a tick: an adaptive p follows what D has said since the last one, of each or of pairs of images.
        sums: see Reduced."""
        if self.adaptive:
            signs = "paired" if self.losses.paired else "real"
            self.adaptive.observe(*sums[f"Loss/signs/{signs}"], cur_nimg)


def build(
    config: Config,
    ranks: Ranks,
    batch: BatchShape,
    label_frequencies: list[float] | None = None,
    fill: Callable[[str, nn.Module], None] = lambda player, network: None,
) -> Gan:
    """label_frequencies: of the training images, for fake labels; None: an unconditional Gan. fill: is given
    each player's name and whole network on the CPU, to change its weights before they are sharded."""
    num_classes = len(label_frequencies or ())
    ranks.progress.doing = "building the networks"
    networks = {"G": build_G(config, num_classes), "D": build_D(config, num_classes)}
    for name, network in networks.items():
        fill(name, network)
    whole_G = whole_copy(networks["G"]).to(ranks.device)
    data, zeros = config.data, partial(torch.zeros, device=ranks.device)
    c = zeros(2, dtype=torch.int64) if num_classes else None
    inputs = {"G": zeros(2, config.G.z_dim), "D": zeros(2, data.channels, data.size, data.size)}

    def engine(name: str) -> Engine:
        network, optimizer = networks[name], getattr(config.optim, name)
        penalty: WeightPenalty = getattr(config.penalty, name)
        penalty = replace(penalty, on=resolved(network, penalty.on))
        constants = constants_of(network, config.D.freeze) if name == "D" and ranks.main else {}
        covered, last = penalised(network, penalty.on), is_channels_last(network)
        player = PlayerSettings(name, optimizer, penalty, covered, last, constants)
        return build_engine(network, player, ranks, batch, (inputs[name], c))

    G, D = engine("G"), engine("D")
    target, speed, tick = config.augment.target, config.augment.speed_kimg, config.run.tick_kimg
    adaptive = None if target is None else AdaptiveP(target, speed, tick)
    return Gan(
        G=G,
        D=D,
        G_ema=Ema(G, whole_G),
        losses=adversarial(config.loss.kind),
        draws=Draws(config.run.seed, config.G.z_dim, label_frequencies),
        at=partial(at, config),
        batch_size=data.batch_size,
        D_steps=config.loss.D_steps,
        augment=Augmentation(config.augment.ops, data.size),
        mixes=config.penalty.wgan_gp.weight > 0,
        style_mixing=float(getattr(networks["G"], "style_mixing", 0.0)),
        adaptive=adaptive,
    )


def as_built(config: Config, gan: Gan) -> Config:
    """The config, with what `penalty.on: auto` means for each of these players."""
    penalty = replace(config.penalty, G=gan.G.player.penalty, D=gan.D.player.penalty)
    return replace(config, penalty=penalty)
