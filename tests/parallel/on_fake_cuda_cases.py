"""What is trained on the GPU that is not there (on_fake_cuda.py), and the bare maths of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from launch.bench.rivals import BareMaths
from pipeline import config
from pipeline.config import Config

GPU = torch.device("cuda:0")


@dataclass(frozen=True)
class Case:
    """What is trained, besides DCGAN at 64 px and L2."""

    precision: str = "no"
    settings: tuple[str, ...] = ()
    strategy: str = "single"  # or fsdp2, on two ranks
    classes: int = 0
    keep_gathered: bool = False

    @property
    def config(self) -> Config:
        common = ("data.train=none", "data.size=64", "data.batch_size=64", "penalty.l2=1e-4")
        return config.load(None, (*common, *self.settings))

    @property
    def z_columns(self) -> int:
        z_dim = self.config.G.z_dim
        return 2 * z_dim + 1 if _MIXING in self.settings else z_dim

    def bare(self) -> BareMaths:
        """Of fp16, with the casts of bf16 and no loss scale."""
        of = BarePairs if self.config.loss.kind == "relativistic" else BareMaths
        return of(self.config, GPU, self.precision != "no")


class BarePairs(BareMaths):
    """The same for relativistic pairs with R1 and R2."""

    def update(self, real: Tensor, z_D: Tensor, z_G: Tensor) -> None:
        with self._autocast(), torch.no_grad():
            fake = self.G(z_D)
        pair = [images.detach().requires_grad_() for images in (real, fake)]
        with self._autocast():
            of_real, of_fake = (self.D(images).float() for images in pair)
        loss = softplus(of_fake - of_real).mean()
        for images, logits in zip(pair, (of_real, of_fake), strict=True):
            (slopes,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
            loss = loss + 0.5 * slopes.float().square().flatten(1).sum(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer_D.step()
        self._optimizer_D.zero_grad()
        self.D.requires_grad_(False)
        with self._autocast():
            with torch.no_grad():
                of_real = self.D(real).float()
            loss = softplus(of_real - self.D(self.G(z_G)).float()).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer_G.step()
        self._optimizer_G.zero_grad()
        self.D.requires_grad_(True)
        with torch.no_grad():
            torch._foreach_lerp_([*self.G_ema.parameters()], [*self.G.parameters()], 1 - self._beta)


_NO_NORM = ("G.norm=none", "D.norm=none")
_SYNC_BATCH = ("G.norm=sync_batch", "D.norm=sync_batch")
_ALL_ON = (
    "augment.ops=[flip,shift,scale,rotate,colour,cutout]", "augment.p=0.5",
    "data.batch_gpu=16", "loss.D_steps=2", "penalty.l1=1e-5", "penalty.r1.gamma=1", "penalty.r1.interval=1",
    *(f"{player}.{key}" for player in "GD" for key in ("dropout=0.1", "spectral_norm=true")),
    *(f"optim.{player}.clip=1" for player in "GD"),
)  # fmt: skip
_PATH = (
    "G.kind=launch.selfcheck.networks:LatentGenerator", "G.options.norm=none",
    "penalty.path.weight=1", "penalty.path.interval=1", "data.batch_gpu=32",
)  # fmt: skip
_PAIRS = (
    "loss.kind=relativistic",
    *(f"penalty.{name}.{key}" for name in ("r1", "r2") for key in ("gamma=1", "interval=1")),
)  # fmt: skip


def _family(kind: str, *more: str) -> tuple[str, ...]:
    of_both = (f"{player}.{key}" for player in "GD" for key in (f"kind={kind}", "width=32"))
    return (*of_both, "data.size=32", "data.batch_size=32", *more)


_MIXING = "G.mixing=0.9"
_STYLES = _family("stylegan2", "G.mapping=2", _MIXING)
_VIT = _family(
    "vit",
    "G.patch=4",
    "D.patch=4",
    "G.outputs=2",
    *(f"{p}.{k}" for p in "GD" for k in ("depth=2", "heads=2")),
)
COMPARED = {
    "fp32, batch norm": Case(),
    "fp32, no norm": Case(settings=_NO_NORM),
    "bf16, batch norm": Case("bf16"),
    "bf16, no norm": Case("bf16", _NO_NORM),
    "fsdp2, fp32, batch norm": Case(strategy="fsdp2"),
    "fsdp2, bf16, no norm": Case("bf16", _NO_NORM, "fsdp2", keep_gathered=True),
    "fp16, no norm": Case("fp16", _NO_NORM),
    "fp32, R1 and R2": Case("no", (*_NO_NORM, *_PAIRS)),
    "bf16, R1 and R2": Case("bf16", (*_NO_NORM, *_PAIRS)),
    "fp32, resnet": Case("no", _family("resnet", *_NO_NORM)),
    "bf16, r3gan, R1 and R2": Case("bf16", _family("r3gan", *_PAIRS)),
    "fp32, stylegan2": Case("no", _STYLES),
    "bf16, vit": Case("bf16", _VIT),
}
_OBJECTIVE = (
    *_NO_NORM, *_PAIRS, "data.conditional=true", "data.batch_gpu=16", "data.batch_size=32",
    _ALL_ON[0], _ALL_ON[1], "penalty.wgan_gp.weight=1",
)  # fmt: skip
_SCHEDULES = (
    "run.burn_in_kimg=1", "ema.kimg=[0,1]", "augment.ops=[flip,colour]", "augment.p=[0.1,0.5]",
    "penalty.r1.gamma=[1,0.1]", "penalty.r2.gamma=[1,0.1]", "penalty.l2=[1e-4,1e-5]",
    *(f"optim.{p}.{key}" for p in "GD" for key in ("lr=[2e-4,5e-5]", "betas=[0,[0.9,0.99]]")),
)  # fmt: skip
_IN_ROUNDS = (*_PAIRS, "data.conditional=true", "data.batch_gpu=16")
_LENGTHS = ("penalty.path.weight=1", "penalty.path.interval=1")
_QUARTER = ("penalty.r1.fraction=1/4", "penalty.r2.fraction=1/4")
OTHERS = {
    "fp32, all on": Case("no", (*_ALL_ON, "data.batch_size=32"), classes=10),
    "fp16, all on": Case("fp16", (*_ALL_ON, "data.batch_size=32", "loss.D_steps=1"), classes=10),
    "bf16, path length": Case("bf16", (*_NO_NORM, *_PATH)),
    "fsdp2, bf16, all on": Case("bf16", (*_ALL_ON, *_SYNC_BATCH, "loss.D_steps=1"), "fsdp2", classes=10),
    "fp32, objective": Case("no", _OBJECTIVE, classes=10),
    "bf16, finite difference": Case("bf16", (*_OBJECTIVE, "penalty.r1.sigma=0.1"), classes=10),
    "fsdp2, bf16, on a quarter": Case("bf16", (*_OBJECTIVE, *_QUARTER), "fsdp2", classes=10),
    "fp16, r3gan, schedules": Case("fp16", (*_family("r3gan"), *_IN_ROUNDS, *_SCHEDULES), classes=10),
    "fp16, stylegan2, lengths": Case("fp16", (*_STYLES, *_IN_ROUNDS, *_LENGTHS), classes=10),
    "bf16, vit, computed again": Case(
        "bf16",
        (*_VIT, *_PAIRS, *_QUARTER, "data.conditional=true", "G.checkpoint=true", "D.checkpoint=true"),
        classes=10,
    ),
    "fsdp2, fp16, resnet": Case(
        "fp16", (*_family("resnet", *_NO_NORM), *_IN_ROUNDS, *_QUARTER), "fsdp2", classes=10
    ),
}
