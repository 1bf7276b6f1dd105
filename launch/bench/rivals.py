"""What the training step is compared with: the same maths and nothing else, and the tutorials' loop.

Both train the same networks on batches of the same size, and read like pipeline/step.py.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, repeat
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, Dataset

from pipeline.config import Config
from pipeline.gan.networks import build_D, build_G
from pipeline.gan.schedules import Rates, at, ema_beta, scheduled

_AN_EPOCH = 60_000  # images the tutorial's loop sees before its loader starts over: those of an MNIST


class BareMaths:
    """The same alternating update in lean plain torch, on one fixed batch of noise: no data, no statistics,
    no reports, no penalties, no config. Fused Adam, channels last, D frozen in G's turn, G_ema."""

    def __init__(self, config: Config, device: torch.device, bf16: bool) -> None:
        self.G = _channels_last(build_G(config, 0), device)
        self.D = _channels_last(build_D(config, 0), device)
        self.G_ema = _channels_last(build_G(config, 0), device)
        now = at(config, 0)
        self._beta = ema_beta(config.images_per_update, 1000 * scheduled(config.ema.kimg, 0, 1))
        self._optimizer_G = _adam(self.G, now.G, fused=True)
        self._optimizer_D = _adam(self.D, now.D, fused=True)
        self._device, self._bf16 = device, bf16
        self._z = (config.data.batch_size, config.G.z_dim)
        size, channels = config.data.size, config.data.channels
        real = torch.rand(config.data.batch_size, channels, size, size, device=device) * 2 - 1
        self._real = real.to(memory_format=torch.channels_last)

    def run(self, updates: int) -> None:
        for _ in range(updates):
            z = [torch.randn(self._z, device=self._device) for _ in range(2)]
            self.update(self._real, z[0], z[1])

    def update(self, real: Tensor, z_D: Tensor, z_G: Tensor) -> None:
        """One update from reals [N, C, H, W] and both turns' latents [N, z_dim]."""
        with self._autocast():
            with torch.no_grad():
                fake = self.G(z_D)
            loss = softplus(-self.D(real).float()).mean() + softplus(self.D(fake).float()).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer_D.step()
        self._optimizer_D.zero_grad()
        self.D.requires_grad_(False)
        with self._autocast():
            loss = softplus(-self.D(self.G(z_G)).float()).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer_G.step()
        self._optimizer_G.zero_grad()
        self.D.requires_grad_(True)
        with torch.no_grad():
            torch._foreach_lerp_([*self.G_ema.parameters()], [*self.G.parameters()], 1 - self._beta)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16) if self._bf16 else nullcontext()


class TutorialLoop:
    """The DCGAN training loop as tutorials teach it, in float32: D ends in a sigmoid and the loss is BCELoss;
    Adam loops over parameters; G's turn reuses the fakes of D's, and its gradients for D are thrown away;
    `.item()` of what is printed, every update; torch's DataLoader (what it prefetches is a present)."""

    def __init__(self, config: Config, device: torch.device, images: Tensor) -> None:
        """images: uint8 [n, C, H, W], so this loop is spared the decoding."""
        self.G = build_G(config, 0).to(device)
        self.D = nn.Sequential(build_D(config, 0), nn.Sigmoid()).to(device)
        now = at(config, 0)
        self._optimizer_G = _adam(self.G, now.G, fused=False)
        self._optimizer_D = _adam(self.D, now.D, fused=False)
        self._criterion = nn.BCELoss()
        self._device, self._z_dim = device, config.G.z_dim
        workers = config.data.workers
        self._loader = DataLoader(
            _Normalised(images),
            batch_size=config.data.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        self._batches: Iterator[Tensor] = chain.from_iterable(repeat(self._loader))

    def run(self, updates: int) -> None:
        for _ in range(updates):
            self._update(next(self._batches).to(self._device))

    def _update(self, real: Tensor) -> tuple[float, ...]:
        ones = torch.full((len(real),), 1.0, device=self._device)
        zeros = torch.full((len(real),), 0.0, device=self._device)
        self.D.zero_grad()
        says_of_real = self.D(real)
        loss_real = self._criterion(says_of_real, ones)
        loss_real.backward()
        fake = self.G(torch.randn(len(real), self._z_dim, device=self._device))
        says_of_fake = self.D(fake.detach())
        loss_fake = self._criterion(says_of_fake, zeros)
        loss_fake.backward()
        self._optimizer_D.step()
        self.G.zero_grad()
        says_now = self.D(fake)
        loss_G = self._criterion(says_now, ones)
        loss_G.backward()
        self._optimizer_G.step()
        means = (says_of_real.mean(), says_of_fake.mean(), says_now.mean())
        return tuple(value.item() for value in (loss_real + loss_fake, loss_G, *means))


class TutorialApart:
    """TutorialLoop in a process of its own, without what we set for a whole process (how the C library keeps
    freed memory). It is idle until asked."""

    def __init__(self, config: Config, device: torch.device, images: Tensor) -> None:
        context = multiprocessing.get_context("spawn")
        self._ask, answer = context.Pipe()
        threads = torch.get_num_threads()
        arguments = (answer, config, device, images, threads)
        self._process = context.Process(target=_tutorial_process, args=arguments)
        self._process.start()
        answer.close()

    def run(self, updates: int) -> None:
        self._ask.send(updates)
        self._ask.recv()

    def close(self) -> None:
        self._ask.send(0)
        self._process.join()


def _tutorial_process(
    answer: Connection, config: Config, device: torch.device, images: Tensor, threads: int
) -> None:
    torch.set_num_threads(threads)
    loop = TutorialLoop(config, device, images)
    while updates := answer.recv():
        loop.run(updates)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        answer.send(updates)


class _Normalised(Dataset[Tensor]):
    """Images as float32 in [−1, 1], one at a time, as a transform gives them."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return _AN_EPOCH

    def __getitem__(self, number: int) -> Tensor:
        return self._images[number % len(self._images)].float().div(255).sub(0.5).div(0.5)


def _channels_last(module: nn.Module, device: torch.device) -> nn.Module:
    placed: nn.Module = module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed


def _adam(module: nn.Module, now: Rates, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=now.lr, betas=now.betas, fused=fused, foreach=False)
