"""Scores of G_ema during a run, and the best one so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pipeline.config import Config
from pipeline.data.index import Index
from pipeline.parallel.ranks import Ranks
from pipeline.players import Gan
from pipeline.run.evaluate import evaluate_generator
from pipeline.run.features import Extractor, load_features
from pipeline.run.folder import REFERENCE
from pipeline.run.health import Health
from pipeline.run.images import Images, made_at_once
from pipeline.run.metrics import leading_chart
from pipeline.run.references import keep_to, references
from pipeline.run.report import Report
from pipeline.run.state import State
from pipeline.run.stop import StopSignals
from pipeline.wording import counted


class _Interrupted(Exception):
    """Asked to stop in the middle of an evaluation."""


class Scorer:
    """Compares G_ema with held-out images. Every rank makes the same calls."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        index: Index,
        ranks: Ranks,
        report: Report,
        signals: StopSignals,
        health: Health,
        images: Images,
    ) -> None:
        self._config, self._reference, self._index = config, folder / REFERENCE, index
        self._ranks, self._report, self._signals, self._health = ranks, report, signals, health
        self._images = images
        self._extractor: Extractor | None = None
        self._scored = 0  # images, real and generated, for the score that is being computed

    def evaluate(self, gan: Gan) -> dict[str, float] | None:
        """Scores by chart; None if asked to stop meanwhile, as many images take longer than run.grace."""
        self._scored = 0
        self._report.still_ours()
        try:
            if self._extractor is None:
                self._report.working("loading the feature network …")
                self._extractor = load_features(self._config.score.features).to(self._ranks.device)
                self._extractor.register_forward_pre_hook(self._interrupt)
            real = references(self._config, self._extractor, self._index, self._ranks, self._images)
            if complaint := self._ranks.broadcast_from_main(lambda: keep_to(self._reference, real)):
                self._report.warn("File not written", f"{complaint} The next score does it.")
            scores = evaluate_generator(
                gan.G_ema.module(),
                gan.draws,
                real,
                self._extractor,
                self._ranks,
                self._config.score.metrics,
                self._images,
                made_at_once(self._config.data.size, self._config.data.batch_gpu),
            )
            # Ranks must agree on what is best to the last bit, whatever their GPUs make of the same features.
            return self._ranks.broadcast_from_main(lambda: scores)
        except _Interrupted:
            return None

    def is_best(self, state: State, scores: Mapping[str, float]) -> bool:
        """Whether the leading score is the lowest so far (kept in `state`); warns if it is far above that."""
        name = leading_chart(self._config.score.metrics, scores)
        if name is None:
            return False
        score, best = scores[name], state.best
        if best is not None and not (math.isfinite(best[0]) and state.best_of in (name, None)):
            best = None  # or of another metric, which score.metrics named until now
        self._health.compare_score(name.removeprefix("Metrics/"), score, best)
        better = math.isfinite(score) and (best is None or score < best[0])
        if better:
            state.best, state.best_of = (score, state.cur_nimg), name
        return better

    def _interrupt(self, _: object, batches: tuple[Tensor, ...]) -> None:
        """Before each batch of a score; all ranks have the same number of them."""
        if self._ranks.poll_any(self._signals.received is not None)()[0]:
            raise _Interrupted
        self._scored += len(batches[0]) * self._ranks.world
        self._report.working(f"scoring: {counted(self._scored, 'image')}")
