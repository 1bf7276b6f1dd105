"""Which objectives which networks admit: decided on the built module, not on the config's keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from pipeline.config import Config, Discriminator, Generator, UserError
from pipeline.gan.schedules import is_used

_COARSE = 0.03  # σ; at 0.01 bf16's rounding of the logits makes the penalty 1.9 times as large, here 1.1
_LEAKS = 0.8  # p above which G cannot tell how images are without augmentation


def check_objective(config: Config, images: int, precision: str) -> None:
    """Raise UserError for an objective that cannot be trained in this precision, or in rounds of so many
    images on a rank."""
    _refuse([*_of_precision(config, precision), *_of_fractions(config, images)])


def check_layers(config: Config, D: nn.Module) -> None:
    """Raise UserError for an objective that needs other layers than D has."""
    _refuse([*_of_layers(config, D)])


def check_path(config: Config, G: nn.Module, images: Tensor) -> None:
    """Raise UserError if G's path length cannot be taken. images: of G's last pass, made with gradients."""
    _refuse([*_of_latent(config, G, images)])


def _refuse(problems: list[str]) -> None:
    if problems:
        lines = ["This objective cannot be trained as it stands:", *(f"  {p}." for p in problems)]
        raise UserError("\n".join(lines))


def _of_precision(config: Config, precision: str) -> Iterator[str]:
    if precision != "fp16":
        return
    penalty = config.penalty
    used = {
        "loss.kind=relativistic": config.loss.kind == "relativistic",
        "penalty.r2": is_used(penalty.r2.gamma),
        "penalty.wgan_gp": penalty.wgan_gp.weight > 0,
        "penalty.path": penalty.path.weight > 0,
    }
    for what in (name for name, there in used.items() if there):
        yield f"{what} under fp16, in which its inner gradients underflow: use --mixed_precision bf16"


def _of_layers(config: Config, D: nn.Module) -> Iterator[str]:
    """Layers by which an image's logit depends on other images, or two passes on one image differ."""
    penalty, slopes = config.penalty, {"r1": config.penalty.r1, "r2": config.penalty.r2}
    used = {name: slope for name, slope in slopes.items() if is_used(slope.gamma)}
    if any(isinstance(layer, _BatchNorm) for layer in D.modules()):
        reasons = {
            "loss.kind=relativistic": config.loss.kind == "relativistic",
            "penalty.r2": "r2" in used,
            "penalty.wgan_gp": penalty.wgan_gp.weight > 0,
            **{f"penalty.{name}.fraction": slope.fraction < 1 for name, slope in used.items()},
            **{f"penalty.{name}.sigma": slope.sigma > 0 for name, slope in used.items()},
        }
        for what in (name for name, there in reasons.items() if there):
            yield (
                f"{what} together with batch normalisation in D, where an image's logit depends on the other "
                "images: set D.norm to none, group or instance"
            )
    noisy = any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in D.modules())
    for name in (name for name, slope in used.items() if slope.sigma and noisy):
        yield (
            f"penalty.{name}.sigma compares two passes of D, between which dropout alone makes a difference: "
            f"set D.dropout=0, or penalty.{name}.sigma=0"
        )


def _of_latent(config: Config, G: nn.Module, images: Tensor) -> Iterator[str]:
    latent = getattr(G, "latent", None)
    if any(isinstance(layer, _BatchNorm) for layer in G.modules()):
        yield (
            "penalty.path together with batch normalisation in G, where an image depends on the latents of "
            "the others: set G.norm to none, group or instance"
        )
    if not isinstance(latent, Tensor) or latent.ndim not in (2, 3) or len(latent) != len(images):
        found = list(latent.shape) if isinstance(latent, Tensor) else type(latent).__name__
        yield (
            "penalty.path needs a G that sets self.latent in its forward: a tensor [N, w_dim] or "
            f"[N, layers, w_dim] that its images are computed from. G.kind={config.G.kind} has "
            f"{'none' if latent is None else found}"
        )
    elif not latent.requires_grad or torch.autograd.grad(images.sum(), latent, allow_unused=True)[0] is None:
        yield (
            f"penalty.path: the images of G.kind={config.G.kind} are not computed from the very tensor that "
            "it sets self.latent to, or this tensor not by layers that train"
        )


def _of_fractions(config: Config, images: int) -> Iterator[str]:
    for name in ("r1", "r2"):
        slope = getattr(config.penalty, name)
        every = round(1 / slope.fraction)
        if is_used(slope.gamma) and images % every:
            yield (
                f"penalty.{name}.fraction=1/{every}: {every} does not divide the images of a rank "
                f"and round, {images}. Change the fraction, data.batch_size or data.batch_gpu"
            )


def _without_effect(section: Generator | Discriminator) -> list[str]:
    """Keys that are set, but are not given to a class of a user's own."""
    if ":" not in section.kind:
        return []
    default = type(section)()
    names = {field.name for field in dataclasses.fields(section)} - {"kind", "options", "z_dim", "freeze"}
    return sorted(name for name in names if getattr(section, name) != getattr(default, name))


def remarks(config: Config, precision: str) -> Iterator[str]:
    """What to know about the networks and the objective, a line each."""
    for player, section in (("G", config.G), ("D", config.D)):
        if unused := ", ".join(f"{player}.{key}" for key in _without_effect(section)):
            yield f"{unused}: without effect on {section.kind}, which gets {player}.options: write them there"
    p = config.augment.p or 0.0
    if (highest := max(p) if isinstance(p, tuple) else p) > _LEAKS:
        yield (
            f"augment.p={highest:g}: above {_LEAKS:g}, G may learn to make augmented images (Karras et "
            "al. 2020, section 2.2)"
        )
    for name in ("r1", "r2"):
        slope = getattr(config.penalty, name)
        if not is_used(slope.gamma):
            continue
        if config.loss.kind == "relativistic" and slope.interval > 1:
            yield (
                f"penalty.{name}.interval={slope.interval}: the relativistic loss converges with one in "
                "every update, and may not with a lazy one (Huang et al. 2024, app. E)"
            )
        if slope.sigma:
            yield (
                f"penalty.{name}.sigma={slope.sigma:g} estimates the penalty along noise, on "
                f"{config.data.batch_size * slope.fraction:.0f} images in an update. At γ = 1 and 28 px, "
                "with fewer than about 100, its noise outweighs the adversarial gradient. It is proportional "
                "to γ, and grows with the number of pixels"
            )
        if slope.sigma and slope.sided == 1:
            yield (
                f"penalty.{name}.sided=1 is biased whatever the batch, 3 to 18 times too large on images "
                "with flat areas, at which leaky ReLUs bend; sided=2 was at most 40 % too small"
            )
        if slope.sigma and slope.sigma < _COARSE and precision == "bf16":
            yield (
                f"penalty.{name}.sigma={slope.sigma:g} under bf16: rounding of logits makes it too large. "
                f"Use {_COARSE} or more"
            )
