"""The reference of the parity matrix: a GAN trained as in a textbook, in one process, by autograd.

It uses nothing of pipeline/parallel or pipeline/step.py: the penalty is λ·Σp² inside the loss, the whole
batch passes at once, the optimizers are torch's for-loop ones, and the average is a loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launch.selfcheck.parity import UPDATES, Case, Tensors, initial_state, reals
from pipeline.config import Config, Optimizer, Schedulable, WeightPenalty
from pipeline.gan.draws import Draws
from pipeline.gan.networks import build_D, build_G


def untrained(case: Case) -> Tensors:
    """Weights of G, D and G_ema before the first update."""
    config, state = case.config(world=1), initial_state(case)
    players = {"G": build_G(config, state.num_classes), "D": build_D(config, state.num_classes)}
    players["G_ema"] = players["G"]
    return {f"{name}/{key}": p.detach() for name, module in players.items() for key, p in _trained(module)}


def train(case: Case, device: str = "cpu") -> tuple[Tensors, list[dict[str, float]]]:
    """Weights of G, D and G_ema after all updates, and each update's losses, penalties and gradient norms."""
    config, state, rows = case.config(world=1), initial_state(case), []
    G = build_G(config, state.num_classes).to(device)
    D = build_D(config, state.num_classes).to(device)
    G_ema = {name: p.detach().clone() for name, p in G.named_parameters()}
    G_optimizer, D_optimizer = _optimizer(G, config.optim.G), _optimizer(D, config.optim.D)
    draws = Draws(config.run.seed, config.G.z_dim, state.label_frequencies)
    batches = iter(reals(case, UPDATES * config.loss.D_steps))
    # Norms of a round are the only thing that rounds change.
    norms = any(isinstance(m, nn.BatchNorm2d) for m in (*G.modules(), *D.modules()))
    in_rounds = partial(_in_rounds, case.rounds if norms else 1)
    nimg = 0
    for _ in range(UPDATES):
        start, D_rows = nimg, []
        for _ in range(config.loss.D_steps):
            batch = next(batches)
            images, c = _on(device, batch.images, batch.labels)
            z, fake_c = _on(device, *draws.latents("D", nimg, case.batch)[:2])
            assert images is not None
            x = (images.float() / 127.5 - 1).requires_grad_()
            fakes = in_rounds(G, z, fake_c).detach()
            parts = _d_parts(config, in_rounds(D, x, c), in_rounds(D, fakes, fake_c), x, nimg)
            parts |= _penalties(config, "D", D, nimg)
            _set_rates(config, "D", D_optimizer, nimg)
            D_rows.append(_update("D", D, D_optimizer, parts, config.optim.D.clip))
            nimg += case.batch
        z, fake_c = _on(device, *draws.latents("G", nimg, case.batch)[:2])
        parts = {"adversarial": _g_loss(config.loss.kind, in_rounds(D, in_rounds(G, z, fake_c), fake_c))}
        parts |= _penalties(config, "G", G, nimg)
        _set_rates(config, "G", G_optimizer, nimg)
        rows.append(_mean(D_rows) | _update("G", G, G_optimizer, parts, config.optim.G.clip))
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


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _on(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(device) for t in tensors]


def _in_rounds(rounds: int, module: nn.Module, *inputs: Tensor | None) -> Tensor:
    """The module's output for the whole batch, of which it sees a round at a time."""
    parts = [[None] * rounds if t is None else t.chunk(rounds) for t in inputs]
    return torch.cat([module(*of_round) for of_round in zip(*parts, strict=True)])


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


def _d_parts(config: Config, real_logits: Tensor, fake_logits: Tensor, x: Tensor, nimg: int) -> Tensors:
    """The adversarial loss of D and, when it is due, R1."""
    parts = {"adversarial": _d_loss(config.loss.kind, real_logits, fake_logits)}
    r1 = config.penalty.r1
    if r1.gamma:
        parts["r1_penalty"] = x.new_zeros(())
        if (nimg // config.data.batch_size) % r1.interval == 0:
            (gradient,) = torch.autograd.grad(real_logits.sum(), x, create_graph=True)
            factor = r1.interval * _at(r1.gamma, config, nimg) / 2
            parts["r1_penalty"] = factor * gradient.square().sum() / len(x)
    return parts


def _d_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    if kind == "hinge":
        return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    if kind == "least_squares":
        return 0.5 * ((real - 1) ** 2).mean() + 0.5 * (fake**2).mean()
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    return F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)


def _g_loss(kind: str, fake: Tensor) -> Tensor:
    if kind == "hinge":
        return -fake.mean()
    if kind == "least_squares":
        return 0.5 * ((fake - 1) ** 2).mean()
    return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))


def _at(value: Schedulable, config: Config, nimg: int) -> float:
    """A setting after nimg images: of [from, to], the share cos² of `from` falls from 1 to 0."""
    if not isinstance(value, tuple):
        return value
    angle = min(nimg / config.run.burn_in_kimg / 1000, 1.0) * math.pi / 2
    return value[0] * math.cos(angle) ** 2 + value[1] * math.sin(angle) ** 2


def _penalties(config: Config, player: str, module: nn.Module, nimg: int) -> Tensors:
    """λ₂ Σ w² and λ₁ Σ |w| over all that trains, or over kernels: here, weights of two axes or more."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    penalty: WeightPenalty = getattr(config.penalty, player)
    everything = config.penalty.on == "all"
    chosen = [p for _, p in _trained(module) if everything or (p.ndim > 1 and id(p) not in embeddings)]
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
