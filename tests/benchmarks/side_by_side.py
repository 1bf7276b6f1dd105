"""What a user might run instead, for as many seconds of one core, on the same images and scored alike:

    OMP_NUM_THREADS=1 python tests/benchmarks/side_by_side.py RUN SECONDS OUT.png [SCRIPT …]

RUN, a finished one of ours without classes, gives images, scorer and the row to compare with. Beside it: the
loop that tutorials teach, on DCGAN; and each SCRIPT of github.com/eriklindernoren/PyTorch-GAN (MIT, no part
of this project: clone it), such as implementations/dcgan/dcgan.py. It runs as it is but for three things: its
MNIST is RUN's training images, decoded and resized beforehand; it saves no pictures; and it is ended when the
time is over. Its images of 32 px are scored at the size of the data.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from launch.bench.rivals import TutorialLoop
from pipeline.config import Config, load
from pipeline.data.index import load_index
from pipeline.data.plan import split_of
from pipeline.data.stream import heldout_batches, training_batches
from pipeline.gan.draws import Draws
from pipeline.parallel.launched import Launch
from pipeline.parallel.ranks import Ranks
from pipeline.run.evaluate import evaluate, from_latents
from pipeline.run.export import load_generator
from pipeline.run.features import load_features
from pipeline.run.grid import tile
from pipeline.run.images import PLAIN, images_of
from pipeline.run.references import references

THEIR_SIZE = 32  # pixels: the default of their scripts
SHOWN = 36
TUTORIAL = [
    "G.z_dim=100",
    "data.batch_size=128",
    "data.workers=0",
    *(f"optim.{player}.{setting}" for player in "GD" for setting in ("lr=2e-4", "betas=[0.5,0.999]")),
]


class OverError(Exception):
    """The time is over."""


class Trained(NamedTuple):
    name: str
    seconds: float
    kimg: float
    G: Callable[[Tensor, Tensor | None], Tensor]
    z: Tensor


class Images(Dataset[Any]):
    """(float [C, H, W] in [−1, 1], 0) of uint8 images, until the time is over."""

    def __init__(self, images: Tensor, seconds: float) -> None:
        self.images, self.drawn, self.end = images, 0, time.process_time() + seconds

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        if time.process_time() >= self.end:
            raise OverError
        self.drawn += 1
        return self.images[number].float() / 127.5 - 1, 0


def published(script: Path, images: Tensor, seconds: float, count: int) -> Trained:
    """Run a script of theirs."""
    larger = interpolate(images.float(), THEIR_SIZE, mode="bilinear").round().clamp(0, 255).byte()
    data = Images(larger, seconds)
    nothing = lambda *_, **__: None  # noqa: E731
    stands_in = {
        "datasets": {"MNIST": lambda *_, **__: data},
        "transforms": dict.fromkeys(("Compose", "Resize", "ToTensor", "Normalize"), nothing),
        "utils": {"save_image": nothing},
    }
    sys.modules["torchvision"] = package = types.ModuleType("torchvision")
    for name, members in stands_in.items():
        module = types.ModuleType(f"torchvision.{name}")
        vars(module).update(members)
        setattr(package, name, module)
        sys.modules[module.__name__] = module
    code, scope = compile(script.read_text(), script, "exec"), {"__name__": "__main__"}
    sys.argv = [script.name, "--n_epochs", "1000000", "--img_size", str(THEIR_SIZE)]
    start = time.process_time()
    with ExitStack() as stack:
        inside = Path(stack.enter_context(tempfile.TemporaryDirectory()), "a", "b")
        inside.mkdir(parents=True)  # it makes folders two levels up
        stack.enter_context(contextlib.chdir(inside))
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        stack.enter_context(contextlib.suppress(OverError))
        exec(code, scope)
    seconds = time.process_time() - start
    G: Any = scope["generator"]
    size = images.shape[-1]

    def make(z: Tensor, _: Tensor | None) -> Tensor:
        return interpolate(G(z), size, mode="bilinear", antialias=True)

    make.module = G  # type: ignore[attr-defined]
    z = torch.randn(count, scope["opt"].latent_dim)  # type: ignore[attr-defined]
    return Trained(f"PyTorch-GAN {script.stem}", seconds, data.drawn / 1000, make, z)


def tutorial(config: Config, images: Tensor, seconds: float, count: int) -> Trained:
    loop, start, updates = TutorialLoop(config, torch.device("cpu"), images), time.process_time(), 0
    while time.process_time() - start < seconds:
        loop.run(10)
        updates += 10
    spent = time.process_time() - start
    z = torch.randn(count, config.G.z_dim)
    return Trained("tutorial DCGAN", spent, updates * config.data.batch_size / 1000, loop.G, z)


def main(run: str, seconds: str, out: str, *scripts: str) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # theirs
    G, config, state = load_generator(Path(run))
    index = load_index(str(config.data.train), print, config.data.remote)
    split, count = split_of(config, index), config.score.images
    all_at_once = replace(config.data, batch_size=500, workers=0, xflip=False)
    batches = training_batches(index, split.training(), all_at_once)
    images = torch.cat([batch.images for batch in islice(batches, split.training().size // 500)])
    theirs = load(f"{run}/config.yaml", TUTORIAL)
    of_run = Draws(config.run.seed, config.G.z_dim, state.label_frequencies).fixed("score", count)
    found = [
        tutorial(theirs, images.contiguous(), float(seconds), count),
        *(published(Path(script), images, float(seconds), count) for script in scripts),
        Trained(f"ShardGAN {Path(run).name}", float(seconds), state.cur_nimg / 1000, G, of_run.z),
    ]
    ranks = Ranks(Launch("single", "no", 0, 1), timedelta(seconds=600))
    extractor = load_features(config.score.features).to(ranks.device)
    real = references(config, extractor, index, ranks, PLAIN)
    heldout, _ = next(heldout_batches(index, split.heldout(), config.data, batch=SHOWN, limit=SHOWN))
    panels = [("real images", "", heldout.images)]
    print("| | core-seconds | kimg | G in | KID | coverage |\n|---|---|---|---|---|---|")
    for one in found:
        network: nn.Module = getattr(one.G, "module", one.G)  # type: ignore[assignment]
        shown = []
        for mode in ("eval", "train") if one is not found[-1] else ("eval",):
            network.train(mode == "train")
            generate = from_latents(one.G, one.z, None, ranks.device, images_of(config.data, ranks.device))
            scores = evaluate(generate, real, extractor, ranks, ("kid", "dc"))
            kid, coverage = (scores[f"Metrics/{name}_{extractor.name}"] for name in ("kid", "coverage"))
            cells = (one.name, f"{one.seconds:.0f}", f"{one.kimg:.0f}", mode, f"{kid:.3f}", f"{coverage:.2f}")
            print(f"| {' | '.join(cells)} |")
            shown.append((kid, generate(0, SHOWN)))
        kid, pictured = min(shown, key=lambda way: way[0])
        panels.append((one.name, f"KID {kid:.3g}", pictured))
    draw(panels).savefig(out)


def draw(panels: list[tuple[str, str, Tensor]]) -> Figure:
    figure = Figure(figsize=(2.9 * len(panels), 3.4), dpi=100, layout="constrained")
    for axes, (title, below, images) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(tile(images.contiguous(), 6), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=10)
        axes.axis("off")
        axes.text(0.5, -0.03, below, ha="center", va="top", fontsize=10, transform=axes.transAxes)
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:])
