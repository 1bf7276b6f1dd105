"""How a run ends: its marker and, once it is finished, the exported networks."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import RunError, UserError
from pipeline.parallel.ranks import Ranks
from pipeline.run import events
from pipeline.run.curves import CURVES, draw_run
from pipeline.run.export import export
from pipeline.run.markers import DONE, STOPPED, mark
from pipeline.run.page.document import PAGE, write_beside
from pipeline.run.report import Report
from pipeline.run.spectrum import draw, record
from pipeline.run.state import State
from pipeline.wording import in_kimg, why


def conclude(
    folder: Path, state: State, report: Report, ranks: Ranks, received: str | None, completed: bool
) -> None:
    """received: why this process was asked to stop, if it was."""
    ranks.progress.doing = "exporting"
    reasons = filter(None, ranks.gather_objects(received))
    ranks.broadcast_from_main(
        lambda: (
            _finish(folder, state, report) if completed else _stop(folder, state, report, next(reasons, ""))
        )
    )


def _stop(folder: Path, state: State, report: Report, reason: str) -> None:
    report.still_ours()
    _mark(folder, STOPPED, state)
    events.record(folder, "stop", state.cur_nimg, reason=reason)
    kimg = in_kimg(state.cur_nimg / 1000)
    report.say(f"Stopped at kimg {kimg} {reason}; the same command continues from there.")


def _finish(folder: Path, state: State, report: Report) -> None:
    report.still_ours()
    try:
        export(folder, folder / "export")
    except UserError as error:  # a run that began well
        raise RunError(f"{error} All is trained and saved: the same command then only exports.") from None
    report.summary(record(folder))
    report.picture("Weights/spectra", lambda: draw(folder), state.cur_nimg)
    report.extra(CURVES, lambda: draw_run(folder))
    _mark(folder, DONE, state)
    report.extra(PAGE, lambda: write_beside(folder))
    report.conclude(state.cur_nimg)


def _mark(folder: Path, name: str, state: State) -> None:
    try:
        mark(folder, name, state.cur_nimg)
    except OSError as error:
        raise RunError(f"{folder / name} could not be written: {why(error)}") from None
