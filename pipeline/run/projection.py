"""The latent of a real image: the one from which G makes the image that is closest to it.

Found by gradient descent as in StyleGAN2 (Karras et al. 2020, appendix D: the ramps of the rate, the noise).
A G with a latent w is searched there, from the mean w on. Any other G is searched in z, from the best of many
random ones, several at once, as descent in z ends in local minima; noise did not help it. A z stays about as
long as normal ones, since G knows no others: in d dimensions within √d ± √2, which is two standard deviations
of the length of N(0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import UserError
from pipeline.gan.draws import derive_seed
from pipeline.gan.images import to_float, to_uint8
from pipeline.gan.truncation import Mapped
from pipeline.parallel.seeding import seed_generators
from pipeline.run.features import EfficientNetLite0
from pipeline.run.images import made_at_once

STEPS = 400
CANDIDATES = 1024  # random z to choose starts from, or one for each class if there are more
_STARTS = 4
_SHOWN = (0.03, 0.08, 0.2)  # shares of the steps after which `Projection.way` has an image
_RATE, _RISE, _FALL = 0.2, 0.05, 0.25  # Adam's, in standard deviations of the latent; shares of the steps
_NOISE, _NOISY = 0.05, 0.75  # in w, as a share of its distance from the mean; share of the steps
_MEAN_OF = 1000  # z of each class whose w are averaged
_FEATURES = 0.05  # weight of the distance of features beside that of pixels
# Pixels. The features are of 96 x 96: of smaller images they would mostly describe the resizing. At
# 28 px they made a step 40 times as slow and the error of the pixels larger by a sixth.
_FEATURES_FROM = 64

Kind = Literal["z", "w"]


class Projection(NamedTuple):
    """What was found for an image. way: uint8 [n, C, H, W], the image of the start, some on the way, and the
    closest one. first, last: mean squared error of the pixels of these two, from 0 (black) to 1 (white)."""

    kind: Kind
    latent: Tensor  # float32 [d], on the CPU
    label: int | None  # of a conditional G
    way: Tensor
    first: float
    last: float


class Projector:
    """Finds latents of a whole G in eval mode, such as `load_generator` gives, on one device."""

    def __init__(
        self,
        G: nn.Module,
        z_dim: int,
        device: torch.device,
        *,
        num_classes: int = 0,
        label: int | None = None,
        seed: int = 0,
        steps: int = STEPS,
    ) -> None:
        """G is moved to the device. label: the only class to try of num_classes; None: all of them."""
        self._device, self._seed, self.steps = device, seed, steps
        tried = torch.arange(num_classes) if label is None else torch.tensor([label])
        labels = tried.to(device) if num_classes else None
        in_w = callable(getattr(G, "mapping", None)) and callable(getattr(G, "synthesis", None))
        find = _in_w if in_w else _in_z
        self._space = find(G.to(device), z_dim, labels, device, self._generator("starts"))
        self._distance = _Distance(device)

    def project(self, images: Tensor, advance: Callable[[], object] = lambda: None) -> Iterator[Projection]:
        """For each of uint8 images [n, C, H, W]. None influences another but for rounding.

        advance: called after every step, `steps` times for each image. Raises UserError if G's images are not
        finite, or not differentiable with respect to its latents.
        """
        with self._seeded():
            distances = self._from_starts(images)
        for image, far in zip(images, distances, strict=True):
            best = far.topk(min(_STARTS, len(far)), largest=False)
            if not best.values[0].isfinite():
                raise UserError("This G makes images of values that are not finite: its training has failed.")
            with self._seeded():
                found = self._search(image, best.indices, advance)
            yield found

    @torch.no_grad()
    def _from_starts(self, images: Tensor) -> Tensor:
        """The distance of all images [n, C, H, W] from what is made of all starts, [n, m]."""
        wanted = [self._distance.embed(to_float(image[None].to(self._device))) for image in images]
        found = []
        starts = torch.arange(len(self._space.starts), device=self._device)
        for part in torch.split(starts, made_at_once(images.shape[-1])):
            made = self._distance.embed(self._space.make(*self._space.start(part)))
            found.append(torch.stack([(made - one).square().sum(1) for one in wanted]))
        return torch.cat(found, dim=1)

    def _search(self, image: Tensor, starts: Tensor, advance: Callable[[], object]) -> Projection:
        """From several starts at once; what ends closest counts."""
        space = self._space
        latents, labels = space.start(starts)
        wanted = self._distance.embed(to_float(image[None].to(self._device)))
        optimizer = torch.optim.Adam([latents.requires_grad_()], lr=0.0)
        noise = self._generator("noise")
        shown, ways = {0, *(round(share * self.steps) for share in _SHOWN)}, []
        for step in range(self.steps):
            done = step / self.steps
            if step in shown:
                ways.append(self._shown(latents, labels))
            shaken = latents
            if space.noise and done < _NOISY:
                drawn = torch.randn(latents.shape, generator=noise).to(latents)
                shaken = latents + space.noise * (1 - done / _NOISY) ** 2 * drawn
            made = space.make(shaken, labels)
            if not made.requires_grad:
                raise UserError(
                    "This G cuts its images off from its latents: there is no gradient to follow."
                )
            distance = (self._distance.embed(made) - wanted).square().sum()
            (latents.grad,) = torch.autograd.grad(distance, latents)
            optimizer.param_groups[0]["lr"] = space.deviation * _rate(done)
            optimizer.step()
            space.confine(latents)
            advance()
        # The starts again: a search may end farther away than it began.
        ends, again = torch.cat([latents.detach(), space.start(starts)[0]]), starts.repeat(2)
        with torch.no_grad():
            made = space.make(ends, space.start(again)[1])
            far = (self._distance.embed(made) - wanted).square().sum(1).nan_to_num(nan=math.inf)
        end = int(far.argmin())
        best = end % len(starts)
        way = torch.stack([*(images[best] for images in ways), to_uint8(made[end]).cpu()])
        first, last = _error(way[0], image), _error(way[-1], image)
        label = None if labels is None else int(labels[best])
        return Projection(space.kind, ends[end].cpu(), label, way, first, last)

    @torch.no_grad()
    def _shown(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        return to_uint8(self._space.make(latents, labels)).cpu()

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """For a G that draws numbers: always the same ones, and nobody else's."""
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            seed_generators(derive_seed(self._seed, "projection"), self._device)
            yield

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self._seed, "projection", purpose))


@dataclass(frozen=True)
class _Space:
    """Where latents are searched. deviation, noise: of their elements; shortest, longest: of the whole."""

    kind: Kind
    make: Callable[[Tensor, Tensor | None], Tensor]  # latents [n, d] and labels → images [n, C, H, W]
    starts: Tensor  # [m, d], to choose from
    labels: Tensor | None  # [m]
    deviation: float = 1.0
    noise: float = 0.0
    shortest: float = 0.0
    longest: float = math.inf

    def start(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents, a copy, and labels of these starts."""
        return self.starts[places], None if self.labels is None else self.labels[places]

    @torch.no_grad()
    def confine(self, latents: Tensor) -> None:
        length = latents.norm(dim=1, keepdim=True).clamp(min=1e-12)
        latents.mul_(length.clamp(self.shortest, self.longest) / length)


def _in_z(
    G: nn.Module, z_dim: int, labels: Tensor | None, device: torch.device, generator: torch.Generator
) -> _Space:
    count = CANDIDATES if labels is None else max(CANDIDATES, len(labels))
    starts = torch.randn(count, z_dim, generator=generator).to(device)
    each = None if labels is None else labels[torch.arange(count, device=device) % len(labels)]
    middle, spread = math.sqrt(z_dim), math.sqrt(2)
    space = _Space("z", G, starts, each, shortest=max(middle - spread, 0.0), longest=middle + spread)
    space.confine(space.starts)
    return space


@torch.no_grad()
def _in_w(
    G: nn.Module, z_dim: int, labels: Tensor | None, device: torch.device, generator: torch.Generator
) -> _Space:
    """One start per class: its mean w."""
    parts = cast(Mapped, G)
    z = torch.randn(_MEAN_OF, z_dim, generator=generator).to(device)
    each = [None] if labels is None else [label.expand(len(z)) for label in labels]
    ws = (parts.mapping(z, c) for c in each)  # of one class at a time in memory
    found = [(w.mean(0), float(w.var(0).mean())) for w in ws]
    means = torch.stack([mean for mean, _ in found])
    deviation = math.sqrt(sum(variance for _, variance in found) / len(found))
    noise = _NOISE * deviation * math.sqrt(means.shape[1])
    return _Space("w", lambda w, c: parts.synthesis(w), means, labels, deviation, noise)


class _Distance:
    """Between images float [N, C, H, W] in [-1, 1]: the squared one between their embeddings.

    It is the mean squared error of pixels, and from 64 px on also that of EfficientNet-Lite0's features at
    every resolution, scaled to length 1 at each place (Zhang et al. 2018, LPIPS, without learnt weights).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._network: EfficientNetLite0 | None = None

    def embed(self, images: Tensor) -> Tensor:
        """float32 [N, d], differentiable."""
        parts = [images.flatten(1) / math.sqrt(images[0].numel())]
        if images.shape[-1] >= _FEATURES_FROM:
            if self._network is None:
                self._network = EfficientNetLite0().requires_grad_(False).eval().to(self._device)
            for features in self._network.maps(127.5 * (images.expand(-1, 3, -1, -1) + 1)):
                unit = F.normalize(features, dim=1)
                parts.append(unit.flatten(1) * math.sqrt(_FEATURES / unit[0, 0].numel()))
        return torch.cat(parts, dim=1)


def _rate(done: float) -> float:
    """In standard deviations of a latent's elements, after this share of the steps."""
    fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - done) / _FALL))
    return _RATE * fall * min(1.0, done / _RISE)


def _error(made: Tensor, image: Tensor) -> float:
    return float((made.double() - image.double()).div(255).square().mean())
