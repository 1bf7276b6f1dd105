"""Train a GAN, as one of the processes that `accelerate launch` started:

    accelerate launch --config_file launch/accelerate/ddp.yaml -m pipeline.train CONFIG [key=value …]

A table of contents: load the config, meet the other ranks, build the parts, run the loop.
"""

from __future__ import annotations

try:
    from pipeline import STOP_SIGNALS  # noqa: F401
except ImportError:  # a folder `pipeline` where this was started is found first
    from pipeline.api.shadows import refuse_namespace

    refuse_namespace()
    raise

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from pipeline import console, garbage, loop
from pipeline.borrowed import borrowed
from pipeline.config import Config, load
from pipeline.errors import CommonError, StoppedError, UserError
from pipeline.folders import provide_home
from pipeline.gan.compatible import check_objective
from pipeline.parallel.batch import BatchShape, batch_shape
from pipeline.parallel.launched import Launch, Precision, read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.watch.watch import BACKSTOP, JobEndedError, Watch
from pipeline.players import as_built, build
from pipeline.run.folder import hold_folder, open_folder
from pipeline.run.introduction import introduction
from pipeline.run.reals import agreed_data, open_reals
from pipeline.run.report import keep_error, open_report
from pipeline.run.resume import find_start, first_state, is_finished, resume, where_to_resume
from pipeline.run.session import Session
from pipeline.run.stop import INTERRUPTED, StopSignals

_PATIENCE_S = 60.0  # for the main rank to show the error


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the process handles signals afterwards as it did before.

    Returns the exit status: 0 finished or cleanly stopped (DONE in the run folder tells which), 130 stopped
    by Ctrl-C (0 if there are several processes, or their launcher would report a failure), 2 bad input,
    1 another failure, whose reason has been shown.
    """
    with closing(StopSignals()) as signals:
        return _main(arguments, signals)


def in_this_process(path: str, overrides: Sequence[str] = (), precision: Precision = "no") -> Path:
    """Train as `main` does, for a caller whose process this is; returns the run folder.

    Raises UserError (RunError among them) instead of showing it, and again the signal that stopped the run.
    """
    with closing(StopSignals(borrowed=True)) as signals, borrowed():
        os.environ |= {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_DYNAMO_BACKEND": "no"}
        provide_home()
        completed, folder = _run(*_read(path, overrides, signals), signals)
    if not completed:
        signals.raise_again()
    return folder


def _main(arguments: Sequence[str] | None, signals: StopSignals) -> int:
    rank = int(text) if (text := os.environ.get("RANK", "")).isdecimal() else 0
    provide_home()
    path, *overrides = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        config, launch, batch = _read(path, overrides, signals)
    except ValueError as error:
        if rank:  # the main rank shows the same, and its launcher ends this one: do not end first
            with signals.joining():
                time.sleep(_PATIENCE_S)
        return _refuse(error)
    try:
        completed, _ = _run(config, launch, batch, signals)
    except JobEndedError:
        return 1
    except StoppedError as error:
        _refuse(error, show=rank == 0)
        completed = False
    except CommonError as error:
        return _refuse(error, error.status, show=rank == 0)
    except UserError as error:
        return _refuse(UserError(f"rank {rank}: {error}") if launch.world > 1 else error, error.status)
    return INTERRUPTED if signals.interrupted and not completed and launch.strategy == "single" else 0


def _read(path: str, overrides: Sequence[str], signals: StopSignals) -> tuple[Config, Launch, BatchShape]:
    launch, config = read_launch(), load(path, overrides)
    batch = batch_shape(config.data, launch.world)
    check_objective(config, batch.images, launch.precision)
    launch.check(batch.rounds)
    signals.configure(config.run.stop_signal, config.run.grace)
    return config, launch, batch


def _run(config: Config, launch: Launch, batch: BatchShape, signals: StopSignals) -> tuple[bool, Path]:
    """Whether the run is finished, rather than stopped, and its folder, held until its end is recorded."""
    with ExitStack() as held, Watch(launch, config.run.timeout_s) as watch, batch.explaining_shortage():
        return _train(config, launch, batch, watch, signals, held)


def _train(
    config: Config, launch: Launch, batch: BatchShape, watch: Watch, signals: StopSignals, held: ExitStack
) -> tuple[bool, Path]:
    """See `_run`. held: closed when this process is done with it."""
    with signals.joining(alone=launch.world == 1):
        ranks = Ranks(launch, BACKSTOP, watch.progress)
    index, split = agreed_data(config, ranks)
    config, folder, still_ours = hold_folder(config, ranks, signals, held)
    watch.last_words = lambda: where_to_resume(folder)
    watch.record = lambda text: keep_error(folder, watch.progress.cur_nimg, text, still_ours)
    if is_finished(config, folder, ranks):
        return True, folder
    held.callback(signals.done)
    state = ranks.broadcast_from_main(lambda: first_state(config, index, split))
    start = find_start(config, folder, state, ranks)
    gan = build(config, ranks, batch, state.label_frequencies, start.fill)
    config = as_built(config, gan)
    state, stats = resume(start, folder, gan, state)
    ranks.broadcast_from_main(lambda: open_folder(config, folder, state.cur_nimg, still_ours))
    with closing(open_report(config, folder, state, ranks, still_ours)) as report, report.kept(launch.world):
        report.say(introduction(config, index, split, gan, ranks))
        session = Session(config, folder, index, split, ranks, report, signals, state)
        with closing(open_reals(config, index, split, state, ranks, batch, report)) as reals:
            completed = loop.train(gan, reals, state, stats, config.run, session)
        session.conclude(state, completed)
    ranks.leave()
    return completed, folder


def _refuse(error: Exception, status: int = 2, show: bool = True) -> int:
    if show:
        console.show_error(error)
    return status


if __name__ == "__main__":
    garbage.imported()
    console.take()
    console.end_process(_main(None, StopSignals()))  # it listens for signals to the end
