"""The parity matrix: the same small training under a strategy, and in plain single-process torch.

`accelerate launch … -m launch.selfcheck.parity OUT` trains every case below under the launcher's strategy and
writes the results; plain.py trains them as in a textbook, with autograd on λ·Σp². Any difference is an error
of the strategy. `shardgan selfcheck` and the tests compare the two.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch

from launch.selfcheck import families
from launch.selfcheck.families import networks, slopes
from pipeline.config import Config, load
from pipeline.console import end_process
from pipeline.data.stream import Batch
from pipeline.durable import save_tensors
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.launched import read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.players import Gan, build
from pipeline.run import checkpoint
from pipeline.run.saving import Saver
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.step import train_step

UPDATES = 5
RESUMED_AFTER = 3
Tensors = dict[str, torch.Tensor]
_load = cache(load)  # every case is started more than once


@dataclass(frozen=True)
class Case:
    """One cell of the matrix: what differs from the base config, and how many rounds an update has."""

    name: str
    settings: tuple[str, ...]
    rounds: int = 1
    batch: int = 12
    resumed: bool = True
    slack: float = 1.0  # times the tolerance of `selfcheck`: where a difference of logits is divided by σ

    def config(self, world: int) -> Config:
        """A norm-free DCGAN of awkward sizes: few tensors divide equally over 2 or 3 ranks.

        Its activations are smooth: a ReLU within rounding of its kink may be on under one strategy and off
        under another, and the trainings then differ by far more than rounding.
        """
        return _load(
            None,
            (
                "data.train=none",
                "data.size=28",
                "data.channels=1",
                f"data.batch_size={self.batch}",
                f"data.batch_gpu={self.batch // world // self.rounds}",
                "G.z_dim=7",
                *networks("pipeline.gan.dcgan"),
                *(
                    f"{player}.options={{width: 5, norm: none, activation: silu}}"
                    for player in "GD"
                    if not any(key.startswith(f"{player}.options={{") for key in self.settings)
                ),
                "ema.kimg=0.02",
                "ema.rampup=0.5",
                *self.settings,
            ),
        )


def _optimizers(kind: str, *keys: str) -> tuple[str, ...]:
    return tuple(f"optim.{player}.{key}" for player in "GD" for key in (f"kind={kind}", *keys))


SGD = _optimizers("sgd", "lr=0.02", "momentum=0.5")
# A larger eps than the default: Adam divides by the size of gradients, and those near zero are rounding.
ADAM = _optimizers("adam", "lr=1e-3", "eps=1e-3")
CLIPPED = ("optim.G.clip=0.5", "optim.D.clip=0.3")
_PENALTIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "l2": ("penalty.G.l2=2e-3", "penalty.D.l2=3e-3"),
    "l1l2": ("penalty.l2=1e-3", "penalty.G.l1=2e-4", "penalty.D.l1=3e-4"),
}
_SYNC_BATCH = ("G.options.norm=sync_batch", "D.options.norm=sync_batch")
R1 = ("penalty.r1.gamma=1.0", "penalty.r1.interval=2")
# Of the cases below, those that tests train under fewer launches by default: see tests/parallel/launches.py.
OBJECTIVE = frozenset((
    "relativistic", "r1-r2", "r2", "wgan-gp", "fraction", "difference", "path", "schedules", "augmentation",
    "adaptive", "sync-batch", "sync-batch-r1", "effective", "freeze",
))  # fmt: skip
FAMILIES = frozenset(families.CASES)  # likewise
THOROUGH = frozenset(("difference-small", *(f"{name}-once" for name in OBJECTIVE)))
_SCHEDULES = (  # They end after update 4 of 5.
    *_optimizers("adam", "momentum=0", "eps=1e-4", "lr=[1e-3,2.5e-4]", "betas=[[0.0,0.5],[0.9,0.99]]"),
    *("penalty.G.l2=[2e-3,1e-4]", "penalty.D.l2=[1e-4,3e-3]", "penalty.D.l1=[3e-4,0]"),
    *("penalty.r1.gamma=[1,0.1]", "penalty.r1.interval=2", "ema.kimg=[0,0.05]", "run.burn_in_kimg=0.048"),
)
_AUGMENTED = ("augment.ops=[flip,shift,scale,rotate,colour,cutout]", "run.burn_in_kimg=0.048")
_ADAPTIVE = ("augment.target=0.1", "augment.speed_kimg=0.03", "run.tick_kimg=0.012")
_EFFECTIVE = ("penalty.l2=0.5", "penalty.D.l1=0.05")


def shared_batch(world: int) -> int:
    """Images that `world` ranks can share in two rounds; the same number for 1, 2, 3 and 6 ranks."""
    return next(n for n in itertools.count(12) if n % (2 * world) == 0)


def cases(world: int = 1, strategy: str = "single", thorough: bool = False) -> list[Case]:
    """{accumulation 1, 2} × {clipping off, on} × {penalty off, L2, L1+L2} under SGD, and L2 under Adam; then
    a penalty on all parameters and on kernels times a constant, R1, norms of single images, labels, pairs,
    the other gradient penalties, path length, schedules, augmentation, two D steps, residual networks,
    families of networks, parameters that do not train, and tied ones, which FSDP2 refuses. thorough: also
    those of `THOROUGH`, for tests that may take long.
    """
    shared = shared_batch(world)
    batch = shared if 12 % world else 12  # four ranks: in three rounds, which changes only what is below
    clips: dict[str, tuple[str, ...]] = {"free": (), "clipped": CLIPPED}
    found = []
    for rounds, (clip, clipping), (penalty, lambdas) in itertools.product(
        (1, 2), clips.items(), _PENALTIES.items()
    ):
        resumed = clip == "clipped" and rounds == 2  # checkpoints depend on neither
        for kind, optimizer in {"sgd": SGD, "adam": ADAM}.items():
            if kind == "sgd" or penalty == "l2":
                name, settings = f"{kind}-{penalty}-{clip}-{rounds}", (*optimizer, *lambdas, *clipping)
                found.append(Case(name, settings, rounds, batch, resumed))
    special = {
        "on-all": ("penalty.on=all",),
        "effective": (*networks("launch.selfcheck.networks", "Equalised"), *_EFFECTIVE),
        "r1": R1,
        "r1-clipped": (*R1, *CLIPPED),
        "spectral": ("G.options.spectral_norm=true", "D.options.spectral_norm=true"),
        "spectral-r1": ("D.options.spectral_norm=true", *R1),
        "group": tuple(f"{player}.options={{width: 8, norm: group, activation: silu}}" for player in "GD"),
        "instance": ("G.options.norm=instance", "D.options.norm=instance"),
        "sync-batch": _SYNC_BATCH,
        "sync-batch-r1": (*_SYNC_BATCH, *R1),
        "labels": ("data.conditional=true", "loss.kind=hinge"),
        "relativistic": ("data.conditional=true", "loss.kind=relativistic"),
        "r1-r2": ("loss.kind=relativistic", *slopes("gamma=0.7", "interval=1")),
        "r2": ("penalty.r2.gamma=0.7", "penalty.r2.interval=2"),
        "wgan-gp": ("loss.kind=wasserstein", "penalty.wgan_gp.weight=0.5"),
        "fraction": ("data.conditional=true", *slopes("gamma=0.7", "interval=1", "fraction=1/2")),
        "difference": (*slopes("gamma=0.7", "sigma=0.3", "interval=1"), "penalty.r2.sided=1"),
        "path": ("G.kind=launch.selfcheck.networks:LatentGenerator", *families.PATH),
        "schedules": _SCHEDULES,
        "augmentation": (*_AUGMENTED, "augment.p=[0.9,0.3]", *slopes("gamma=0.7", "interval=2")),
        "adaptive": (*_AUGMENTED, *_ADAPTIVE, "loss.kind=relativistic"),
        "twice": ("loss.D_steps=2", "loss.kind=least_squares"),
        "resnet": ("data.size=32", *networks("pipeline.gan.resnet")),
        **families.CASES,
        "freeze": ("D.freeze=1", "loss.kind=relativistic", *slopes("gamma=0.7", "interval=1")),
        "frozen": networks("launch.selfcheck.networks", "Frozen"),
        "own": (*networks("launch.selfcheck.networks", "Own"), *R1),
        "tied": networks("launch.selfcheck.networks", "Tied"),
    }
    if strategy in ("fsdp2", "hsdp"):
        del special["tied"]
    for name, settings in special.items():
        # Every forward pass changes u and v of spectral norm, and buffers: rounds change the training.
        rounds = 1 if "spectral" in name or name == "own" else 2
        by_round = name == "fraction" or "sync-batch" in name  # every second image of a rank's; all ranks'
        images = shared * (1 + (name == "fraction")) if by_round else batch
        found.append(Case(name, (*SGD, *_PENALTIES["l2"], *settings), rounds, images))
    return found + _thorough(found) if thorough else found


def _thorough(found: list[Case]) -> list[Case]:
    """The cases of `THOROUGH`: the objective's in one round, and a finite difference at a tenth of the σ.

    Of that one, the rounding of two logits weighs ten times as much in their difference over σ.
    """
    once = [replace(case, name=f"{case.name}-once", rounds=1) for case in found if case.name in OBJECTIVE]
    difference = next(case for case in found if case.name == "difference")
    settings = tuple(key.replace("sigma=0.3", "sigma=0.03") for key in difference.settings)
    return [*once, replace(difference, name="difference-small", settings=settings, slack=10.0)]


def reals(case: Case, count: int, world: int = 1) -> list[Batch]:
    """Random global batches of images and labels, the same on every rank of every world."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(case.batch) % 3
    size = case.config(world).data.size
    return [
        Batch(
            torch.randint(0, 256, (case.batch, 1, size, size), generator=generator, dtype=torch.uint8),
            labels if "data.conditional=true" in case.settings else None,
        )
        for _ in range(count)
    ]


def initial_state(case: Case) -> State:
    labelled = "data.conditional=true" in case.settings
    return State(label_frequencies=[0.5, 0.25, 0.25] if labelled else None)


def main(out: Path) -> None:
    """Train every case under the launcher's strategy; the main rank writes OUT/CASE.safetensors and .json."""
    ranks = join()
    train_all(cases(ranks.world, ranks.strategy), ranks, out)
    ranks.leave()


def ieee() -> None:
    """Full float32 on GPUs: no TF32."""
    torch.backends.cudnn.allow_tf32 = False  # the old flag: unreadable if the new ones contradict it
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def join() -> Ranks:
    """Meet the other ranks."""
    ieee()
    return Ranks(read_launch(), timedelta(seconds=120))


def train_all(chosen: list[Case], ranks: Ranks, out: Path) -> None:
    """Train each case, unbroken and resumed, and write the results."""
    for case in chosen:
        tensors, rows = _train(case, ranks, out / "checkpoints" / case.name)
        if ranks.main:
            save_tensors(tensors, out / f"{case.name}.safetensors")
            (out / f"{case.name}.json").write_text(json.dumps(rows))


def _train(case: Case, ranks: Ranks, folder: Path) -> tuple[Tensors, list[dict[str, float]]]:
    """Train unbroken, and from a checkpoint in the middle if the case is resumed: weights and averages of
    both, and the charts of the first."""
    state, rows = initial_state(case), []
    gan, batches = start(case, state, ranks)
    stats = Stats(ranks.device)
    for update in range(UPDATES):
        state.cur_nimg = train_step(gan, batches, state.cur_nimg, stats)
        reduced = stats.reduce(ranks, {})
        gan.adapt(reduced.sums, state.cur_nimg)
        rows.append(reduced.values)
        if case.resumed and update + 1 == RESUMED_AFTER:
            state.adaptive = gan.adaptive.state() if gan.adaptive else {}
            saver = Saver(folder, ranks, keep=1)
            saver.begin([gan.G, gan.D], gan.G_ema, state)
            assert saver.finish() == []
    if case.name != "tied":  # DeepSpeed keeps tied parameters gathered between turns
        _check_partitioned(gan, ranks)
    tensors = whole(gan)
    if case.resumed:
        tensors |= {f"resumed/{name}": t for name, t in resume(case, ranks, folder).items()}
    return tensors, rows


def resume(case: Case, ranks: Ranks, folder: Path) -> Tensors:
    """The end of the same training, by new engines that resume from the checkpoint in `folder`."""
    found, _ = ranks.broadcast_from_main(lambda: checkpoint.newest_intact(folder))
    assert found is not None
    state = checkpoint.read_state(found)
    gan, batches = start(case, state, ranks)
    checkpoint.load(found, [gan.G, gan.D], gan.G_ema, ranks)
    stats = Stats(ranks.device)
    for _ in range(UPDATES - RESUMED_AFTER):
        state.cur_nimg = train_step(gan, batches, state.cur_nimg, stats)
        gan.adapt(stats.reduce(ranks, {}).sums, state.cur_nimg)
    return whole(gan)


def start(case: Case, state: State, ranks: Ranks) -> tuple[Gan, Iterator[Batch]]:
    """New players, and this rank's part of the global batches from state.cur_nimg on."""
    config = case.config(ranks.world)
    batch = batch_shape(config.data, ranks.world)
    gan = build(config, ranks, batch, state.label_frequencies)
    if gan.adaptive:
        gan.adaptive.load(state.adaptive)
    mine = batch.positions(ranks.rank)
    due = reals(case, UPDATES * config.loss.D_steps, ranks.world)[state.cur_nimg // case.batch :]
    return gan, (Batch(b.images[mine], None if b.labels is None else b.labels[mine]) for b in due)


def _check_partitioned(gan: Gan, ranks: Ranks) -> None:
    """Under ZeRO stage 3 no rank may hold more than its part of a parameter between updates: these small
    networks would otherwise pass without ever being sharded."""
    if ranks.strategy == "zero3":
        for name, p in [*gan.G.module.named_parameters(), *gan.D.module.named_parameters()]:
            held: Any = p
            assert not held.ds_persist and held.ds_status.name == "NOT_AVAILABLE", (
                f"{name} is {held.ds_status.name}: set stage3_param_persistence_threshold to 0"
            )


def whole(gan: Gan) -> Tensors:
    """Whole weights of G, D and G_ema, on the CPU; collective."""
    tensors: Tensors = {}
    for engine in (gan.G, gan.D):
        weights = engine.whole([f.data for f in engine.fragments])
        tensors |= {f"{engine.player.name}/{name}": t.cpu().clone() for name, t in weights}
    averages = gan.G_ema.engine.whole(gan.G_ema.averages)
    tensors |= {f"G_ema/{name}": t.cpu().clone() for name, t in averages}
    return {name: t.contiguous() for name, t in tensors.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
