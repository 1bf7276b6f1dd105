"""Sends the tracker everything that a run has written; it takes what W&B lacks."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path

from PIL import Image

from pipeline.config import Config, UserError
from pipeline.lock import take
from pipeline.run.grid import LATEST
from pipeline.run.rows import Row, each_row
from pipeline.run.saved_grids import UNREADABLE
from pipeline.run.tracker import Announce, Tracker, open_tracker
from pipeline.run.wandb_files import recall
from pipeline.wording import in_kimg

_AT_ONCE = 1000  # calls; far more, as a run of many ticks has, would look as if W&B did not take them


def resend(folder: Path, tracker: Tracker, cur_nimg: int) -> None:
    """Send all of metrics.jsonl and samples/ up to cur_nimg, in the order in which it was first sent."""
    if not tracker.tracks:
        return
    charts = ((nimg, partial(tracker.log, values, nimg, at)) for nimg, at, values in _rows(folder))
    pictures = [
        (nimg, partial(tracker.image, chart, path, nimg, caption(nimg)))
        for nimg, chart, path in _pictures(folder)
    ]
    pictures.sort(key=itemgetter(0))
    number = 0
    for nimg, call in heapq.merge(charts, pictures, key=itemgetter(0)):  # rows before their pictures
        if nimg <= cur_nimg:
            call()
            number += 1
            if number % _AT_ONCE == 0:
                tracker.pause()


def catch_up(
    config: Config, folder: Path, announce: Announce, others: Iterable[Callable[[], Tracker]] = ()
) -> None:
    """Send what W&B lacks of a finished run, if anything; and all of it to the others, which these open."""
    last = max((nimg for nimg, _, _ in _rows(folder, announce)), default=-1)
    known, trackers = recall(folder), [*others]
    if config.track.wandb and (known is None or known.has < last):
        trackers.append(partial(open_tracker, config, folder, None, announce))
    if not trackers:
        return
    try:
        lock = take(folder, announce)
    except UserError as error:
        announce(f"W&B or TensorBoard may lack something of this run, which is not sent now: {error}")
        return
    with lock:
        for opened in trackers:
            tracker = opened()
            resend(folder, tracker, last)
            tracker.finish()


def caption(cur_nimg: int) -> str:
    return f"{in_kimg(cur_nimg / 1000)} kimg"


def _rows(folder: Path, announce: Announce = lambda _: None) -> Iterator[tuple[int, float | None, Row]]:
    """cur_nimg, time and charts of each row of metrics.jsonl."""
    try:
        for row in each_row(folder / "metrics.jsonl", announce):
            yield row.pop("cur_nimg"), row.pop("time", None), row
    except OSError as error:
        announce(f"W&B may lack rows, as metrics.jsonl cannot be read: {error}")


def _pictures(folder: Path) -> Iterator[tuple[int, str, Path]]:
    """cur_nimg, chart and file of each picture in samples/ that a run has written there."""
    for path in sorted({*folder.glob("samples/*.png")} - {folder / "samples" / LATEST}):
        with suppress(*UNREADABLE, KeyError), Image.open(path) as picture:
            yield int(picture.info["cur_nimg"]), picture.info["chart"], path
