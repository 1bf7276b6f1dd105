"""The reference of the parity matrix: a GAN trained as in a textbook, in one process, by autograd.

It uses nothing of pipeline/parallel or pipeline/step.py: the penalty is λ·Σp² inside the loss, the whole
batch passes at once, the optimizers are torch's for-loop ones, and the average is a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from launch.selfcheck.parity import UPDATES, Case, Tensors, initial_state, reals
from pipeline.config import Config, Optimizer, Schedulable, WeightPenalty
from pipeline.gan.augment import Augmentation
from pipeline.gan.draws import Draws, Samples
from pipeline.gan.networks import build_D, build_G
from pipeline.gan.noise import Stream, keys_of, noise_like


def untrained(case: Case) -> Tensors:
    """Weights of G, D and G_ema before the first update."""
    config, state = case.config(world=1), initial_state(case)
    players = {"G": build_G(config, state.num_classes), "D": build_D(config, state.num_classes)}
    players["G_ema"] = players["G"]
    return {f"{name}/{key}": p.detach() for name, module in players.items() for key, p in _trained(module)}


@sdpa_kernel(SDPBackend.MATH)  # which can be differentiated twice
def train(case: Case, device: str = "cpu") -> tuple[Tensors, list[dict[str, float]]]:
    """Weights of G, D and G_ema after all updates, and each update's losses, penalties and gradient norms."""
    config, state = case.config(world=1), initial_state(case)
    rows: list[dict[str, float]] = []
    G = build_G(config, state.num_classes).to(device)
    D = build_D(config, state.num_classes).to(device)
    _normalise_by_round(case.rounds, G, D)
    G_ema = {name: p.detach().clone() for name, p in G.named_parameters()}
    G_optimizer, D_optimizer = _optimizer(G, config.optim.G), _optimizer(D, config.optim.D)
    draws, every = Draws(config.run.seed, config.G.z_dim, state.label_frequencies), Samples.all(case.batch)
    batches = iter(reals(case, UPDATES * config.loss.D_steps))
    nimg, path_length, adapted = 0, 0.0, 0.0
    for _ in range(UPDATES):
        start, D_rows = nimg, []
        for _ in range(config.loss.D_steps):
            batch = next(batches)
            images, c = _on(device, batch.images, batch.labels)
            z, fake_c = _on(device, *_latents(draws, G, "D", nimg, case.batch))
            assert images is not None and z is not None
            fake_c = c if config.loss.kind == "relativistic" else fake_c
            x, y = (images.float() / 127.5 - 1).requires_grad_(), G(z, fake_c).detach().requires_grad_()
            see = _seeing(config, D, draws, "D", nimg, adapted)
            real, fake = see(x, c), see(y, fake_c)
            signs = (real - fake if config.loss.kind == "relativistic" else real).sign()
            parts = {"adversarial": _d_loss(config.loss.kind, real, fake)}
            parts |= _slopes(config, D, {"r1": (x, c, real), "r2": (y, fake_c, fake)}, z, nimg)
            parts |= _between(config, see, x, y, c, draws.uniform("mix", nimg, every).to(device))
            parts |= _penalties(config, "D", D, nimg)
            _set_rates(config, "D", D_optimizer, nimg)
            D_rows.append(_update("D", D, D_optimizer, parts, config.optim.D.clip))
            nimg += case.batch
        z, fake_c = _on(device, *_latents(draws, G, "G", nimg, case.batch))
        assert z is not None
        fake_c = c if config.loss.kind == "relativistic" else fake_c
        see = _seeing(config, D, draws, "G", nimg, adapted)
        real = see(x, c).detach() if config.loss.kind == "relativistic" else x.new_zeros(())
        fakes = G(z, fake_c)
        parts = {"adversarial": _g_loss(config.loss.kind, see(fakes, fake_c), real)}
        charts = {}
        if config.penalty.path.weight:
            charts["Progress/path_length"] = path_length
            parts["path_penalty"], path_length = _path(config, G, fakes, z, len(rows), path_length)
        parts |= _penalties(config, "G", G, nimg)
        _set_rates(config, "G", G_optimizer, nimg)
        rows.append(_mean(D_rows) | _update("G", G, G_optimizer, parts, config.optim.G.clip) | charts)
        adapted = _adapted(config, adapted, signs, nimg - start)
        half_life = 1000 * _at(config.ema.kimg, config, start)
        if not isinstance(config.ema.kimg, tuple):
            half_life = min(half_life, config.ema.rampup * start)
        beta = 0.5 ** ((nimg - start) / half_life) if half_life else 0.0
        for name, p in G.named_parameters():
            G_ema[name] = beta * G_ema[name] + (1 - beta) * p.detach()
    tensors = {f"G/{name}": p.detach() for name, p in _trained(G)}
    tensors |= {f"D/{name}": p.detach() for name, p in _trained(D)}
    tensors |= {f"G_ema/{name}": G_ema[name] for name, _ in _trained(G)}
    return {name: p.cpu() for name, p in tensors.items()}, rows


def _latents(draws: Draws, G: nn.Module, player: str, nimg: int, count: int) -> tuple[Tensor, Tensor | None]:
    """z and labels; with two z and a crossover if G mixes styles."""
    z, c, *_ = draws.latents(player, nimg, Samples.all(count))
    share = getattr(G, "style_mixing", 0.0)
    return (draws.mixed(z, share, player, nimg, Samples.all(count)) if share else z), c


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _on(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(device) for t in tensors]


Seeing = Callable[[Tensor, Tensor | None], Tensor]  # images, labels → logits


def _seeing(config: Config, D: nn.Module, draws: Draws, player: str, nimg: int, adapted: float) -> Seeing:
    """D on augmented images. adapted: what p is where it adapts."""
    p = adapted if config.augment.p is None else _at(config.augment.p, config, nimg)
    augment, every = Augmentation(config.augment.ops, config.data.size), Samples.all(config.data.batch_size)
    parameters = draws.augmentation(augment, p, player, nimg, every)

    def seen(images: Tensor, c: Tensor | None) -> Tensor:
        logits: Tensor = D(augment(images, parameters.to(images.device)), c)
        return logits

    return seen


def _adapted(config: Config, p: float, signs: Tensor, images: int) -> float:
    """p after an update, with which a tick ends."""
    if config.augment.target is None:
        return p
    step = images / (1000 * config.augment.speed_kimg)
    return min(max(p + (step if float(signs.detach().mean()) > config.augment.target else -step), 0.0), 1.0)


def _normalise_by_round(rounds: int, *networks: nn.Module) -> None:
    """Let batch norm see one round of the batch after another, all that rounds change."""
    for norm in (m for network in networks for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.forward = partial(_each_part, norm.forward, rounds)  # type: ignore[method-assign]


def _each_part(norm: Callable[[Tensor], Tensor], rounds: int, x: Tensor) -> Tensor:
    return torch.cat([norm(part) for part in x.chunk(rounds)])


def _update(
    player: str, module: nn.Module, optimizer: torch.optim.Optimizer, parts: Tensors, clip: float | None
) -> dict[str, float]:
    """One step on the sum of the parts of a player's loss."""
    optimizer.zero_grad()
    torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
    parameters = [p for p in module.parameters() if p.grad is not None]
    squares = sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None)
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    row = {f"Loss/{player}/{part}": float(value.detach()) for part, value in parts.items()}
    row[f"Loss/{player}/loss"] = sum(row.values())
    return row | {f"Gradients/{player}/norm": squares**0.5}


Seen = tuple[Tensor, Tensor | None, Tensor]  # images, labels, logits


def _slopes(config: Config, D: nn.Module, seen: dict[str, Seen], z: Tensor, nimg: int) -> Tensors:
    """R1 and R2, as far as they are due: of the logits there are, or by a pass of their own."""
    parts: Tensors = {}
    for name, (images, c, logits) in seen.items():
        given = getattr(config.penalty, name)
        if not given.gamma:
            continue
        parts[f"{name}_penalty"] = images.new_zeros(())
        if (nimg // config.data.batch_size) % given.interval == 0:
            if given.fraction < 1 or given.sigma:
                chosen = torch.arange(0, len(images), round(1 / given.fraction), device=images.device)
                images, c = images.detach()[chosen].requires_grad_(), None if c is None else c[chosen]
                logits = D(images, c)
            if given.sigma:
                stream = {"r1": Stream.REAL, "r2": Stream.FAKE}[name]
                step = given.sigma * noise_like(images.detach(), keys_of(z)[chosen], stream)
                behind = D(images - step, c) if given.sided == 2 else logits
                slopes = (D(images + step, c) - behind) / (given.sigma * given.sided)
            else:
                (slopes,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
            value = given.interval * _at(given.gamma, config, nimg) / 2 * slopes.square().sum() / len(images)
            parts[f"{name}_penalty"] = value
    return parts


def _between(config: Config, D: Seeing, x: Tensor, y: Tensor, c: Tensor | None, mix: Tensor) -> Tensors:
    """WGAN-GP."""
    if not config.penalty.wgan_gp.weight:
        return {}
    u = mix.view(-1, 1, 1, 1)
    between = (u * x + (1 - u) * y).requires_grad_()
    (slopes,) = torch.autograd.grad(D(between, c).sum(), between, create_graph=True)
    norms = slopes.flatten(1).norm(dim=1)
    return {"wgan_gp_penalty": config.penalty.wgan_gp.weight * ((norms - 1) ** 2).mean()}


def _path(
    config: Config, G: nn.Module, fakes: Tensor, z: Tensor, update: int, mean: float
) -> tuple[Tensor, float]:
    """Path length regularisation, and the moving mean after it."""
    given = config.penalty.path
    if update % given.interval:
        return fakes.new_zeros(()), mean
    y = noise_like(fakes.detach(), keys_of(z), Stream.LENGTHS) / fakes[0, 0].numel() ** 0.5
    w = G.latent  # [N, w_dim] or [N, layers, w_dim]
    assert isinstance(w, Tensor)
    (J,) = torch.autograd.grad((fakes * y).sum(), w, create_graph=True)
    layers = J.shape[1] if J.ndim == 3 else 1
    lengths = (J.square().flatten(1).sum(1) / layers) ** 0.5
    value = given.interval * given.weight * ((lengths - mean) ** 2).mean()
    return value, given.decay * mean + (1 - given.decay) * float(lengths.detach().mean())


def _d_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    if kind == "hinge":
        return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    if kind == "least_squares":
        return 0.5 * ((real - 1) ** 2).mean() + 0.5 * (fake**2).mean()
    if kind == "wasserstein":
        return (fake - real).mean()
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    if kind == "relativistic":
        return F.binary_cross_entropy_with_logits(real - fake, ones)
    return F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)


def _g_loss(kind: str, fake: Tensor, real: Tensor) -> Tensor:
    if kind in ("hinge", "wasserstein"):
        return -fake.mean()
    if kind == "least_squares":
        return 0.5 * ((fake - 1) ** 2).mean()
    logits = fake - real if kind == "relativistic" else fake
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(fake))


def _at(value: Schedulable, config: Config, nimg: int) -> float:
    """A setting after nimg images: of [from, to], the share cos² of `from` falls from 1 to 0."""
    if not isinstance(value, tuple):
        return value
    angle = min(nimg / config.run.burn_in_kimg / 1000, 1.0) * math.pi / 2
    return value[0] * math.cos(angle) ** 2 + value[1] * math.sin(angle) ** 2


def _penalties(config: Config, player: str, module: nn.Module, nimg: int) -> Tensors:
    """λ₂ Σ (cw)² and λ₁ Σ |cw| over all that trains, or over kernels: here, weights of two axes or four, and
    those of a layer that says its factor c."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    penalty: WeightPenalty = getattr(config.penalty, player)
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "weight_gain")]
    gains = {id(layer.weight): layer.weight_gain for layer in layers}
    chosen = [
        p * gains.get(id(p), 1.0) if penalty.on in ("auto", "effective") else p
        for _, p in _trained(module)
        if penalty.on == "all" or id(p) in gains or (p.ndim in (2, 4) and id(p) not in embeddings)
    ]
    parts = {"l2_penalty": _at(penalty.l2, config, nimg) * _total(p.pow(2).sum() for p in chosen)}
    if penalty.l1:
        parts["l1_penalty"] = _at(penalty.l1, config, nimg) * _total(p.abs().sum() for p in chosen)
    return parts


def _total(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


def _optimizer(module: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    if config.kind == "sgd":
        return torch.optim.SGD(module.parameters(), momentum=config.momentum, foreach=False)
    return torch.optim.Adam(module.parameters(), eps=config.eps, foreach=False)


def _set_rates(config: Config, player: str, optimizer: torch.optim.Optimizer, nimg: int) -> None:
    settings: Optimizer = getattr(config.optim, player)
    for group in optimizer.param_groups:
        group["lr"] = _at(settings.lr, config, nimg)
        if settings.kind != "sgd":
            group["betas"] = tuple(_at(beta, config, nimg) for beta in settings.betas)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Over several D updates; norms as the root of the mean square."""
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    norm = "Gradients/D/norm"
    return mean | {norm: (sum(row[norm] ** 2 for row in rows) / len(rows)) ** 0.5}
