"""What a run says: metrics.jsonl first, then W&B, then the terminal or log. Silent on all ranks but one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.config import Config, UserError
from pipeline.durable import sync
from pipeline.lock import LockLostError
from pipeline.run.resend import caption, resend
from pipeline.run.rows import Row, append, keep, rows
from pipeline.run.state import State
from pipeline.run.tracker import Tracker, open_tracker
from pipeline.wording import counted

if TYPE_CHECKING:
    from pipeline.parallel.ranks import Ranks

_WIDE = 90  # columns of a terminal from which on there is room for a long progress bar


def say(text: str) -> None:
    """One line for the person or the log, at once."""
    print(text, flush=True)


class Report:
    """Does nothing: what ranks other than the main one hold."""

    def say(self, text: str) -> None:
        """Tell the person."""

    def warn(self, title: str, text: str) -> None:
        """Tell the person, also by a W&B alert, of what is going wrong."""

    def still_ours(self) -> None:
        """To be called before the run folder is written to. Raises LockLostError if another has it now."""

    def row(self, cur_nimg: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and a point in every chart."""

    def flush(self) -> None:
        """See to it that metrics.jsonl is on disk."""

    def advance(self, cur_nimg: int) -> None:
        """Move the progress bar."""

    def working(self, text: str) -> None:
        """On the progress bar: what goes on between updates."""

    def image(self, key: str, path: Path, cur_nimg: int) -> None:
        """Show a picture that has been written."""

    def picture(self, key: str, draw: Callable[[], Path | None], cur_nimg: int) -> None:
        """Show a picture, where there is somewhere to show it; `draw` writes it."""

    def summary(self, values: Mapping[str, float]) -> None:
        """How the run ended, beside its charts."""

    def conclude(self, cur_nimg: int) -> None:
        """Say that the run is finished, and where everything is."""

    def close(self) -> None:
        """Send what is left and free the terminal; on every way out."""


class MainReport(Report):
    """Writes metrics.jsonl, forwards to the tracker, and keeps a progress bar (or plain lines in a log)."""

    def __init__(
        self,
        folder: Path,
        tracker: Tracker,
        total_nimg: int,
        cur_nimg: int,
        reported: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """check: of the run folder's lock.
        reported: up to where rows and sheets are done, if not up to cur_nimg; later ones are forgotten."""
        reported = cur_nimg if reported is None else reported
        self._tracker, self._check = tracker, check
        self._total = total_nimg
        self._last = (time.monotonic(), cur_nimg)
        self._bar: tuple[Progress, TaskID] | None = None
        self._folder, self._metrics = folder, folder / "metrics.jsonl"
        self._unwritten: list[Row] = []  # what a full or failing disk has not taken
        self._failing = False
        self.still_ours()
        self._forget_after(reported if cur_nimg else -1)
        resend(folder, tracker, reported)
        self._bar = _bar(total_nimg, cur_nimg) if sys.stdout.isatty() else None

    def say(self, text: str) -> None:
        if self._bar is None:
            say(text)
        else:
            self._bar[0].console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, title: str, text: str) -> None:
        self.say(f"warning: {text}")
        self._tracker.alert(title, text)

    def still_ours(self) -> None:
        try:
            self._check()
        except LockLostError:
            self._tracker.abandon()
            raise

    def row(self, cur_nimg: int, values: Mapping[str, float]) -> None:
        self.still_ours()
        self._unwritten.append({"cur_nimg": cur_nimg, "time": round(time.time(), 3), **values})
        self._write()
        self._tracker.log(values, cur_nimg)
        if self._bar is None:
            self.say(self._plain(cur_nimg, values))
        else:
            progress, task = self._bar
            status = _fitting(_status(values), _room(progress, f"{self._total / 1000:g}"))
            progress.update(task, completed=cur_nimg / 1000, status=status)

    def flush(self) -> None:
        self._write(durably=True)

    def advance(self, cur_nimg: int) -> None:
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=cur_nimg / 1000)

    def working(self, text: str) -> None:
        if self._bar is not None:
            self._bar[0].update(self._bar[1], status=text)

    def image(self, key: str, path: Path, cur_nimg: int) -> None:
        self._tracker.image(key, path, cur_nimg, caption(cur_nimg))

    def picture(self, key: str, draw: Callable[[], Path | None], cur_nimg: int) -> None:
        try:
            path = draw() if self._tracker.where else None
        except OSError as error:  # a picture less is no reason to stop
            self.warn("Picture not written", f"The picture {key} could not be written: {error}.")
        else:
            if path is not None:
                self.image(key, path, cur_nimg)

    def summary(self, values: Mapping[str, float]) -> None:
        self._tracker.summary(values)

    def conclude(self, cur_nimg: int) -> None:
        sheets = sorted((self._folder / "samples").glob("fakes*.png"))
        found = {
            "images": f"{sheets[-1]}   (real ones: {sheets[-1].with_name('reals.png')})" if sheets else "",
            "metrics": f"{self._metrics}{self._missing()}",
            "networks": f"{self._folder / 'export'}{os.sep}",
            "W&B": self._tracker.where,
            "scores": "; ".join(self._score_changes()),
        }
        self._end_bar()
        lines = [f"  {label:9} {text}" for label, text in found.items() if text]
        self.say("\n".join([f"Finished at kimg {cur_nimg / 1000:g}: {self._folder}", *lines]))

    def close(self) -> None:
        self._end_bar()
        self._write()
        if self._unwritten:
            self.warn("Metrics not written", f"{self._metrics} stays incomplete{self._missing()}.")
        self._tracker.finish()

    def _write(self, durably: bool = False) -> None:
        """Append the rows that are due; what the disk does not take is kept for the next time."""
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
        """Which rows the disk has not taken, if any."""
        if not self._unwritten:
            return ""
        kimgs = ", ".join(f"{row['cur_nimg'] / 1000:g}" for row in self._unwritten)
        return f", without {counted(len(self._unwritten), 'row')} that could not be written (kimg {kimgs})"

    def _forget_after(self, reported: int) -> None:
        """Drop rows that the checkpoint being resumed from does not know: the run will write them again."""
        try:
            rows(self._metrics, lambda text: self.say(f"warning: {text}"))
            keep(self._metrics, lambda row: row["cur_nimg"] <= reported)
        except OSError as error:
            raise UserError(f"{self._metrics} cannot be read or written: {error}") from None

    def _score_changes(self) -> Iterator[str]:
        """Each score as it was first, and as it is last."""
        try:
            found = rows(self._metrics)
        except OSError as error:
            yield f"not shown, as {self._metrics} cannot be read: {error}"
            return
        for key in dict.fromkeys(key for row in found for key in row if _is_score(key)):
            scored = [row for row in found if key in row]
            first, last = scored[0], scored[-1]
            texts = (f"{row[key]:.3f} at kimg {row['cur_nimg'] / 1000:g}" for row in (first, last))
            yield f"{key.removeprefix('Metrics/')} {', '.join(dict.fromkeys(texts))}"

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def _plain(self, cur_nimg: int, values: Mapping[str, float]) -> str:
        now, (then, before) = time.monotonic(), self._last
        self._last = now, cur_nimg
        status = "  ".join(_status(values).values())
        text = f"kimg {cur_nimg / 1000:8.1f} / {self._total / 1000:g}  {status}"
        if cur_nimg > before:
            left = max(self._total - cur_nimg, 0) * (now - then) / (cur_nimg - before)
            text += f"  left {int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        return text


def open_report(
    config: Config, folder: Path, state: State, ranks: Ranks, still_ours: Callable[[], None]
) -> Report:
    """Where the run reports to: nowhere on all ranks but the main one. Sets state.wandb_id."""
    ranks.progress.doing = "starting its reports"
    if not ranks.main:
        state.wandb_id = ranks.broadcast_from_main(lambda: state.wandb_id)
        return Report()
    tracker = open_tracker(config, folder, state.wandb_id, say)
    state.wandb_id = ranks.broadcast_from_main(lambda: tracker.run_id)
    total = round(config.run.total_kimg * 1000)
    return MainReport(folder, tracker, total, state.cur_nimg, state.reported, still_ours)


def _bar(total_nimg: int, cur_nimg: int) -> tuple[Progress, TaskID]:
    console = Console(file=sys.stdout)
    progress = Progress(
        BarColumn(bar_width=_bar_width(console)),
        TextColumn("{task.completed:.1f}/{task.total:g} kimg"),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
    )
    progress.start()
    task = progress.add_task("", total=total_nimg / 1000, status="")
    progress.update(task, completed=cur_nimg / 1000)
    return progress, task


def _bar_width(console: Console) -> int:
    return 24 if console.width >= _WIDE else 10


def _room(progress: Progress, total: str) -> int:
    """Characters for the status, between bar, kimg and time that is left."""
    return (
        progress.console.width - _bar_width(progress.console) - 2 * len(total) - len(".0/ kimg 0:00:00 ") - 3
    )


def _fitting(status: Mapping[str, str], room: int) -> str:
    """As much of it as there is room for; scores matter most."""
    shown = dict(status)
    for label in ("L_G", "L_D", "img/s"):
        if len("  ".join(shown.values())) > room:
            shown.pop(label, None)
    return "  ".join(shown.values())


def _status(values: Mapping[str, float]) -> dict[str, str]:
    """The few numbers a person watches, each with its label, by label."""
    shown = {
        "img/s": ("Timing/img_per_sec", "{:.0f}"),
        "L_D": ("Loss/D/loss", "{:.3f}"),
        "L_G": ("Loss/G/loss", "{:.3f}"),
        **{
            key.removeprefix("Metrics/"): (key, "{:.4f}")
            for key in values
            if _is_score(key) and not key.endswith("_train")
        },
    }
    return {
        label: f"{label} {form.format(values[key])}" for label, (key, form) in shown.items() if key in values
    }


def _is_score(key: str) -> bool:
    return key.startswith("Metrics/") and not key.endswith("_images")
