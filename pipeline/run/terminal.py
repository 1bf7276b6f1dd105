"""A run in the terminal: a progress bar, or plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.wording import in_kimg

_WIDE = 90  # columns of a terminal with room for a long bar


class Lines:
    """Plain lines."""

    def __init__(self, total_nimg: int, cur_nimg: int) -> None:
        self._total = total_nimg
        self._decimals = 1 if total_nimg >= 1000 else 3  # a trial of a few updates
        self._last = (time.monotonic(), cur_nimg)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def row(self, cur_nimg: int, values: Mapping[str, float]) -> None:
        """The few numbers that a person watches."""
        now, (then, before) = time.monotonic(), self._last
        self._last = now, cur_nimg
        status = "  ".join(_status(values).values())
        text = f"kimg {cur_nimg / 1000:8.{self._decimals}f} / {in_kimg(self._total / 1000)}  {status}"
        if cur_nimg > before:
            left = max(self._total - cur_nimg, 0) * (now - then) / (cur_nimg - before)
            text += f"  left {int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        self.say(text)

    def advance(self, cur_nimg: int) -> None:
        """Move the bar."""

    def working(self, text: str) -> None:
        """On the bar: what happens between updates, in place of the last row's figures; "": nothing."""

    def close(self) -> None:
        """Free the terminal."""


class Bar(Lines):
    """A progress bar, with lines above it."""

    def __init__(self, total_nimg: int, cur_nimg: int) -> None:
        super().__init__(total_nimg, cur_nimg)
        self._console = Console(file=sys.stdout)
        self._width = 24 if self._console.width >= _WIDE else 10
        self._bar = Progress(
            BarColumn(bar_width=self._width),
            TextColumn(f"{{task.completed:.{self._decimals}f}}/{{task.total:g}} kimg"),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._row = ""  # what the last row has said
        self._scores: dict[str, float] = {}  # the newest
        self._bar.start()
        self._task = self._bar.add_task("", total=total_nimg / 1000, status="")
        self.advance(cur_nimg)

    def say(self, text: str) -> None:
        style = "yellow" if text.startswith("warning:") else None
        self._console.print(text, highlight=False, markup=False, soft_wrap=True, style=style)

    def row(self, cur_nimg: int, values: Mapping[str, float]) -> None:
        kimg = 2 * len(in_kimg(self._total / 1000)) + self._decimals + len("./ kimg 0:00:00 ")
        self._scores |= {key: value for key, value in values.items() if is_score(key)}
        status = _status({**values, **self._scores})
        self._row = _fitting(status, self._console.width - self._width - kimg - 3)
        self.working("")
        self.advance(cur_nimg)

    def advance(self, cur_nimg: int) -> None:
        self._bar.update(self._task, completed=cur_nimg / 1000)

    def working(self, text: str) -> None:
        self._bar.update(self._task, status=text or self._row, refresh=True)  # before what may take long

    def close(self) -> None:
        self._bar.stop()


def is_score(key: str) -> bool:
    return key.startswith("Metrics/") and not key.endswith("_images")


def _status(values: Mapping[str, float]) -> dict[str, str]:
    """Speed, losses and scores, each with its label, by label."""
    scores = [key for key in values if is_score(key) and not key.endswith("_train")]
    shown = {
        "img/s": ("Timing/img_per_sec", "{:.0f}"),
        "L_D": ("Loss/D/loss", "{:.3f}"),
        "L_G": ("Loss/G/loss", "{:.3f}"),
        **{key.removeprefix("Metrics/"): (key, "{:.4f}") for key in scores},
    }
    return {
        label: f"{label} {form.format(values[key])}" for label, (key, form) in shown.items() if key in values
    }


def _fitting(status: Mapping[str, str], room: int) -> str:
    """What fits into `room` characters; scores matter most, and the first of them stays."""
    shown = dict(status)
    losses = ["L_G", "L_D", "img/s"]
    for label in (*losses, *[label for label in reversed(shown) if label not in losses][:-1]):
        if len("  ".join(shown.values())) > room:
            shown.pop(label, None)
    return "  ".join(shown.values())
