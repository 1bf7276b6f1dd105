"""What surrounds training: the run's folder, its reports, samples, scores and checkpoints, and the stop flag.

Everything here is collective: every rank makes the same calls, and what only one may do (write a file, talk
to a person) goes through an object that does nothing on the others.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.index import Index
from pipeline.data.plan import Split
from pipeline.data.stream import Batch
from pipeline.errors import CommonError, RunError
from pipeline.gan import schedules
from pipeline.parallel.compiled import during_update
from pipeline.parallel.engine import Engine
from pipeline.parallel.fragments import checksum, sum_of_squares
from pipeline.parallel.ranks import Ranks
from pipeline.players import Gan
from pipeline.run.clock import Clock
from pipeline.run.conclusion import conclude
from pipeline.run.curves import Curves
from pipeline.run.evaluate import from_latents
from pipeline.run.flags import Flags
from pipeline.run.health import BITS, FORWARD, ORDER, BadImages, Health, slowest
from pipeline.run.heldout import HeldOutImages
from pipeline.run.images import agreed_images, made_at_once
from pipeline.run.report import Report
from pipeline.run.resume import where_to_resume
from pipeline.run.sample_grids import GRID, SampleGrids, spread
from pipeline.run.saving import Saver
from pipeline.run.scorer import Scorer
from pipeline.run.state import State
from pipeline.run.stats import Reduced, Stats
from pipeline.run.stop import StopSignals
from pipeline.wording import counted


class Session:
    """One process's view of the run it is part of."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        index: Index,
        split: Split,
        ranks: Ranks,
        report: Report,
        signals: StopSignals,
        state: State,
    ) -> None:
        """state: its lists of what was found so far are added to."""
        self._config, self._folder, self._ranks, self._report = config, folder, ranks, report
        self._signals, self._progress, self.clock, self._state = signals, ranks.progress, Clock(), state
        self._train_size = split.training().size
        self._saver = Saver(folder / "checkpoints", ranks, config.run.keep, report.still_ours)
        self._saver.best = state.best, state.best_of
        self._flags = Flags(ranks, signals, self._saver, self._heed)
        self._grids = SampleGrids(folder, ranks, report, index.classes)
        self._curves = Curves(folder, report)
        self._health = Health(config.run, ranks, report, state.in_a_row)
        self._images = agreed_images(config.data, ranks)
        self._scorer = Scorer(config, folder, index, ranks, report, signals, self._health, self._images)
        self._bad = BadImages(config.data.max_bad, state.bad, ranks, report)
        self._heldout = HeldOutImages(config.data, index, split.heldout(), ranks)
        self._saved: float | None = None  # when a save last began
        self.new_best = False  # the last tick's score was the best so far, and no checkpoint holds it yet

    def begin(self, gan: Gan, cur_nimg: int, evaluate: bool) -> bool:
        """Before the first update: grids and, of a new run, scores. False if asked to stop meanwhile."""
        if self._heldout.size:
            self._grids.reals(self._heldout, self._images, gan.draws, cur_nimg)
        if cur_nimg:
            return True
        self.snapshot(gan, 0)
        scores = self.evaluate(gan) if evaluate else {}
        if scores:
            self._report.row(0, {"Progress/kimg": 0.0, "Progress/epoch": 0.0, **scores})
        return scores is not None

    def timed(self, reals: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; records how long training waits for them, and the bad images in them."""
        while True:
            with self._progress.during("waiting for data"), self.clock.waiting():
                batch = next(reals)
            self._bad.add(batch.bad)
            yield batch

    def updating(self) -> AbstractContextManager[None]:
        """Around an update, in which a rank that makes no progress is stuck, however busy it is."""
        return during_update(self._ranks, compiling=partial(self._off_the_clock, "compiling"))

    def exchange(self) -> Callable[[], bool]:
        """Send the other ranks this one's flags; the result, after an update, is whether any rank had been
        asked to stop before (see Flags). It raises RunError when too many saves have failed."""
        return self._flags.exchange()

    def advance(self, cur_nimg: int) -> None:
        self._progress.cur_nimg = cur_nimg
        self._report.advance(cur_nimg)

    def tick(self, gan: Gan, state: State, stats: Stats, scores: Mapping[str, float]) -> None:
        """Report what was accumulated since the last tick: one row, one point in every chart.

        Raises CommonError, or RunError of its kind, when what is reported says that the run cannot continue.
        """
        with self._progress.during("reporting"):
            reduced = self._reduce(gan, state.cur_nimg, stats)
            gan.adapt(reduced.sums, state.cur_nimg)
            if any(reduced.each["bad"]):
                self._bad.exchange()
            values = reduced.values | self._charts(gan, reduced.each, state.cur_nimg) | dict(scores)
            self._report.row(state.cur_nimg, dict(sorted(values.items())))
            self.clock.start(state.cur_nimg)
            try:
                self._health.check(reduced)
                self._bad.check()
            except CommonError:
                self._saver.finish()  # the save under way is from before
                raise
            self.new_best |= self._scorer.is_best(state, scores)

    def snapshot(self, gan: Gan, cur_nimg: int) -> None:
        """A sample grid of G_ema, from the same latents every time; and the curves so far."""
        made = gan.G_ema.module(), *gan.draws.grid(GRID), self._ranks.device, self._images
        make = from_latents(*made, made_at_once(self._config.data.size, self._config.data.batch_gpu))
        with self._off_the_clock("drawing samples"):
            fakes = self._grids.fakes(lambda: make(0, GRID), gan.draws, cur_nimg)
            self._curves.draw_if_due()
        reals = self._heldout.images
        if fakes is not None and reals is not None and len(reals) > 1 and cur_nimg:
            self._health.compare_diversity(spread(fakes), spread(self._images(reals)))

    def evaluate(self, gan: Gan) -> dict[str, float] | None:
        """Scores of G_ema against held-out images, {} without any; None if asked to stop meanwhile."""
        if not self._heldout.size or not self._config.score.metrics:
            return {}
        with self._off_the_clock("evaluating"):
            return self._scorer.evaluate(gan)

    def save(self, gan: Gan, state: State, stats: Stats) -> None:
        """A checkpoint from which a run in this or any other world resumes."""
        with self._off_the_clock("saving a checkpoint"):
            self._report.still_ours()
            self._report.flush()
            if any(self._ranks.poll_any(self._bad.found > 0)()):
                self._bad.exchange()
            state.stats = self._ranks.gather_on_main(stats.state())  # which writes them
            state.adaptive = gan.adaptive.state() if gan.adaptive else {}
            start = time.perf_counter()
            complaints = self._saver.finish()  # of the last save, done by now unless storage is slow
            before, self._saved = self._saved, time.perf_counter()
            if before is not None:
                self._health.compare_wait(self._saved - start, self._saved - before)
            self._heed(complaints)
            self._saver.begin([gan.G, gan.D], gan.G_ema, state, gan.draws.version)
            self.new_best = False

    def finish_saves(self) -> None:
        """Wait until the last checkpoint is written. Raises RunError if it could not be."""
        with self._off_the_clock("saving a checkpoint"):
            self._heed(self._saver.finish())
        if self._saver.failures:
            raise RunError(f"The last checkpoint could not be written. {_how_to_continue(self._folder)}")

    def conclude(self, state: State, completed: bool) -> None:
        """Leave the marker that says how the run ended; export the networks of a completed one.

        Raises RunError when a run reached its end with its last updates skipped.
        """
        if completed:
            self._health.check_end()
        conclude(self._folder, state, self._report, self._ranks, self._signals.received, completed)
        self._signals.concluded()

    # Pieces of the above

    def _reduce(self, gan: Gan, cur_nimg: int, stats: Stats) -> Reduced:
        _wait_for(self._ranks.device)
        mine = {"seconds": self.clock.seconds, "waited": self.clock.waited}
        self._heldout.score(gan, cur_nimg, stats)
        for engine in (gan.D, gan.G):
            stats.add(engine.chart("Weights", _squares(engine)))
        mine |= {"memory": _peak_memory_gb(self._ranks.device), "bad": self._bad.found}
        return stats.reduce(self._ranks, mine | of_this_rank(gan, self._ranks.world))

    def _charts(self, gan: Gan, each: Mapping[str, list[float]], cur_nimg: int) -> dict[str, float]:
        """The charts that are not means of what updates reported."""
        return {
            "Progress/kimg": cur_nimg / 1000,
            "Progress/epoch": cur_nimg / self._train_size,
            "Progress/bad_images": self._bad.known,
            **schedules.charts(self._config, cur_nimg, gan.augment_p(cur_nimg)),
            "Resources/peak_mem_gb": max(each["memory"]),
            **self.clock.charts(each["seconds"], each["waited"], cur_nimg),
            **slowest(each[FORWARD]),
        }

    def _heed(self, complaints: list[str]) -> None:
        """One failed save is no reason to stop; several in a row are.

        If it held the best score, the best is again the one before, which no later save may then delete."""
        if complaints and self._state.best and self._state.best[1] == self._saver.cur_nimg:
            self._state.best, self._state.best_of = self._saver.best
        for complaint in complaints:
            self._report.warn("Checkpoint not written", f"{complaint} Training continues; earlier ones stay.")
        if self._saver.failures > (most := self._config.run.max_failed_saves):
            raise RunError(
                f"{counted(self._saver.failures, 'checkpoint')} in a row could not be written "
                f"(run.max_failed_saves = {most}). {_how_to_continue(self._folder)}"
            )

    @contextmanager
    def _off_the_clock(self, doing: str) -> Iterator[None]:
        _wait_for(self._ranks.device)  # what updates are still to do there is training's time
        with self.clock.stopped(), self._progress.during(doing), self._report.during(doing):
            yield


def _wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def of_this_rank(gan: Gan, world: int) -> dict[str, float]:
    """What is compared between ranks: their speed, their copies of replicated players, and the order in which
    they ran the layers of sharded ones."""
    players = (gan.G, gan.D)
    found = {FORWARD: sum(p.forward_timer.take() for p in players)}
    found |= {f"{ORDER}{p.player.name}": p.order.take() for p in players if p.order is not None}
    replicated = [p for p in players if world > 1 and p.copies > 1]
    return found | {f"{BITS}{p.player.name}": checksum([f.data for f in p.fragments]) for p in replicated}


def _squares(engine: Engine) -> dict[str, Tensor]:
    """Sums of squares over this rank's elements: of all weights, and of each layer's kernel."""
    kernels = {f"norm/{f.name}": sum_of_squares([f.data]) for f in engine.fragments if len(f.shape) > 1}
    return {"norm": sum_of_squares([f.data for f in engine.fragments]), **kernels}


def _peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held: on a GPU since the last call; on a CPU, whose peak cannot be
    reset, since it started."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _how_to_continue(folder: Path) -> str:
    return f"Make room, or mend what else the warnings name. {where_to_resume(folder)}"
