"""The rhythm of a run: after every update, ask whose turn it is. No maths and no ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from pipeline.config import Run
from pipeline.data.stream import Batch
from pipeline.run.session import Session
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.step import Gan, train_step


def train(gan: Gan, reals: Iterator[Batch], state: State, stats: Stats, run: Run, session: Session) -> bool:
    """Train from where `state` stands to run.total_kimg; False if asked to stop before, state saved."""
    total = math.ceil(run.total_kimg * 1000)
    if state.cur_nimg == 0:
        session.begin(gan, evaluate=run.eval_kimg <= run.total_kimg)
    session.start_clock(state.cur_nimg)
    reals = session.timed(reals)
    while state.cur_nimg < total:
        asked_to_stop = session.stop_requested()
        before = state.cur_nimg
        state.cur_nimg = train_step(gan, reals, before, stats)
        due = _due(before, state.cur_nimg, finished=state.cur_nimg >= total)
        if due(run.tick_kimg) or due(run.eval_kimg):
            scores = session.evaluate(gan) if due(run.eval_kimg) else {}
            session.tick(gan, state.cur_nimg, stats, scores)
        if due(run.snapshot_kimg):
            session.snapshot(gan, state.cur_nimg)
        stopping = asked_to_stop()
        if stopping or due(run.checkpoint_kimg):
            session.save(gan, state, stats)
        if stopping and state.cur_nimg < total:
            return False
        session.advance(state.cur_nimg)
    return True


def _due(before: int, now: int, finished: bool) -> Callable[[float], bool]:
    """Whether something that happens every so many kimg falls on this update; everything does on the last."""
    return lambda kimg: finished or now // (1000 * kimg) > before // (1000 * kimg)
