"""The rhythm of a run: after every update, do what is due. No maths and no ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from pipeline.config import Run
from pipeline.data.stream import Batch
from pipeline.players import Gan
from pipeline.run.session import Session
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.step import train_step


def train(gan: Gan, reals: Iterator[Batch], state: State, stats: Stats, run: Run, session: Session) -> bool:
    """Train from where `state` stands to run.total_kimg; False if asked to stop before, state saved.

    A run that is beyond it already, because it was lowered, makes one more update, to end as all do.
    """
    total = math.ceil(run.total_kimg * 1000)
    if not session.begin(gan, state.cur_nimg, evaluate=run.eval_kimg <= run.total_kimg):
        return False
    session.clock.start(state.cur_nimg)
    reals = session.timed(reals)
    stopping = False
    while not stopping and (state.reported < total or state.ended != state.cur_nimg):
        asked_to_stop = session.exchange()
        before = state.cur_nimg
        if state.reported == before:  # else a stop came before its reports: they come first
            with session.updating():
                state.cur_nimg = train_step(gan, reals, before, stats)
        session.advance(state.cur_nimg)
        finished = state.cur_nimg >= total
        stopping = asked_to_stop()
        if not stopping:
            due = _due(state.reported, state.cur_nimg, finished)
            stopping = not report(gan, state, stats, run, session, due)
            state.ended = state.cur_nimg if finished and not stopping else state.ended
        if stopping or session.new_best or _due(before, state.cur_nimg, finished)(run.checkpoint_kimg):
            session.save(gan, state, stats)
    session.finish_saves()
    return not stopping


def report(gan: Gan, state: State, stats: Stats, run: Run, session: Session, due: Due) -> bool:
    """Score, chart and show what is due; False if asked to stop meanwhile, which all ranks know then: the
    rest is left to the resumed run."""
    if due(run.tick_kimg) or due(run.eval_kimg):
        scores = session.evaluate(gan) if due(run.eval_kimg) else {}
        if scores is None:
            return False
        session.tick(gan, state, stats, scores)
    if due(run.snapshot_kimg):
        session.snapshot(gan, state.cur_nimg)
    state.reported = state.cur_nimg
    return True


Due = Callable[[float], bool]


def _due(before: int, now: int, finished: bool) -> Due:
    """Whether something that happens every so many kimg is due after an update; after the last, all is."""
    return lambda kimg: finished or now // (1000 * kimg) > before // (1000 * kimg)
