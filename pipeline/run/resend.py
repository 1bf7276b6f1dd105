"""Sends the tracker everything that a run has written; it takes what W&B lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path

from PIL import Image

from pipeline.config import Config, UserError
from pipeline.lock import take
from pipeline.run.grid import LATEST
from pipeline.run.rows import Row, rows
from pipeline.run.saved_grids import UNREADABLE
from pipeline.run.tracker import Announce, Tracker, open_tracker
from pipeline.run.wandb_files import recall

_AT_ONCE = 1000  # calls; far more, as a run of many ticks has, would look as if W&B did not take them


def resend(folder: Path, tracker: Tracker, cur_nimg: int) -> None:
    """Send all of metrics.jsonl and samples/ up to cur_nimg, in the order in which it was first sent."""
    calls = [(nimg, partial(tracker.log, values, nimg, at)) for nimg, at, values in _rows(folder)]
    calls += [
        (nimg, partial(tracker.image, chart, path, nimg, caption(nimg)))
        for nimg, chart, path in _pictures(folder)
    ]
    calls = sorted((c for c in calls if c[0] <= cur_nimg), key=itemgetter(0))  # rows before their pictures
    for number, (_, call) in enumerate(calls, 1):
        call()
        if number % _AT_ONCE == 0:
            tracker.pause()


def catch_up(config: Config, folder: Path, announce: Announce) -> None:
    """Send what W&B lacks of a finished run, if anything."""
    last = max((nimg for nimg, _, _ in _rows(folder, announce)), default=-1)
    known = recall(folder)
    if config.track.wandb and (known is None or known.has < last):
        try:
            lock = take(folder, announce)
        except UserError as error:
            announce(f"W&B may lack something of this run, which is not sent now: {error}")
            return
        with lock:
            tracker = open_tracker(config, folder, None, announce)
            resend(folder, tracker, last)
            tracker.finish()


def caption(cur_nimg: int) -> str:
    return f"{cur_nimg / 1000:g} kimg"


def _rows(folder: Path, announce: Announce = lambda _: None) -> Iterator[tuple[int, float | None, Row]]:
    """cur_nimg, time and charts of each row of metrics.jsonl."""
    try:
        found = rows(folder / "metrics.jsonl", announce)
    except OSError as error:
        announce(f"W&B may lack rows, as metrics.jsonl cannot be read: {error}")
        return
    for row in found:
        yield row.pop("cur_nimg"), row.pop("time", None), row


def _pictures(folder: Path) -> Iterator[tuple[int, str, Path]]:
    """cur_nimg, chart and file of each picture in samples/ that a run has written there."""
    for path in sorted({*folder.glob("samples/*.png")} - {folder / "samples" / LATEST}):
        with suppress(*UNREADABLE, KeyError), Image.open(path) as picture:
            yield int(picture.info["cur_nimg"]), picture.info["chart"], path
