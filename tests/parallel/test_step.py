"""What the step can carry beyond today's config, against plain torch: a loss that compares real and fake
images in pairs, a penalty on fakes, an augmentation, rates that change."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from launch.selfcheck import parity
from pipeline.config import Config, Optimizer
from pipeline.data.stream import Batch
from pipeline.gan import schedules
from pipeline.gan.draws import Draws, Samples
from pipeline.gan.gradient_penalty import Slope
from pipeline.gan.losses import Adversarial
from pipeline.gan.networks import build_D, build_G
from pipeline.gan.schedules import Rates
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.masters import make_optimizer, set_rates
from pipeline.parallel.watch.whereabouts import Progress
from pipeline.players import build
from pipeline.run.stats import Stats
from pipeline.step import Gan, train_step, update_G

CPU = torch.device("cpu")
CASE = parity.Case("seams", (*parity.SGD, "loss.D_steps=2"), rounds=2)
CONFIG = CASE.config(world=1)
EVERY = Samples.all(CASE.batch)
PAIRED = Adversarial(
    d=lambda real, fake: softplus(fake - real).mean(),
    g=lambda fake, real: softplus(real - fake).mean(),
    paired=True,
)
GAMMAS = {"real": 0.7, "fake": 0.3}
UPDATES = 2


def augmented(images: torch.Tensor, _: torch.Tensor | None = None) -> torch.Tensor:
    return 0.8 * images.flip(3) + 0.1


def at(cur_nimg: int) -> schedules.Now:
    """SGD's rate falls from turn to turn; a gradient penalty on reals always, on fakes every other time."""
    rates = Rates(0.02 / (1 + cur_nimg / CASE.batch), (0.5, 0.999), l2=0.0, l1=0.0)
    due = {"real": 1, "fake": schedules.lazy_factor(2, cur_nimg // CASE.batch)}
    penalties = tuple(Slope(f"on_{on}", on, GAMMAS[on], factor=due[on]) for on in ("real", "fake"))
    return replace(schedules.at(CONFIG, cur_nimg), G=rates, D=rates, gradient_penalties=penalties)


def gan_on_one_process(config: Config = CONFIG, label_frequencies: list[float] | None = None) -> Gan:
    ranks: Any = SimpleNamespace(
        rank=0, world=1, main=True, strategy="single", device=CPU, precision="no", low_precision=None,
        compilation=None, progress=Progress(), sum=lambda values: values,
    )  # fmt: skip
    return build(config, ranks, batch_shape(config.data, 1), label_frequencies)


def plain() -> tuple[nn.Module, nn.Module]:
    """The same by autograd: the whole batch at once, everything inside the loss."""
    G, D = build_G(CONFIG, 0), build_D(CONFIG, 0)
    optimizers = {m: torch.optim.SGD(m.parameters(), lr=1.0, momentum=0.5) for m in (G, D)}
    draws, nimg = Draws(CONFIG.run.seed, CONFIG.G.z_dim, None), 0
    batches = iter(parity.reals(CASE, 2 * UPDATES))

    def step(module: nn.Module, loss: torch.Tensor) -> None:
        optimizers[module].param_groups[0]["lr"] = at(nimg).D.lr
        optimizers[module].zero_grad()
        loss.backward()
        optimizers[module].step()

    for _ in range(UPDATES):
        for _ in range(2):
            x = (next(batches).images.float() / 127.5 - 1).requires_grad_()
            y = G(draws.latents("D", nimg, EVERY).z).detach().requires_grad_()
            real, fake = D(augmented(x)), D(augmented(y))
            loss = softplus(fake - real).mean() + _slope(real, x, GAMMAS["real"])
            loss = loss + (0 if nimg // CASE.batch % 2 else 2) * _slope(fake, y, GAMMAS["fake"])
            step(D, loss)
            nimg += CASE.batch
        fake = D(augmented(G(draws.latents("G", nimg, EVERY).z)))
        step(G, softplus(D(augmented(x)).detach() - fake).mean())
    return G, D


def _slope(logits: torch.Tensor, images: torch.Tensor, gamma: float) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gamma / 2 * gradient.square().sum() / len(images)


def test_it_trains_what_plain_torch_trains():
    gan = replace(gan_on_one_process(), losses=PAIRED, augment=augmented, at=at)
    stats, nimg, reals = Stats(CPU), 0, iter(parity.reals(CASE, 2 * UPDATES))
    for _ in range(UPDATES):
        nimg = train_step(gan, reals, nimg, stats)
    for engine, module in zip((gan.G, gan.D), plain(), strict=True):
        for name, parameter in module.named_parameters():
            found = engine.module.get_parameter(name)
            torch.testing.assert_close(found, parameter, rtol=0, atol=5e-7)
    charts = stats.reduce(gan.G.ranks, {}).values
    assert charts["Loss/D/on_real_penalty"] > 0 and charts["Loss/D/on_fake_penalty"] > 0


@pytest.mark.parametrize("paired", [False, True])
def test_reals_go_to_the_device_in_Gs_turn_only_for_a_paired_loss(paired):
    gan = gan_on_one_process()
    gan = replace(gan, losses=replace(PAIRED, paired=paired, g=lambda fake, real: fake.mean()))
    local = []
    right = gan.G.rounds
    gan.G.rounds = lambda drawn, *given: local.append(given) or right(drawn, *given)  # type: ignore[method-assign]
    train_step(gan, iter(parity.reals(CASE, 2)), 0, Stats(CPU))
    assert [given[0] is not None for given in local] == [paired]


def test_the_hook_sees_every_image_that_D_does_and_costs_nothing_by_default():
    gan, seen = gan_on_one_process(), []
    image = torch.zeros(1)
    assert gan.augment(image, None) is image
    gan = replace(gan, augment=lambda images, _: seen.append(len(images)) or images)
    train_step(gan, iter(parity.reals(CASE, 2)), 0, Stats(CPU))
    turns = (2, 2, 1)  # real and fake images of two turns of D, fake ones of G's
    assert seen == [CASE.batch // 2] * (2 * sum(turns))  # in two rounds each


def test_an_optimizer_takes_the_rates_of_now():
    for kind, betas in itertools.product(("adam", "adamw", "sgd"), ((0.0, 0.9), (0.5, 0.99))):
        optimizer = make_optimizer([nn.Parameter(torch.ones(2))], Optimizer(kind=kind))
        set_rates(optimizer, Rates(3e-3, betas, l2=0.0, l1=0.0))
        (group,) = optimizer.param_groups
        assert group["lr"] == 3e-3 and group.get("betas", betas) == betas


def turn_of_G(*settings: str) -> tuple[Gan, list[Any], dict[str, list[torch.Tensor]]]:
    """The Gan after a relativistic turn of G over labelled images, the passes of D in it as (images require
    a gradient, labels), and D's buffers before it and after each pass."""
    config = parity.Case("pairs", ("data.conditional=true", "loss.kind=relativistic", *settings), rounds=2)
    gan, labels = gan_on_one_process(config.config(world=1), [1.0] * 3), torch.arange(12) % 3
    images = torch.randint(0, 256, (12, 1, 28, 28), dtype=torch.uint8)
    passes: list[Any] = []
    buffers: dict[str, list[torch.Tensor]] = {n: [b.clone()] for n, b in gan.D.module.named_buffers()}

    def seen(_: nn.Module, given: tuple[torch.Tensor, torch.Tensor]) -> None:
        passes.append((torch.is_grad_enabled() and given[0].requires_grad, given[1]))
        for name, buffer in gan.D.module.named_buffers():
            buffers[name].append(buffer.clone())

    gan.D.module.register_forward_pre_hook(seen)
    update_G(gan, Batch(images, labels), 12, Stats(CPU))
    for name, buffer in gan.D.module.named_buffers():
        buffers[name].append(buffer.clone())
    return gan, passes, buffers


def test_of_a_pair_both_have_the_reals_label_and_only_the_fake_has_a_gradient():
    _, passes, _ = turn_of_G()
    labels = torch.arange(12) % 3
    assert [gradient for gradient, _ in passes] == [False, True] * 2
    for number, (_, c) in enumerate(passes):
        assert torch.equal(c, labels[number // 2 * 6 :][:6])


def test_the_reals_in_Gs_turn_leave_Ds_buffers_as_they_were():
    """Spectral norm's u and v move with each pass on fakes, and with those alone."""
    _, _, buffers = turn_of_G("D.options.spectral_norm=true")
    assert buffers
    for name, (start, *seen, end) in buffers.items():
        before_real, before_fake = seen[::2], seen[1::2]
        assert all(torch.equal(a, b) for a, b in zip(before_real, before_fake, strict=True)), name
        assert torch.equal(start, seen[0]), name
        if not name.startswith("to_logit"):  # one row is its own singular vector from the start
            assert not torch.equal(before_real[0], before_real[1]), name
            assert not torch.equal(before_fake[1], end), name
