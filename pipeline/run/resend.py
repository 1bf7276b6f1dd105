"""Tells the tracker again what a run has written, of which it takes what W&B lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from PIL import Image

from pipeline.config import Config, UserError
from pipeline.lock import take
from pipeline.run.rows import rows
from pipeline.run.tracker import Announce, Tracker, is_behind, open_tracker

_Tell = Callable[[Tracker], None]


def resend(folder: Path, tracker: Tracker, cur_nimg: int) -> None:
    """Everything in metrics.jsonl and samples/ up to cur_nimg, in the order of its first telling."""
    told = [*_rows(folder), *_sheets(folder)]
    for nimg, tell in sorted(told, key=lambda one: one[0]):  # of one step, the row before the sheets
        if nimg <= cur_nimg:
            tell(tracker)


def catch_up(config: Config, folder: Path, announce: Announce) -> None:
    """Send what W&B lacks of a finished run, if it lacks something."""
    last = max((nimg for nimg, _ in _rows(folder, announce)), default=-1)
    if config.track.wandb and is_behind(folder, last):
        try:
            lock = take(folder, announce)
        except UserError as error:
            announce(f"W&B may lack something of this run, which is not sent now: {error}")
            return
        with lock:
            tracker = open_tracker(config, folder, True, None, announce)
            resend(folder, tracker, last)
            tracker.finish()


def _rows(folder: Path, announce: Announce = lambda _: None) -> Iterator[tuple[int, _Tell]]:
    try:
        found = rows(folder / "metrics.jsonl", announce)
    except OSError as error:
        announce(f"W&B may lack rows, as metrics.jsonl cannot be read: {error}")
        return
    for row in found:
        nimg = row.pop("cur_nimg")
        row.pop("time", None)
        yield nimg, partial(_tell_row, row, nimg)


def _sheets(folder: Path) -> Iterator[tuple[int, _Tell]]:
    for path in sorted(folder.glob("samples/*.png")):
        with suppress(OSError, KeyError, ValueError), Image.open(path) as sheet:  # a person's own file, say
            chart, nimg = sheet.info["chart"], int(sheet.info["cur_nimg"])
            yield nimg, partial(_tell_sheet, chart, path, nimg)


def _tell_row(values: dict[str, float], nimg: int, tracker: Tracker) -> None:
    tracker.log(values, nimg)


def _tell_sheet(chart: str, path: Path, nimg: int, tracker: Tracker) -> None:
    tracker.image(chart, path, nimg, caption(nimg))


def caption(cur_nimg: int) -> str:
    return f"{cur_nimg / 1000:g} kimg"
