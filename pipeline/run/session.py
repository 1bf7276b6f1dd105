"""What surrounds training: the run's folder, its reports, samples, scores and checkpoints, and the stop flag.

Everything here is collective: every rank makes the same calls, and what only one may do (write a file,
talk to a person) goes through an object that does nothing on the others.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.index import Index
from pipeline.data.plan import HeldOutPlan
from pipeline.data.stream import Batch
from pipeline.errors import RunError
from pipeline.parallel.engine import Engine
from pipeline.parallel.fragments import checksum, sum_of_squares
from pipeline.parallel.ranks import Ranks
from pipeline.players import Gan
from pipeline.run.bad_images import BadImages
from pipeline.run.evaluate import evaluate_generator, from_latents
from pipeline.run.features import Extractor, load_features
from pipeline.run.folder import REFERENCE
from pipeline.run.health import BITS, FORWARD, Health, slowest
from pipeline.run.heldout import HeldOutImages
from pipeline.run.references import keep_to, references
from pipeline.run.report import Report
from pipeline.run.sample_grids import GRID, SampleGrids, spread
from pipeline.run.saving import Saver
from pipeline.run.scores import leading_chart
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.run.stop import StopSignals
from pipeline.wording import counted

_MAKE_ROOM = "Make room, and run the same command again: it continues from the newest one that was."


class _Interrupted(Exception):
    """Told to stop in the middle of an evaluation."""


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
        state: State,
    ) -> None:
        """state: whose lists of what was found so far are added to."""
        self.config, self.folder, self.index, self.heldout = config, folder, index, heldout
        self.ranks, self.report, self._signals = ranks, report, signals
        self._progress = ranks.progress
        self._train_size = train_size
        self._saver = Saver(folder / "checkpoints", ranks, config.run.keep, report.still_ours)
        self._grids = SampleGrids(folder, ranks, report)
        self._health = Health(config.run, ranks, report, state.in_a_row)
        self.new_best = False  # the last tick's score was the best so far, and no checkpoint holds it yet
        self._extractor: Extractor | None = None
        self._looked_at = 0  # images, real and generated, for the score that is being computed
        self._waited = 0.0
        self._saved: float | None = None  # when a save last began
        self._bad = BadImages(config.data.max_bad, state.bad, ranks, report)
        self._clock = (time.perf_counter(), 0)
        self._heldout_images = HeldOutImages(config.data, index, heldout, ranks)

    # Once, and as training goes

    def begin(self, gan: Gan, evaluate: bool) -> bool:
        """Before the first update: what real images look like, and where G starts from. False if told to stop
        meanwhile."""
        if self.heldout.size:
            self._grids.reals(lambda: self._heldout_images.some(GRID))
        self.snapshot(gan, 0)
        scores = self.evaluate(gan) if evaluate else {}
        if scores:
            self.report.row(0, {"Progress/kimg": 0.0, "Progress/epoch": 0.0, **scores})
        return scores is not None

    def start_clock(self, cur_nimg: int) -> None:
        """Count time and images from here: reports and saves are not training."""
        self._waited = 0.0
        self._clock = (time.perf_counter(), cur_nimg)

    def timed(self, reals: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with a note of how long training waited for them and what was bad in them."""
        while True:
            start = time.perf_counter()
            with self._progress.during("waiting for data"):
                batch = next(reals)
            self._waited += time.perf_counter() - start
            self._bad.name(batch.bad)
            yield batch

    def updating(self) -> AbstractContextManager[None]:
        """Around an update, in which a rank that makes no progress is stuck, however busy it is."""
        return self._progress.during("in an update", updating=True)

    def stop_requested(self) -> Callable[[], bool]:
        """Ask whether any rank was told to stop; the answer, the same on all, comes when called.

        On the same message travels how a save that is under way gets on, which is then seen to as well.
        Raises RunError when too many saves have failed.
        """
        answer = self.ranks.poll_any(self._signals.received is not None, *self._saver.flags)

        def told() -> bool:
            stop, busy, failed = answer()
            complaint = self._saver.advance(busy, failed)
            self._heed([complaint] if complaint else [])
            return stop

        return told

    def advance(self, cur_nimg: int) -> None:
        self.ranks.progress.cur_nimg = cur_nimg
        self.report.advance(cur_nimg)

    def tick(self, gan: Gan, state: State, stats: Stats, scores: Mapping[str, float]) -> None:
        """Reduce what has been accumulated and report it: one row, one point in every chart.

        Raises RunError when the figures say that the run cannot go on.
        """
        cur_nimg = state.cur_nimg
        self._progress.doing = "reporting"
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        now, (then, before) = time.perf_counter(), self._clock
        self._heldout_images.score(gan.D, stats)
        for engine in (gan.D, gan.G):
            stats.add(engine.chart("Weights", _squares(engine)))
        mine = {
            "seconds": now - then,
            "waited": self._waited,
            "memory": _peak_memory_gb(self.ranks.device),
            "bad": self._bad.found,
            **self._of_this_rank(gan),
        }
        reduced = stats.reduce(self.ranks, mine)
        values, each = reduced.values, reduced.each
        if any(each["bad"]):
            self._bad.exchange()
        seconds, images = max(each["seconds"]), cur_nimg - before
        values |= {
            "Progress/kimg": cur_nimg / 1000,
            "Progress/epoch": cur_nimg / self._train_size,
            "Resources/peak_mem_gb": max(each["memory"]),
            "Progress/bad_images": self._bad.known,
        }
        if images:
            values |= {
                "Timing/sec_per_kimg": seconds / images * 1000,
                "Timing/img_per_sec": images / seconds,
                "Timing/data_wait_frac": sum(each["waited"]) / sum(each["seconds"]),
            }
        if self.ranks.world > 1:
            values |= slowest(each[FORWARD])
        self.report.row(cur_nimg, dict(sorted((values | dict(scores)).items())))
        self.start_clock(cur_nimg)
        try:
            self._health.check(reduced)
        except RunError:
            self._saver.finish()  # what is being written is from before
            raise
        self._bad.check()
        self._compare_score(state, scores)

    def snapshot(self, gan: Gan, cur_nimg: int) -> None:
        """A sheet of G_ema's images from the same latents every time."""
        G_ema = gan.G_ema.module()
        z, c = gan.draws.grid(GRID)
        make = from_latents(G_ema, z, c, self.ranks.device)
        with self._off_the_clock("drawing samples"):
            fakes = self._grids.fakes(lambda: make(0, GRID), gan.draws.grid_columns(GRID), cur_nimg)
        reals = self._heldout_images.images
        if fakes is not None and reals is not None and cur_nimg:
            self._health.compare_diversity(spread(fakes), spread(reals))

    def evaluate(self, gan: Gan) -> dict[str, float] | None:
        """Scores of G_ema against held-out images (no scores if nothing is held out); None if told to stop
        meanwhile, as scoring many images takes longer than whoever tells us waits."""
        if not self.heldout.size or not self.config.score.metrics:
            return {}
        self._looked_at = 0
        self.report.still_ours()
        try:
            with self._off_the_clock("evaluating"):
                if self._extractor is None:
                    self._extractor = load_features(self.config.score.features).to(self.ranks.device)
                    self._extractor.register_forward_pre_hook(self._interrupt)
                real = references(self.config, self._extractor, self.index, self.ranks)
                self.ranks.broadcast_from_main(lambda: keep_to(self.folder / REFERENCE, real))
                G_ema, metrics = gan.G_ema.module(), self.config.score.metrics
                return evaluate_generator(G_ema, gan.draws, real, self._extractor, self.ranks, metrics)
        except _Interrupted:
            return None

    def save(self, gan: Gan, state: State, stats: Stats) -> None:
        """A checkpoint that this or any other world can go on from."""
        with self._off_the_clock("saving a checkpoint"):
            self.report.still_ours()
            self.report.flush()
            self._bad.exchange()
            state.stats = self.ranks.gather_objects(stats.state())
            self._heed(self._finish_last())
            self._saver.begin([gan.G, gan.D], gan.G_ema, state)
            self.new_best = False

    def check_end(self) -> None:
        """Raises RunError when the run has come to its end, but not by training."""
        self._health.check_end()

    def finish_saves(self) -> None:
        """Wait until the last checkpoint is written. Raises RunError if it could not be."""
        with self._off_the_clock("saving a checkpoint"):
            self._heed(self._saver.finish())
        if self._saver.failures:
            raise RunError(f"The last checkpoint could not be written. {_MAKE_ROOM}")

    # Pieces of the above

    def _interrupt(self, _: object, batches: tuple[Tensor, ...]) -> None:
        """Before each batch of a score: all ranks go through equally many."""
        if self.ranks.poll_any(self._signals.received is not None)()[0]:
            raise _Interrupted
        self._looked_at += len(batches[0]) * self.ranks.world
        self.report.working(f"scoring: {counted(self._looked_at, 'image')}")

    def _of_this_rank(self, gan: Gan) -> dict[str, float]:
        """What is compared between ranks: how fast they are, and their copies of replicated players."""
        players = (gan.G, gan.D)
        pace = {FORWARD: sum(p.forward_timer.take() for p in players)}
        if self.ranks.world == 1:
            return pace
        replicated = (p for p in players if p.copies == self.ranks.world)
        copies = {p.player.name: [f.data for f in p.fragments] for p in replicated}
        return pace | {f"{BITS}{name}": checksum(tensors) for name, tensors in copies.items()}

    def _compare_score(self, state: State, scores: Mapping[str, float]) -> None:
        """Remember the best score, and warn of one that is far from it. The lower the better."""
        name = leading_chart(self.config.score.metrics, scores)
        if name is None:
            return
        score, best = scores[name], state.best
        if best is not None and not math.isfinite(best[0]):
            best = None
        self._health.compare_score(name.removeprefix("Metrics/"), score, best)
        if math.isfinite(score) and (best is None or score < best[0]):
            state.best = (score, state.cur_nimg)
            self.new_best = True

    def _finish_last(self) -> list[str]:
        """See the save before to its end, by now a matter of no time, or storage is slow; its complaints."""
        start, before = time.perf_counter(), self._saved
        complaints = self._saver.finish()
        self._saved = time.perf_counter()
        if before is not None:
            self._health.compare_wait(self._saved - start, self._saved - before)
        return complaints

    def _heed(self, complaints: list[str]) -> None:
        """A save that failed is no reason to stop, unless nothing else happens."""
        for complaint in complaints:
            self.report.warn("Checkpoint not written", f"{complaint} Training goes on; earlier ones stand.")
        if self._saver.failures > self.config.run.max_failed_saves:
            raise RunError(
                f"{counted(self._saver.failures, 'checkpoint')} in a row could not be written "
                f"(run.max_failed_saves = {self.config.run.max_failed_saves}). {_MAKE_ROOM}"
            )

    @contextmanager
    def _off_the_clock(self, doing: str) -> Iterator[None]:
        """What happens inside is not counted as training time."""
        start = time.perf_counter()
        try:
            with self._progress.during(doing):
                yield
        finally:
            self._clock = (self._clock[0] + time.perf_counter() - start, self._clock[1])


def _squares(engine: Engine) -> dict[str, Tensor]:
    """Sums of squares over this rank's elements: of all weights, and of each layer's kernel."""
    kernels = {f"norm/{f.name}": sum_of_squares([f.data]) for f in engine.fragments if len(f.shape) > 1}
    return {"norm": sum_of_squares([f.data for f in engine.fragments]), **kernels}


def _peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held: on the GPU since the last call, or in all when it trains on a
    CPU, whose peak cannot be reset."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
