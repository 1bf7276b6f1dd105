"""What surrounds training: the run's folder, its reports, samples, scores and checkpoints, and the stop flag.

Everything here is collective: every rank makes the same calls, and what only one may do (write a file,
talk to a person) goes through an object that does nothing on the others.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.config import Config, UserError
from pipeline.data.index import Index
from pipeline.data.plan import HeldOutPlan
from pipeline.data.stream import Batch, heldout_batches
from pipeline.gan.images import to_float
from pipeline.parallel.engine import Engine
from pipeline.parallel.fragments import sum_of_squares
from pipeline.parallel.ranks import Ranks, StopSignals
from pipeline.run import checkpoint
from pipeline.run.evaluate import evaluate, fixed_images, from_latents, heldout_features
from pipeline.run.features import Extractor, load_features
from pipeline.run.grid import save_grid
from pipeline.run.report import Report, say
from pipeline.run.state import State
from pipeline.run.stats import Stats

if TYPE_CHECKING:
    from pipeline.step import Gan

GRID = 64  # images on a sample sheet


class Session:
    """One process's view of the run it is part of."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        index: Index,
        heldout: HeldOutPlan,
        train_size: int,
        ranks: Ranks,
        report: Report,
        signals: StopSignals,
    ) -> None:
        self.config, self.folder, self.index, self.heldout = config, folder, index, heldout
        self.ranks, self.report, self._signals = ranks, report, signals
        self._train_size = train_size
        self._extractor: Extractor | None = None
        self._waited = 0.0
        self._bad_images = 0
        self._clock = (time.perf_counter(), 0)
        self._watched = self._heldout_sample()

    # Once, and as training goes

    def begin(self, gan: Gan, evaluate: bool) -> None:
        """Before the first update: what real images look like, and where G starts from."""
        self._save_reals()
        self.snapshot(gan, 0)
        if evaluate:
            self.report.row(0, {"Progress/kimg": 0.0, "Progress/epoch": 0.0, **self.evaluate(gan)})

    def start_clock(self, cur_nimg: int) -> None:
        """Count time and images from here: reports and saves are not training."""
        self._waited = 0.0
        self._clock = (time.perf_counter(), cur_nimg)

    def timed(self, reals: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with a note of how long training waited for them and what was bad in them."""
        while True:
            start = time.perf_counter()
            batch = next(reals)
            self._waited += time.perf_counter() - start
            self._name_bad(batch.bad)
            yield batch

    def stop_requested(self) -> Callable[[], bool]:
        """Ask whether any rank was told to stop; the answer, the same on all, comes when called."""
        return self.ranks.any(self._signals.received is not None)

    def advance(self, cur_nimg: int) -> None:
        self.report.advance(cur_nimg)

    def tick(self, gan: Gan, cur_nimg: int, stats: Stats, scores: Mapping[str, float]) -> None:
        """Reduce what has been accumulated and report it: one row, one point in every chart."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        now, (then, before) = time.perf_counter(), self._clock
        self._score_heldout(gan.D, stats)
        for engine in (gan.D, gan.G):
            stats.add(engine.chart("Weights", {"norm": sum_of_squares([f.data for f in engine.fragments])}))
        mine = {
            "seconds": now - then,
            "waited": self._waited,
            "memory": _peak_memory_gb(self.ranks.device),
            "bad": self._bad_images,
        }
        values, each = stats.reduce(self.ranks, mine)
        seconds, images = max(each["seconds"]), cur_nimg - before
        values |= {
            "Progress/kimg": cur_nimg / 1000,
            "Progress/epoch": cur_nimg / self._train_size,
            "Resources/peak_mem_gb": max(each["memory"]),
            "Progress/bad_images": sum(each["bad"]),
        }
        if images:
            values |= {
                "Timing/sec_per_kimg": seconds / images * 1000,
                "Timing/img_per_sec": images / seconds,
                "Timing/data_wait_frac": sum(each["waited"]) / sum(each["seconds"]),
            }
        self.report.row(cur_nimg, dict(sorted((values | dict(scores)).items())))
        self.start_clock(cur_nimg)

    def snapshot(self, gan: Gan, cur_nimg: int) -> None:
        """A sheet of G_ema's images from the same latents every time."""
        G_ema = gan.G_ema.module()
        z, c = gan.draws.grid(GRID)
        make = from_latents(G_ema, z, c, self.ranks.device)
        path = self.folder / "samples" / f"fakes{cur_nimg // 1000:06d}.png"
        with self._off_the_clock():
            self._save_sheet(
                "Samples/fakes", lambda: make(0, GRID), path, gan.draws.grid_columns(GRID), cur_nimg
            )

    def evaluate(self, gan: Gan) -> dict[str, float]:
        """Scores of G_ema against held-out images; none if nothing is held out."""
        if not self.heldout.size or not self.config.score.metrics:
            return {}
        with self._off_the_clock():
            if self._extractor is None:
                self._extractor = load_features(self.config.score.features).to(self.ranks.device)
            images = min(self.config.score.images, self.heldout.size)
            real = heldout_features(
                self._extractor, self.index, self.heldout, self.ranks, self.config.data, images
            )
            fakes = fixed_images(gan.G_ema.module(), gan.draws, len(real), self.ranks.device)
            return evaluate(fakes, real, self._extractor, self.ranks)

    def save(self, gan: Gan, state: State, stats: Stats) -> None:
        """A checkpoint that this or any other world can go on from."""
        with self._off_the_clock():
            state.stats = self.ranks.gather_objects(stats.state())
            folder, keep = self.folder / "checkpoints", self.config.run.keep
            checkpoint.save(folder, [gan.G, gan.D], gan.G_ema, state, self.ranks, keep)

    # Pieces of the above

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """What happens inside is not counted as training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._clock = (self._clock[0] + time.perf_counter() - start, self._clock[1])

    def _name_bad(self, bad: tuple[str, ...]) -> None:
        """Whatever the rank: each finds its own."""
        self._bad_images += len(bad)
        for text in bad:
            line = f"warning: {text} Another image stands in for it (data.max_bad)."
            self.report.say(line) if self.ranks.main else say(line)

    def _score_heldout(self, D: Engine, stats: Stats) -> None:
        """D's mean logit on real images it never trains on: beside Loss/scores/real, its over-fitting.

        Computed as in training (BatchNorm by batch, so that the two compare), and without a trace: the
        buffers such a pass moves are put back.
        """
        if self._watched is None:
            return
        buffers = {name: b.clone() for name, b in D.module.named_buffers()}
        torch.manual_seed(0)
        with torch.no_grad(), D.autocast():
            logits = D.module(to_float(self._watched.images), self._watched.labels)
        for name, buffer in D.module.named_buffers():
            buffer.copy_(buffers[name])
        stats.mean("Loss/scores/heldout", logits.float().mean())

    def _heldout_sample(self) -> Batch | None:
        """As many held-out images as D sees at once, on the device; None if fewer are held out."""
        world, data = self.ranks.world, self.config.data
        count = min(data.batch_size // world, data.batch_gpu or data.batch_size)
        if self.heldout.size < count * world:
            return None
        with self.ranks.agreeing():
            batch, _ = next(self._heldout_batches(self.ranks.rank, world, count))
        labels = None if batch.labels is None else batch.labels.to(self.ranks.device)
        return Batch(batch.images.to(self.ranks.device), labels)

    def _save_reals(self) -> None:
        """Real held-out images (nothing, if none are held out) on a sheet like those of the fakes."""
        if self.heldout.size:
            count = min(GRID, self.heldout.size)
            path = self.folder / "samples" / "reals.png"
            self._save_sheet(
                "Samples/reals", lambda: next(self._heldout_batches(0, 1, count))[0].images, path, 8, 0
            )

    def _heldout_batches(self, rank: int, world: int, count: int) -> Iterator[tuple[Batch, int]]:
        """The first `count` held-out images for each of `world` ranks, this rank's part."""
        data = self.config.data
        return heldout_batches(
            self.index,
            self.heldout,
            batch=count,
            rank=rank,
            world=world,
            size=data.size,
            channels=data.channels,
            conditional=data.conditional,
            limit=count * world,
        )

    def _save_sheet(
        self, key: str, make: Callable[[], Tensor], path: Path, columns: int, cur_nimg: int
    ) -> None:
        """Write a sheet of images, made on the one rank that writes."""
        with self.ranks.agreeing():
            if self.ranks.main:
                try:
                    save_grid(make(), path, columns)
                except OSError as error:
                    raise UserError(f"{path} could not be written: {error}") from None
                self.report.image(key, path, cur_nimg, f"{cur_nimg / 1000:g} kimg")


def _peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held: on the GPU, or in all when it trains on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
