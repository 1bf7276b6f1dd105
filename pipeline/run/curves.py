"""Pictures of what runs recorded: a panel for each thing that one watches, over kimg."""

from __future__ import annotations

import math
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.durable import whole
from pipeline.run.history import History, read_history
from pipeline.run.panels import Panel, is_news, label_log, panels_of
from pipeline.run.report import Report
from pipeline.wording import counted, in_kimg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"  # in a run folder
FEWEST = 5  # rows of training that make a curve

_SHARE = 0.01  # of a run's time that may be spent on drawing while it trains
_COST_S = 2.0  # of the first picture, with matplotlib's import
_ACROSS = 3  # panels beside each other
_WIDTH, _HEIGHT, _DPI = 10.0, 2.6, 100  # inches: of the picture, and of a row of panels
_LETTERS = 150  # of the legend's lines across the picture
_NAME = 60  # letters in one line of a name
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
# Okabe and Ito's, which people of all kinds of colour vision tell apart, without the yellow: it is too pale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def plot(histories: Sequence[History], panels: Sequence[Panel]) -> Figure:
    """A figure of at least one panel. Of one run each line has a colour of its own; of several each run has
    one, with a dash for each line, and trials of one candidate share it."""
    from matplotlib.figure import Figure  # here, as it takes a second to import

    rows = -(-len(panels) // _ACROSS)
    across = min(len(panels), _ACROSS)
    candidates = list(dict.fromkeys(history.candidate for history in histories))
    colours = dict(zip(candidates, _colours(len(candidates)), strict=True))
    figure = Figure(figsize=(_WIDTH, _HEIGHT * rows), dpi=_DPI, layout="constrained")
    places = figure.subplots(rows, across, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, panel in zip(places, panels, strict=False):
        _draw(axes, panel, histories, colours)
    if len(histories) > 1:
        _add_legend(figure, histories, colours)
    else:
        figure.suptitle(_shown(_summary(histories[0]), 110), fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, in the format of the suffix. Raises OSError; ValueError for a
    format that matplotlib cannot write."""
    with whole(path) as partial, warnings.catch_warnings():
        # a name in letters that matplotlib's font lacks is drawn as boxes: a warning per letter helps nobody
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
        figure.savefig(partial, format=path.suffix.lower().removeprefix(".") or "png")


def draw_run(folder: Path) -> Path | None:
    """Write curves.png of the run in `folder`; None while there is too little to draw.

    Raises UserError or OSError.
    """
    history = read_history(folder)
    if len(history.series("Loss/D/loss")[0]) < FEWEST:
        return None
    path = folder / CURVES
    save(plot([history], panels_of([history])), path)
    return path


class Curves:
    """curves.png of a run that is training: drawn at sample grids, in at most a hundredth of the time."""

    def __init__(self, folder: Path, report: Report, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._report, self._clock = folder, report, clock
        self._next = clock() + _COST_S / _SHARE

    def draw_if_due(self) -> None:
        """Draw, unless the last picture is too recent for what it cost."""
        if (start := self._clock()) < self._next:
            return
        self._report.extra(CURVES, lambda: draw_run(self._folder))
        end = self._clock()
        self._next = end + (end - start) * (1 / _SHARE - 1)


def wrapped(name: str, letters: int) -> str:
    """A name in up to three lines of so many letters. matplotlib reads text between two $ as a formula."""
    lines = textwrap.wrap(name, letters, max_lines=3, placeholder="…") or [""]
    return _shown("\n".join(lines))


def columns_of(names: Sequence[str], letters: int) -> int:
    """How many of these names, of a line or more each, fit beside each other in so many letters."""
    longest = max(len(line) for name in names for line in name.splitlines())
    return max(1, min(len(names), letters // (longest + 8)))


def _draw(axes: Axes, panel: Panel, histories: Sequence[History], colours: dict[str, Any]) -> None:
    several, values = len(histories) > 1, []
    for number, (_, chart) in enumerate(panel.lines):
        for history in histories:
            if not is_news(history, chart):
                continue
            kimg, points = history.series(chart)
            values += points
            look: dict[str, Any] = {
                "color": colours[history.candidate] if several else COLOURS[number % len(COLOURS)]
            }
            if several:
                look["ls"] = _DASHES[number % len(_DASHES)]
            axes.plot(kimg, points, lw=1.2, marker="." if len(points) < 2 else "", **look)
            if panel.marked and not number:
                _mark_lowest(axes, history, chart, look["color"], several)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel("kimg", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e4e4e4", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.02 * max(history.rows[-1]["cur_nimg"] for history in histories) / 1000 or 1)
    if panel.log:
        _scale(axes, values)
    for nimg in dict.fromkeys(change["cur_nimg"] for history in histories for change in history.changes):
        axes.axvline(nimg / 1000, color="#888888", lw=0.8, ls=":")
    if len(panel.lines) > 1:
        _add_key(axes, [legend for legend, _ in panel.lines], several)


def _mark_lowest(axes: Axes, history: History, chart: str, colour: Any, several: bool) -> None:
    if lowest := history.lowest(chart):
        axes.plot([lowest.cur_nimg / 1000], [lowest.value], "o", ms=5, mfc="none", mec=colour)
        if not several:
            axes.set_title(f"lowest {lowest}", fontsize=8, loc="right", color="#555555")


def _add_key(axes: Axes, legends: Sequence[str], several: bool) -> None:
    """Which line is which: by colour, or of several runs by dash."""
    from matplotlib.lines import Line2D

    lines = []
    for number, legend in enumerate(legends):
        colour = "#444444" if several else COLOURS[number % len(COLOURS)]
        dash = _DASHES[number % len(_DASHES)] if several else "-"
        lines.append(Line2D([], [], lw=1.2, label=legend, color=colour, ls=dash))
    look: dict[str, Any] = {"framealpha": 0.7, "edgecolor": "none", "handlelength": 1.8, "ncols": 2}
    axes.legend(handles=lines, loc="best", fontsize=7, **look)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where one value is many times another, as the smaller ones would not be seen."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 8 * min(finite):
        axes.set_yscale("log")
        label_log(axes)
    else:  # an axis that says values whole, not what to add to its numbers; rounding does not fill it
        if finite and max(finite) - min(finite) < 1e-3 * abs(max(finite)):
            middle = (min(finite) + max(finite)) / 2
            axes.set_ylim(middle - 0.02 * abs(middle), middle + 0.02 * abs(middle))
        axes.ticklabel_format(axis="y", useOffset=False)


def _add_legend(figure: Figure, histories: Sequence[History], colours: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    runs = [history.candidate for history in histories]
    names = [
        wrapped(f"{name} ({counted(runs.count(name), 'trial')})" if runs.count(name) > 1 else name, _NAME)
        for name in colours
    ]
    beside = columns_of(names, _LETTERS)
    lines = sum(name.count("\n") + 1 for name in names) / beside
    figure.set_figheight(figure.get_figheight() + 0.2 * lines)
    handles = [Line2D([], [], lw=2, color=c, label=n) for n, c in zip(names, colours.values(), strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=beside, fontsize=8, frameon=False)


def _colours(count: int) -> list[Any]:
    """Distinct ones as far as there are; of more, shades in their order."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * place / (count - 1)) for place in range(count)]


def _summary(history: History) -> str:
    """The run, and what changed in it where the panels have a dotted line."""
    changes = [
        f"kimg {in_kimg(change['cur_nimg'] / 1000)}: {change['key']} {change['old']} → {change['new']}"
        for change in history.changes
    ]
    return "; ".join([history.name, *changes])


def _shown(text: str, letters: int = 10_000) -> str:
    return (text if len(text) <= letters else f"{text[: letters - 1]}…").replace("$", r"\$")
