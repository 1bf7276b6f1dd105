"""Weights & Biases: charts, pictures and alerts of a run. Whatever fails here, training continues.

metrics.jsonl and samples/ hold everything; W&B is sent what it lacks. A run that a server has some of is
completed there. Until then, each job leaves one file in the run folder for `wandb sync`, and no two hold the
same step, as `wandb sync` would renumber the second.
"""

from __future__ import annotations

import io
import os
import queue
import secrets
import shlex
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.config import Config
from pipeline.credentials import redacted
from pipeline.run.wandb_files import Tracked, find_run, leave_to_the_server, remember
from pipeline.run.wandb_mode import Mode, bounded, choose_mode, in_a_line, leave_sweep, names, public, set_up
from pipeline.run.wandb_offline import is_whole

if TYPE_CHECKING:
    import wandb

Announce = Callable[[str], None]
Resume = Literal["allow", "must", "never"]  # whether W&B may know of the run already
Send = Callable[["wandb.Run"], object]

_INIT_S = 45.0  # for the server to open a run; afterwards the run is kept offline instead
_DELETED_S = 10.0  # for one that lacks the run: of a deleted one, the client asks until time is up
_FINISH_S = 60.0  # for the server to receive the rest at the end; the next start sends what is missing
_TEARDOWN_S = 15.0  # for W&B's processes to end after that
_MOST_PENDING = 20_000  # messages; more means that W&B does not take them
_DELETED = "previously created and deleted"  # in the server's words
_LATER = "Start the same command again to send what is missing."
_X_AXIS = "Progress/kimg"


class Tracker:
    """Where charts and pictures go. This one tracks nothing: where tracking is off or failed.

    No method raises, and but for `pause` and `finish` none waits for W&B.
    """

    tracks = False

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id  # for `open_tracker` when the run is resumed, so that it stays one W&B run
        self.where = ""  # the tracked run, for people, in one line

    def log(self, values: Mapping[str, float], step: int, at: float | None = None) -> None:
        """Points in charts. step: cur_nimg, never falling; ignored if W&B has that step already.
        at: when, in seconds since 1970; None: now."""

    def image(self, key: str, path: Path, step: int, caption: str) -> None:
        """A picture from a file, which may be moved or changed afterwards."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Values for the whole run."""

    def alert(self, title: str, text: str) -> None:
        """A message that W&B mails or posts to whoever subscribed."""

    def pause(self) -> None:
        """Wait, in bounded time, until what was given is taken: between many calls at once."""

    def finish(self, failed: bool = False) -> None:
        """Send what is left, in bounded time. Call it on every way out; later calls do nothing.

        failed: an error ends this process, and W&B is to show that.
        """

    def abandon(self) -> None:
        """Send nothing more: another process trains the run."""


def open_tracker(config: Config, folder: Path, run_id: str | None, announce: Announce) -> Tracker:
    """Open the W&B run of the run in `folder`: a new one, or the earlier one of `run_id`. Never raises.

    Its files go to `folder`/wandb. `announce` gets the few lines worth showing: where the run is, or why
    there is none.

    Steps that W&B has are left out, so callers may send everything again. Those it has from after the
    checkpoint were sent by a job that was killed; training from the checkpoint repeats their values bit for
    bit, clocks and memory apart (in another world: to rounding).
    """
    if not config.track.wandb:
        return Tracker(run_id)
    try:
        mode, reason = choose_mode()
        if mode == "disabled":
            return Tracker(run_id)
        if (other := _active()) is not None:
            announce(
                f"W&B is off: run {other.id} is active in this process, and would take this run's charts. "
                "Finish it first (wandb.finish()) to track this one."
            )
            return Tracker(run_id)
        sys.argv[1:] = map(redacted, sys.argv[1:])  # W&B uploads them
        known, new = find_run(folder, run_id)
    except Exception as error:
        announce(f"W&B is off: {in_a_line(error)}")
        return Tracker(run_id)
    if new and known.replaces:
        announce(f"W&B: {folder} is a copy of another run's folder, and gets a W&B run of its own.")
    run_id = None if new else known.run_id
    trial, wanted = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    for attempt in (mode, "offline") if mode == "online" else (mode,):
        if attempt == "offline" and known.online:
            # Only the server knows which steps it has: an offline file would repeat some or leave a gap.
            announce(f"W&B cannot be reached ({reason}). {_LATER}")
            return Tracker(run_id)
        try:
            run, opened = _open(config, folder, known, attempt, new)
            tracked = _opened(run, folder, opened)
            tracker = WandbTracker(run, tracked, folder, announce)
        except Exception as error:
            reason = in_a_line(error)
            with suppress(Exception):
                _end_service()  # which keeps the run's id in use
            continue
        if tracked.replaces != known.replaces:
            announce(f"W&B: run {known.run_id} was deleted there; a new run gets everything.")
        announce(f"W&B: {tracker.where}{f' ({reason})' if reason else ''}")
        if wanted and wanted not in (tracked.run_id, *tracked.replaces):
            announce(f"W&B: WANDB_RUN_ID={wanted} is another run's; this one is {tracked.run_id}.")
        if trial and "WANDB_SWEEP_ID" not in os.environ:
            announce(f"W&B: run {tracked.run_id} is no part of sweep {trial}.")
        return tracker
    announce(f"W&B is off: {reason}")
    return Tracker(run_id)


class WandbTracker(Tracker):
    """Sends to a W&B run from a thread.

    Announces the first failure and sends nothing after it: W&B then lacks only the end, where the next start
    continues.
    """

    tracks = True

    def __init__(self, run: wandb.Run, tracked: Tracked, folder: Path, announce: Announce) -> None:
        super().__init__(tracked.run_id)
        files = f"{shlex.quote(str(folder / 'wandb'))}/offline-run-*"
        self.where = f"offline; to upload it: wandb sync {files}" if run.offline else str(run.url)
        self._run, self._tracked, self._folder, self._announce = run, tracked, folder, announce
        self._last = tracked.has
        self._open, self._failed, self._status = True, False, 0
        self._pending: queue.Queue[Send | None] = queue.Queue(_MOST_PENDING)
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int, at: float | None = None) -> None:
        if step > self._tracked.has:
            values = dict(values)
            self._last = step
            self._later(lambda run: run.log(values, step=step))

    def image(self, key: str, path: Path, step: int, caption: str) -> None:
        if step > self._tracked.has:
            self._last = step
            try:
                content = path.read_bytes()
            except OSError as error:
                self._fail(error)
                return
            self._later(lambda run: _log_picture(run, key, content, step, caption))

    def summary(self, values: Mapping[str, float]) -> None:
        values = dict(values)
        self._later(lambda run: run.summary.update(values))

    def alert(self, title: str, text: str) -> None:
        self._later(lambda run: run.alert(title[:63], text, level="WARN"))

    def pause(self) -> None:
        taken = threading.Event()
        self._later(lambda _: taken.set())
        if self._open and not self._failed and not taken.wait(_FINISH_S) and not self._failed:
            self._fail(TimeoutError(f"it takes nothing for {_FINISH_S:g} s"))

    def finish(self, failed: bool = False) -> None:
        if not self._open:
            return
        self._open, self._status = False, int(failed)
        with suppress(queue.Full):
            self._pending.put(None, timeout=1)
        self._thread.join(_FINISH_S + _TEARDOWN_S)
        if self._thread.is_alive():
            self._fail(TimeoutError("it does not finish"))
        elif not self._failed and not self._tracked.online:
            # Whether a server has everything is unknown even now, as the client gives up on one after some
            # hours: the next start asks it.
            complete = [*self._tracked.complete, Path(self._run.dir).parent.name]
            remember(self._folder, replace(self._tracked, has=self._last, complete=complete))

    def abandon(self) -> None:
        self._open, self._failed = False, True

    def _later(self, send: Send) -> None:
        if self._open and not self._failed:
            try:
                self._pending.put_nowait(send)
            except queue.Full:
                self._fail(TimeoutError(f"{_MOST_PENDING} messages are waiting"))

    def _work(self) -> None:
        while send := self._pending.get():
            if not self._failed:
                self._try(send)
        self._try(lambda run: _finish(run, self._status))

    def _try(self, send: Send) -> None:
        try:
            send(self._run)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            self._failed, self.where = True, f"incomplete. {_LATER}"
            self._announce(f"W&B has stopped, training continues without it: {in_a_line(error)}. {_LATER}")


def _active() -> wandb.Run | None:
    """The run of a script that calls `shardgan.train`, as ours are not wandb.run. To end ours may end W&B's
    service, and that one's with it."""
    module = sys.modules.get("wandb")
    run: wandb.Run | None = getattr(module, "run", None)
    return run


def _open(config: Config, folder: Path, known: Tracked, mode: Mode, new: bool) -> tuple[wandb.Run, Tracked]:
    """The run, and what is known of it: under another id if W&B deleted the run, or has another of its id.

    new: if W&B has a run of its id, that is another one.
    """
    from wandb.errors import UsageError

    try:
        return _of_this_id(config, folder, known, mode, new), known
    except Exception as error:
        deleted = _DELETED in str(error)
        if not deleted and not (new and isinstance(error, UsageError)):
            raise
    with suppress(Exception):
        _end_service()  # which keeps the id in use
    replaces = [*known.replaces, known.run_id] if deleted else known.replaces
    known = replace(known, run_id=secrets.token_hex(4), has=-1, complete=[], replaces=replaces)
    return _init(config, folder, known, mode, "never"), known


def _of_this_id(config: Config, folder: Path, known: Tracked, mode: Mode, new: bool) -> wandb.Run:
    """The run that this id names. "must" is answered at once, where "allow" alone would ask about a deleted
    run for `_INIT_S`."""
    from wandb.errors import UsageError

    if not known.online:
        return _init(config, folder, known, mode, "never" if new else "allow")
    try:
        return _init(config, folder, known, mode, "must")
    except UsageError:  # the server does not have it (any more)
        with suppress(Exception):
            _end_service()
        return _init(config, folder, known, mode, "allow", _DELETED_S)


def _opened(run: wandb.Run, folder: Path, known: Tracked) -> Tracked:
    """What is known of the run that was just opened, remembered."""
    if run.id != known.run_id:  # as W&B's own launcher decides
        known = replace(known, run_id=run.id, has=-1, complete=[])
    tracked = replace(known, project=run.project, entity=run.entity or None)
    if not run.offline:
        leave_to_the_server(folder, known.run_id)
        tracked = replace(tracked, online=True, has=run.starting_step - 1)
    remember(folder, tracked)
    return tracked


def _log_picture(run: wandb.Run, key: str, content: bytes, step: int, caption: str) -> None:
    import wandb
    from PIL import Image

    picture = wandb.Image(Image.open(io.BytesIO(content)), caption=caption)
    run.log({key: picture, _X_AXIS: step / 1000}, step=step)


def _init(
    config: Config, folder: Path, known: Tracked, mode: Mode, resume: Resume, patience: float | None = None
) -> wandb.Run:
    import wandb

    if leave_sweep(known.run_id):
        with suppress(Exception):
            _end_service()  # which has read the variables
    set_up()
    run = wandb.init(
        **vars(names(config, known.project, known.entity)),
        dir=folder.absolute(),
        group=config.track.group,
        id=known.run_id,
        resume=resume,
        config=public(config),
        mode=mode,
        save_code=False,
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=patience or _INIT_S,
            finish_timeout=_FINISH_S,
            finish_timeout_raises=True,
            reinit="create_new",  # one whose opening failed stays active, in an interpreter
        ),
    )
    run.define_metric(_X_AXIS)
    run.define_metric("*", step_metric=_X_AXIS)
    return run


def _finish(run: wandb.Run, status: int) -> None:
    run.finish(exit_code=status)
    if run.offline:  # finish() returns before the file is written; the service ends afterwards
        _end_service()
        file = Path(run.dir).parent / f"run-{run.id}.wandb"
        if not is_whole(file):
            raise OSError(f"{file} could not be written whole (was the disk full?)")


def _end_service() -> None:
    import wandb

    try:
        bounded(wandb.teardown)
    except SystemExit as error:  # would end the training
        raise ChildProcessError(f"its service ended with status {error.code}") from None
