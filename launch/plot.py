"""`shardgan plot`: curves of runs in one picture."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.paths import DrawingPath, UserPath
from pipeline.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipeline.run.history import History
    from pipeline.run.panels import Panel


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath(), metavar="RUN...")
@click.option(
    "--out", type=DrawingPath(), default="curves.png", show_default=True, help="A .png, .svg or .pdf."
)
@click.option(
    "--charts",
    metavar="NAME,…",
    help="A panel for each of these charts of metrics.jsonl, as in 'Metrics/*,Loss/D/loss'.",
)
def plot(runs: tuple[Path, ...], out: Path, charts: str | None) -> None:
    """Draw the curves of RUNs in one picture, a colour each; of a selection's folder, those of its trials,
    a colour per candidate.

    One run's picture is also in its folder, as curves.png.
    """
    from pipeline.run import curves
    from pipeline.run.comparison import references_apart
    from pipeline.run.history import read_histories
    from pipeline.run.panels import panels_of
    from pipeline.run.terminal import is_score

    histories = read_histories(runs)
    panels = _chosen(charts, histories) if charts else panels_of(histories)
    if not panels:
        raise UserError("There is nothing to draw: the runs have no rows of training yet.")
    write(curves.plot(histories, panels), out)
    scored = any(is_score(chart) for panel in panels for _, chart in panel.lines)
    alone = [run for run in histories if run.candidate == run.name]  # folds of a selection are to differ
    if scored and (apart := references_apart(alone)):
        click.echo(f"note: these runs were {apart}", err=True)


def write(figure: Figure, out: Path) -> None:
    """Write a drawing and say where. Raises UserError."""
    from pipeline.run.curves import save

    try:
        save(figure, out)
    except OSError as error:
        raise UserError(f"{out} could not be written: {error.strerror or error}.") from None
    click.echo(out)


def _chosen(patterns: str, histories: list[History]) -> list[Panel]:
    """A panel for each chart that a pattern matches. Raises UserError for a pattern that matches none."""
    from pipeline.run.panels import Panel

    known = sorted({chart for history in histories for chart in history.charts})
    found: dict[str, Panel] = {}
    for pattern in filter(None, (text.strip() for text in patterns.split(","))):
        charts = [chart for chart in known if fnmatchcase(chart, pattern)]
        if not charts:
            raise UserError(f"--charts: no chart {pattern}. There are: {', '.join(known)}.")
        found |= {chart: Panel(chart, ((chart, chart),)) for chart in charts}
    if not found:
        raise UserError(f"--charts {patterns!r} names no chart. There are: {', '.join(known)}.")
    return list(found.values())
