"""What a run reports: to metrics.jsonl, then W&B, then the terminal or log; on the main rank only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config, UserError
from pipeline.durable import sync
from pipeline.errors import CommonError
from pipeline.lock import LockLostError
from pipeline.run import evaluations, events
from pipeline.run.changes import CHANGES, data_since
from pipeline.run.resend import caption, resend
from pipeline.run.rows import Row, append, keep, rows
from pipeline.run.saved_grids import grids_of, newest, reals_of
from pipeline.run.state import State
from pipeline.run.tensorboard import TensorBoard, check_tensorboard
from pipeline.run.terminal import Bar, Lines, is_score
from pipeline.run.tracker import Tracker, open_tracker
from pipeline.wording import counted, in_kimg

if TYPE_CHECKING:
    from pipeline.parallel.ranks import Ranks


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


class Report:
    """Does nothing: on ranks other than the main one."""

    def say(self, text: str) -> None:
        """Show a message."""

    def warn(self, title: str, text: str) -> None:
        """Show a warning, record it in events.jsonl and send it as a W&B alert."""

    @contextmanager
    def kept(self, world: int) -> Iterator[None]:
        """An error inside, which ends the run, is kept in events.jsonl: of several ranks, one that all of
        them raise, as the watch keeps others."""
        yield

    def still_ours(self) -> None:
        """Call before writing to the run folder. Raises LockLostError if another process has taken it."""

    def row(self, cur_nimg: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and a point in every chart."""

    def flush(self) -> None:
        """Wait until metrics.jsonl is on disk."""

    def advance(self, cur_nimg: int) -> None:
        """Move the progress bar."""

    def working(self, text: str) -> None:
        """Show on the progress bar what happens between updates; "": nothing any more."""

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Inside: what the progress bar shows, unless something there is `working`."""
        self.working(f"{doing} …")
        try:
            yield
        finally:
            self.working("")

    def image(self, key: str, path: Path, cur_nimg: int) -> None:
        """Send a picture that has been written."""

    def picture(self, key: str, draw: Callable[[], Path | None], cur_nimg: int) -> None:
        """Send a picture that `draw` writes, if the run is tracked."""

    def extra(self, name: str, make: Callable[[], object]) -> None:
        """Write a file of the run folder that training does not need: whatever fails is a warning."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Values for the whole run, beside its charts."""

    def conclude(self, cur_nimg: int) -> None:
        """Show that the run is finished, and where everything is."""

    def close(self) -> None:
        """Send what is left and free the terminal. Call it on every way out."""


class MainReport(Report):
    """Writes metrics.jsonl, sends to the trackers, and shows a progress bar or plain lines."""

    def __init__(
        self,
        folder: Path,
        trackers: Sequence[Tracker],
        total_nimg: int,
        cur_nimg: int,
        reported: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """check: of the run folder's lock.
        reported: up to where rows and sample grids are done (None: cur_nimg); later rows are dropped."""
        reported = cur_nimg if reported is None else reported
        self._trackers, self._check, self._cur_nimg = trackers, check, cur_nimg
        self._terminal = Lines(total_nimg, cur_nimg)
        self._folder, self._metrics = folder, folder / "metrics.jsonl"
        self._unwritten: list[Row] = []  # what a full or failing disk did not take
        self._failing = False  # the disk
        self._failed = False  # the run
        self.still_ours()
        self._forget_after(reported if cur_nimg else -1)
        for tracker in trackers:
            resend(folder, tracker, reported)
        if sys.stdout.isatty():
            self._terminal = Bar(total_nimg, cur_nimg)

    def say(self, text: str) -> None:
        self._terminal.say(text)

    def warn(self, title: str, text: str) -> None:
        self.say(f"warning: {text}")
        self._record("warning", title=title, text=text)
        for tracker in self._trackers:
            tracker.alert(title, text)

    def _record(self, event: str, **what: str) -> None:
        with suppress(LockLostError):  # else the folder is another process's, to which this did not happen
            self._check()
            events.record(self._folder, event, self._cur_nimg, **what)

    @contextmanager
    def kept(self, world: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            if world == 1 or isinstance(error, CommonError):
                self._record("error", text=str(error) or type(error).__name__)
            raise

    def still_ours(self) -> None:
        try:
            self._check()
        except LockLostError:
            for tracker in self._trackers:
                tracker.abandon()
            raise

    def row(self, cur_nimg: int, values: Mapping[str, float]) -> None:
        self.still_ours()
        self._unwritten.append({"cur_nimg": cur_nimg, "time": round(time.time(), 3), **values})
        self._write()
        for tracker in self._trackers:
            tracker.log(values, cur_nimg)
        self._terminal.row(cur_nimg, values)

    def flush(self) -> None:
        self._write(durably=True)

    def advance(self, cur_nimg: int) -> None:
        self._cur_nimg = cur_nimg
        self._terminal.advance(cur_nimg)

    def working(self, text: str) -> None:
        self._terminal.working(text)

    def image(self, key: str, path: Path, cur_nimg: int) -> None:
        for tracker in self._trackers:
            tracker.image(key, path, cur_nimg, caption(cur_nimg))

    def picture(self, key: str, draw: Callable[[], Path | None], cur_nimg: int) -> None:
        try:
            path = draw() if any(tracker.tracks for tracker in self._trackers) else None
        except Exception as error:  # no reason to stop
            self.warn("Picture not written", f"The picture {key} could not be written: {error}.")
        else:
            if path is not None:
                self.image(key, path, cur_nimg)

    def extra(self, name: str, make: Callable[[], object]) -> None:
        self.still_ours()
        try:
            make()
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split()).removesuffix(".")
            self.warn("File not written", f"{name} could not be written: {reason}.")

    def summary(self, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.summary(values)

    def conclude(self, cur_nimg: int) -> None:
        grid, reals = newest(self._folder), reals_of(self._folder)
        found = {
            "images": f"{grid}{f'   (real ones: {reals})' * reals.exists()}" if grid else "",
            "page": str(page) if (page := self._folder / "report.html").exists() else "",
            "metrics": f"{self._metrics}{self._missing()}",
            "networks": f"{self._folder / 'export'}{os.sep}",
            "W&B": "".join(tracker.where for tracker in self._trackers),
            "scores": "; ".join(self._score_changes()),
        }
        self._terminal.close()
        lines = [f"  {label:9} {text}" for label, text in found.items() if text]
        self.say("\n".join([f"Finished at kimg {in_kimg(cur_nimg / 1000)}: {self._folder}", *lines]))

    def close(self) -> None:
        self._terminal.close()
        self._write()
        if self._unwritten:
            self.warn("Metrics not written", f"{self._metrics} stays incomplete{self._missing()}.")
        for tracker in self._trackers:
            tracker.finish(self._failed)

    def _write(self, durably: bool = False) -> None:
        """Append the waiting rows; what the disk does not take waits for the next time."""
        try:
            while self._unwritten:
                append(self._metrics, self._unwritten[0])
                del self._unwritten[0]
            if durably and self._metrics.exists():
                sync(self._metrics)
        except OSError as error:
            if not self._failing:
                self.warn("Metrics not written", f"{self._metrics} cannot be written for now: {error}.")
            self._failing = True
        else:
            if self._failing:
                self.say(f"{self._metrics} can be written again, and is complete.")
            self._failing = False

    def _missing(self) -> str:
        """Which rows the disk did not take, if any."""
        if not self._unwritten:
            return ""
        kimgs = ", ".join(in_kimg(row["cur_nimg"] / 1000) for row in self._unwritten)
        return f", without {counted(len(self._unwritten), 'row')} that could not be written (kimg {kimgs})"

    def _forget_after(self, reported: int) -> None:
        """Drop rows, sample grids and scores from after the checkpoint: the resumed run makes them again."""
        try:
            keep(
                self._metrics,
                lambda row: row["cur_nimg"] <= reported,
                complain=lambda text: self.say(f"warning: {text}"),
            )
            for cur_nimg, grid in grids_of(self._folder):
                if cur_nimg > reported:
                    grid.unlink(missing_ok=True)
            evaluations.forget_after(self._folder, reported, self.say)
        except OSError as error:
            raise UserError(f"{error.filename or self._metrics} cannot be read or written: {error}") from None

    def _score_changes(self) -> Iterator[str]:
        """Each score, first and last on the present data."""
        try:
            since = data_since(rows(self._folder / CHANGES))
            found = [row for row in rows(self._metrics) if row["cur_nimg"] > since]
        except OSError as error:
            yield f"not shown, as {self._metrics} cannot be read: {error}"
            return
        for key in dict.fromkeys(key for row in found for key in row if is_score(key)):
            scored = [row for row in found if key in row]
            first, last = scored[0], scored[-1]
            texts = (f"{row[key]:.3f} at kimg {in_kimg(row['cur_nimg'] / 1000)}" for row in (first, last))
            yield f"{key.removeprefix('Metrics/')} {', '.join(dict.fromkeys(texts))}"


def keep_error(folder: Path, cur_nimg: int, text: str, still_ours: Callable[[], None]) -> None:
    """Record in events.jsonl why the run in `folder` ends, unless the folder is another process's by now."""
    with suppress(LockLostError):
        still_ours()
        events.record(folder, "error", cur_nimg, text=text)


def open_report(
    config: Config, folder: Path, state: State, ranks: Ranks, still_ours: Callable[[], None]
) -> Report:
    """Where the run reports to: nowhere on all ranks but the main one. Sets state.wandb_id."""
    ranks.progress.doing = "starting its reports"
    ranks.broadcast_from_main(lambda: check_tensorboard(config))
    if not ranks.main:
        state.wandb_id = ranks.broadcast_from_main(lambda: state.wandb_id)
        return Report()
    tracker = open_tracker(config, folder, state.wandb_id, say)
    state.wandb_id = ranks.broadcast_from_main(lambda: tracker.run_id)
    still_ours()
    events.record(folder, "start", state.cur_nimg, **events.environment(ranks))
    trackers = [tracker, TensorBoard(folder, say)] if config.track.tensorboard else [tracker]
    total = round(config.run.total_kimg * 1000)
    return MainReport(folder, trackers, total, state.cur_nimg, state.reported, still_ours)
