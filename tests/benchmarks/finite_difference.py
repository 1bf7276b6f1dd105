"""Where the finite-difference form of R1 and R2 works. By hand:

    python tests/benchmarks/finite_difference.py [--kimg 20] [--width 32] [--images 1024] [--draws 4]

trains a pair of DCGANs without norms on Fashion-MNIST (relativistic, exact R1 + R2, γ = 1), once with leaky
ReLU and once with SiLU in D. At the untrained and the trained D it compares the gradient with respect to D's
weights of the penalty's three forms: exact (Slope with sigma = 0), along noise (Slope) and along the image's
own gradient (`along_gradient`). One row of a Markdown table each:

- value: the penalty over the exact one's.
- along, across: the mean gradient over all images and draws, in units of the exact one's norm: its part along
  the exact one (1 is right) and its part across (0 is right; corrected for the noise left in the mean).
- noise: what one draw at one image deviates from the exact gradient there, rms around the mean deviation, in
  the same unit. A batch of N images with K draws each has 1/√(NK) of it.
- at N: that of a batch of N, one draw each, over the norm of the adversarial gradient of such a batch.
- batch: how many times smaller a batch would be as noisy with the exact penalty (of adversarial + penalty).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pipeline.data.prepare.known import fashion_mnist
from pipeline.gan.dcgan import Discriminator, Generator
from pipeline.gan.gradient_penalty import Judged, Slope, judge
from pipeline.gan.images import to_float
from pipeline.gan.losses import adversarial

SIGMAS, BATCHES = (0.01, 0.03, 0.1, 0.3), (16, 64, 256, 1024)
Z, CHUNK, BATCH = 64, 64, 32  # latents, images of one gradient here, images of a training batch
GRAIN = 0.05  # noise that leaves no area flat
LOSSES = adversarial("relativistic")
HEADS = ("D", "kimg", "images", "form", "σ", "value", "along", "across", "noise")
HEADS += (*(f"at {n}" for n in BATCHES), "batch")
Penalty = Callable[[Judged], Tensor]


def flat(loss: Tensor, D: nn.Module) -> Tensor:
    """The gradient with respect to D's weights, as one vector [P]."""
    return torch.cat(
        [*map(torch.flatten, torch.autograd.grad(loss, [*D.parameters()], materialize_grads=True))]
    )


def judged(D: nn.Module, images: Tensor, differentiate: bool) -> Judged:
    return judge(D, lambda x, _: x, images.clone(), None, None, differentiate)


def slope(sigma: float = 0.0, sided: int = 2) -> Penalty:
    penalty = Slope("r1", "real", gamma=1.0, sigma=sigma, sided=sided)  # type: ignore[arg-type]
    return lambda x: penalty(x, x)


def along_gradient(sigma: float, sided: int) -> Penalty:
    """½ E‖∇D‖² as a finite difference over a step of length σ along ∇D, which counts as a constant (Finlay &
    Oberman 2021, section 3): its gradient is that of the exact penalty where D is smooth, without noise."""

    def penalty(x: Judged) -> Tensor:
        images = x.images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(x.again(images, 1).sum(), images)
        step = sigma * torch.nn.functional.normalize(gradient.flatten(1)).view_as(images)
        images = images.detach()
        other = images - step if sided == 2 else images
        ahead, behind = x.again(torch.cat([images + step, other]), 1).chunk(2)
        return 0.5 * ((ahead - behind) / (sided * sigma)).square().mean()

    return penalty


def train(pixels: Tensor, G: nn.Module, D: nn.Module, kimg: float) -> None:
    """Alternating updates with exact R1 + R2 in each."""
    adams = {player: torch.optim.Adam(player.parameters(), 1e-3, (0.0, 0.99)) for player in (G, D)}
    exact = slope()

    def step(player: nn.Module, loss: Tensor) -> None:
        inputs = [*player.parameters()]
        for weight, gradient in zip(
            inputs, torch.autograd.grad(loss, inputs, materialize_grads=True), strict=True
        ):
            weight.grad = gradient
        adams[player].step()

    for _ in range(int(1000 * kimg) // BATCH):
        x = to_float(pixels[torch.randint(len(pixels), (BATCH,))])
        y = G(torch.randn(BATCH, Z))
        real, fake = judged(D, x, True), judged(D, y.detach(), True)
        step(D, LOSSES.d(real.logits, fake.logits) + exact(real) + exact(fake))
        step(G, LOSSES.g(D(y), D(x).detach()))


def scatter(gradients: Tensor) -> float:
    """Variance of an image's gradient (trace), from those of groups [M,P]."""
    return CHUNK * gradients.var(0).sum().item()


def rows(D: nn.Module, images: Tensor, loss: Tensor, draws: int) -> Iterator[list[str]]:
    """A row per form and σ. loss [M,P]: the gradients of the adversarial loss of groups."""
    groups = images.split(CHUNK)
    values = [slope()(judged(D, x, True)) for x in groups]
    value, exact = sum(v.item() for v in values), torch.stack([flat(v, D) for v in values])
    mean, size, sampling = exact.mean(0), exact.mean(0).norm().item(), scatter(loss + exact)
    signal, spread = loss.mean(0).square().sum().item(), scatter(loss)
    for make, sided, sigma in itertools.product((slope, along_gradient), (1, 2), SIGMAS):
        penalty, count = make(sigma, sided), draws if make is slope else 1
        drawn = [penalty(judged(D, x, False)) for x in groups for _ in range(count)]
        off = torch.stack([flat(v, D) for v in drawn]) - exact.repeat_interleave(count, 0)
        variance, bias = scatter(off), off.mean(0) / size
        along = (bias @ mean).item() / size
        across = bias.square().sum().item() - along**2 - variance / (len(off) * CHUNK * size**2)
        yield [
            f"{'noise' if make is slope else 'gradient'}, {sided}-sided",
            f"{sigma:g}",
            f"{sum(v.item() for v in drawn) / count / value:.2f}",
            f"{1 + along:.2f}",
            f"{max(across, 0) ** 0.5:.2f}",
            f"{variance**0.5 / size:.1f}",
            *(f"{(variance / n / (signal + spread / n)) ** 0.5:.2g}" for n in BATCHES),
            f"{1 + variance / sampling:.3g}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kimg", type=float, default=20)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--activations", nargs="+", default=["leaky_relu", "silu"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pixels = torch.from_numpy(fashion_mnist(print).images).unsqueeze(1)
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for activation in asked.activations:
        torch.manual_seed(0)
        shared = {"size": 28, "channels": 1, "width": asked.width, "norm": "none"}
        G, D = Generator(z_dim=Z, **shared), Discriminator(activation=activation, **shared)
        for kimg in (0.0, asked.kimg):
            train(pixels, G, D, kimg)
            reals = to_float(pixels[torch.randperm(len(pixels))[: asked.images]])
            fakes = G(torch.randn(asked.images, Z)).detach()
            kinds = {"reals": reals, "reals + grain": reals + GRAIN * torch.randn_like(reals), "fakes": fakes}
            pairs = zip(reals.split(CHUNK), fakes.split(CHUNK), strict=True)
            loss = torch.stack([flat(LOSSES.d(D(x), D(y)), D) for x, y in pairs])
            for kind in kinds if kimg else ["reals"]:
                for row in rows(D, kinds[kind], loss, asked.draws):
                    print(f"| {' | '.join([activation, f'{kimg:g}', kind, *row])} |", flush=True)


if __name__ == "__main__":
    main()
