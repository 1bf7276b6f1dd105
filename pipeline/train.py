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
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

from pipeline import config, console, loop
from pipeline.config import Config, UserError
from pipeline.console import end_process
from pipeline.credentials import redacted
from pipeline.data.cache import Cache, reserve
from pipeline.data.check import remarks
from pipeline.data.index import Index, load_index
from pipeline.data.plan import HeldOutPlan, Plan, split_of
from pipeline.data.stream import TrainingBatches, check_images, label_frequencies, training_batches
from pipeline.errors import CommonError
from pipeline.folders import provide_home
from pipeline.gan.networks import check_networks
from pipeline.lock import Lock
from pipeline.parallel.batch import BatchShape, batch_shape
from pipeline.parallel.batch_norm import has_batch_norm
from pipeline.parallel.launched import Launch, read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.watch.watch import BACKSTOP, JobEndedError, Watch
from pipeline.players import Gan, build
from pipeline.run import checkpoint
from pipeline.run.export import export
from pipeline.run.folder import DONE, STOPPED, claim_folder, finished, open_folder
from pipeline.run.heap import keep_freed_memory
from pipeline.run.report import MainReport, Report, say
from pipeline.run.resend import catch_up
from pipeline.run.resume import resume
from pipeline.run.session import Session
from pipeline.run.spectrum import draw, record
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.run.stop import INTERRUPTED, StopSignals
from pipeline.run.tracker import open_tracker
from pipeline.wording import counted

_PATIENCE_S = 60.0  # for the main rank to be the one that tells


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the process handles signals afterwards as it did before.

    Returns the exit status: 0 finished or cleanly stopped (the run folder's DONE tells which), 130 stopped by
    Ctrl-C (of several processes: 0, or their launcher would report a failure), 2 bad input, 1 another failure
    that has been told.
    """
    with closing(StopSignals()) as signals:
        return _main(arguments, signals)


def _main(arguments: Sequence[str] | None, signals: StopSignals) -> int:
    rank = int(text) if (text := os.environ.get("RANK", "")).isdecimal() else 0
    provide_home()
    try:
        launch = read_launch()
        path, *overrides = sys.argv[1:] if arguments is None else arguments or [""]
        settings = config.load(path, overrides)
        sys.argv[1:] = map(redacted, sys.argv[1:])  # which W&B for one notes and uploads
        batch = batch_shape(settings.data, launch.world)
        signals.configure(settings.run.stop_signal, settings.run.grace)
    except (UserError, ValueError) as error:
        if (
            rank
        ):  # the main rank says the same, and the launcher ends this one; it must not be the first to go
            time.sleep(_PATIENCE_S)
        return _refuse(error, tell=True)
    try:
        with Watch(launch, settings.run.timeout_s) as watch, ExitStack() as held:
            completed = _train(settings, launch, batch, watch, signals, held)
    except JobEndedError:
        return 1
    except CommonError as error:
        _refuse(error, tell=rank == 0)
        return error.status
    except UserError as error:
        _refuse(UserError(f"rank {rank}: {error}") if launch.world > 1 else error, tell=True)
        return getattr(error, "status", 2)
    return INTERRUPTED if signals.interrupted and not completed and launch.strategy == "single" else 0


def prepare_data(settings: Config, announce: bool) -> Index:
    """The index of the training data, checked against the config. Raises UserError."""
    assert settings.data.train is not None
    index = load_index(settings.data.train, say if announce else lambda _: None, settings.data.remote)
    check_networks(settings, index.num_classes if settings.data.conditional else 0)
    check_images(index, settings.data)
    return index


def _train(
    settings: Config, launch: Launch, batch: BatchShape, watch: Watch, signals: StopSignals, held: ExitStack
) -> bool:
    """Whether the run is finished, rather than stopped. held: closed when this process is done with it."""
    ranks = _join(launch, watch, signals)
    ranks.progress.doing = "reading the index of the data"
    with ranks.raise_together():  # the main rank first: it may have to build what the others then read
        if ranks.main:
            prepare_data(settings, announce=True)
    with ranks.raise_together():
        index = prepare_data(settings, announce=False)
    if len(set(ranks.gather_objects(index.fingerprint))) > 1:
        raise CommonError(
            f"{index.where} is not the same data on all machines of this run: their indices differ."
        )
    settings, folder, still_ours = _claim(settings, ranks, signals, held)
    watch.last_words = lambda: checkpoint.describe_newest(folder / "checkpoints")
    if finished(folder, settings):
        ranks.broadcast_from_main(lambda: catch_up(settings, folder, say))
        ranks.broadcast_from_main(
            lambda: say(f"{folder} is finished. Nothing to do; raise run.total_kimg to go on.")
        )
        return True
    split = split_of(settings, index)
    plan, heldout = split.training(), split.heldout()
    state = State(plan=plan.fingerprint, data=index.fingerprint)
    if settings.data.conditional:
        state.label_frequencies = label_frequencies(index, plan).tolist()
    gan = build(settings, ranks, batch, state.label_frequencies)
    stats = Stats(ranks.device, reports=batch.world * batch.rounds)
    state = resume(folder, gan, state, stats, ranks, settings.run.new_data)
    ranks.broadcast_from_main(lambda: open_folder(settings, folder, still_ours))
    ranks.progress.cur_nimg = state.cur_nimg
    report = _open_report(settings, folder, state, ranks, still_ours)
    try:
        report.say(_introduce(settings, index, plan, heldout, gan, ranks, batch))
        cache = _open_cache(settings, index, ranks, report)
        session = Session(settings, folder, index, heldout, plan.size, ranks, report, signals, state)
        reals = _open_reals(settings, index, plan, state, ranks, cache)
        with closing(reals):
            completed = loop.train(gan, reals, state, stats, settings.run, session)
        asked = None if completed else next(filter(None, ranks.gather_objects(signals.received)), "")
        ranks.progress.doing = "exporting"
        ranks.broadcast_from_main(lambda: _conclude(folder, state, report, asked))
    finally:
        report.close()
        signals.done()
    ranks.leave()
    return completed


def _join(launch: Launch, watch: Watch, signals: StopSignals) -> Ranks:
    with signals.joining() if launch.world > 1 else nullcontext():
        ranks = Ranks(launch, BACKSTOP, watch.progress)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    return ranks


def _claim(
    settings: Config, ranks: Ranks, signals: StopSignals, held: ExitStack
) -> tuple[Config, Path, Callable[[], None]]:
    """Hold this run's folder until `held` is closed; config, folder, and a check that it is still held."""
    locks: list[Lock] = []

    def claim() -> tuple[Config, Path]:
        config, folder, lock = claim_folder(settings, say, lambda: signals.received is not None)
        if lock is not None:
            locks.append(held.enter_context(lock))
        return config, folder

    config, folder = ranks.broadcast_from_main(claim)
    return config, folder, locks[0].check if locks else lambda: None


def _open_cache(settings: Config, index: Index, ranks: Ranks, report: Report) -> Cache | None:
    """Memory for decoded images, which the ranks of a machine share; None if not asked for, or too small."""
    data = settings.data
    if data.cache == "none":
        return None
    path, line = ranks.broadcast_on_machine(lambda: reserve(index.sizes, data.size, data.channels))
    for text in dict.fromkeys(ranks.gather_objects(line)):
        report.say(f"  {text}")
    with ranks.raise_together():
        return None if path is None else Cache(path, index.sizes, data.size, data.channels)


def _open_reals(
    settings: Config, index: Index, plan: Plan, state: State, ranks: Ranks, cache: Cache | None
) -> TrainingBatches:
    """This rank's part of every global batch from where the run stands, on and on."""
    return training_batches(
        index,
        plan,
        settings.data,
        start=state.cur_nimg,
        rank=ranks.rank,
        world=ranks.world,
        bad=state.bad,
        cache=cache,
    )


def _open_report(
    settings: Config, folder: Path, state: State, ranks: Ranks, still_ours: Callable[[], None]
) -> Report:
    """Where the run reports to; on all ranks but the main one, nowhere. Notes the tracker's run id."""
    ranks.progress.doing = "starting its reports"
    if not ranks.main:
        state.wandb_id = ranks.broadcast_from_main(lambda: state.wandb_id)
        return Report()
    tracker = open_tracker(settings, folder, state.wandb_id, say)
    state.wandb_id = ranks.broadcast_from_main(lambda: tracker.run_id)
    total = round(settings.run.total_kimg * 1000)
    return MainReport(folder, tracker, total, state.cur_nimg, state.reported, still_ours)


def _introduce(
    settings: Config,
    index: Index,
    plan: Plan,
    heldout: HeldOutPlan,
    gan: Gan,
    ranks: Ranks,
    batch: BatchShape,
) -> str:
    """What is about to happen, in a few lines."""
    size = {e.player.name: sum(f.shape.numel() for f in e.fragments) / 1e6 for e in (gan.G, gan.D)}
    penalty = settings.penalty
    lines = [
        f"{settings.run.name}: {counted(plan.size, 'training image')} in "
        f"{counted(len(index.shards), 'shard')}, {heldout.size:,} held out; "
        f"{settings.data.channels}x{settings.data.size}x{settings.data.size}",
        f"  G {size['G']:.2f} M and D {size['D']:.2f} M parameters; "
        f"λ_G‖W‖² {penalty.G.l2:g}, λ_D‖W‖² {penalty.D.l2:g} on {penalty.on}",
        f"  {ranks.strategy} on {ranks.world} x {ranks.device.type}, precision {ranks.precision}; "
        f"a batch of {batch}",
        *(f"  {line}" for line in remarks(index, settings.data)),
    ]
    if index.remote:
        lines.append(f"  {index.remote}")
    if has_batch_norm(gan.G.module) or has_batch_norm(gan.D.module):
        lines.append(
            "  note: BatchNorm sees one rank's images of a round, so results depend (a little) on the number "
            "of ranks and rounds"
        )
    return "\n".join(lines)


def _leave(folder: Path, name: str, cur_nimg: int) -> None:
    """A marker that says how the run ended."""
    try:
        (folder / name).write_text(f"{cur_nimg}\n")
    except OSError as error:
        raise UserError(f"{folder / name} could not be written: {error}") from None


def _conclude(folder: Path, state: State, report: Report, asked: str | None) -> None:
    """Leave the marker that says how the run ended, and the exported networks if it is done.

    asked: why it was stopped; None: it is done.
    """
    report.still_ours()
    if asked is not None:
        _leave(folder, STOPPED, state.cur_nimg)
        kimg = f"{state.cur_nimg / 1000:g}"
        report.say(f"Stopped at kimg {kimg} {asked}; the same command continues from there.")
        return
    export(folder, folder / "export")
    report.summary(record(folder))
    report.picture("Weights/spectra", lambda: draw(folder), state.cur_nimg)
    _leave(folder, DONE, state.cur_nimg)
    report.conclude(state.cur_nimg)


def _refuse(error: Exception, tell: bool) -> int:
    if tell:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    console.take()
    end_process(_main(None, StopSignals()))  # which listens to the last
