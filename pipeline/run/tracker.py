"""Weights & Biases, the only file that knows of it. Tracking may fail in any way: training goes on.

metrics.jsonl and samples/ are what a run has written; W&B is told of it, and told again of what it lacks.
A run that has been online is completed there and nowhere else; one that never was is kept in the run folder
for `wandb sync`, which must meet each step once: it renumbers a second row of a step.
"""

from __future__ import annotations

import io
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import yaml

from pipeline.config import Config, dump
from pipeline.credentials import redacted
from pipeline.run.wandb_files import Tracked, last_step, leave_to_the_server, mend, recall, remember
from pipeline.run.wandb_mode import Mode, choose_mode, names

if TYPE_CHECKING:
    import wandb

Announce = Callable[[str], None]
Resume = Literal["allow", "never"]  # whether W&B may know of the run already
Send = Callable[["wandb.Run"], object]

_INIT_S = 45.0  # how long the server may take to take up a run, before it is kept offline instead
_FINISH_S = 60.0  # … and to receive the rest at the end; what is missing then stays on disk for `wandb sync`
_TEARDOWN_S = 15.0  # … and then to end its processes
_MOST_PENDING = 20_000  # messages; more means that W&B does not move
_LATER = "What it lacks is sent when the same command is started again."
_X_AXIS = "Progress/kimg"


class Tracker(Protocol):
    """Where charts and pictures go. No method raises, waits for W&B, or is needed for training."""

    @property
    def run_id(self) -> str | None:
        """What to hand to `open_tracker` when the run is resumed, so that it stays one run."""

    @property
    def where(self) -> str:
        """Where a person finds the tracked run, in one line; empty if it is not tracked."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Points in charts. step: cur_nimg, never falling. Nothing, if W&B has that step from before."""

    def image(self, key: str, path: Path, step: int, caption: str) -> None:
        """A picture from a file; the file may be moved or changed afterwards."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Figures that stand for the whole run."""

    def alert(self, title: str, text: str) -> None:
        """A message that W&B passes on to whoever has asked for it, by mail or chat."""

    def finish(self) -> None:
        """Hand over what is left, in bounded time: to be called on every way out. Later calls do nothing."""

    def abandon(self) -> None:
        """Hand over nothing more: another process goes on with the run."""


class NullTracker:
    """Tracks nothing: on other ranks than the main one, and where tracking is off or broken."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id
        self.where = ""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, key: str, path: Path, step: int, caption: str) -> None: ...

    def summary(self, values: Mapping[str, float]) -> None: ...

    def alert(self, title: str, text: str) -> None: ...

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


def open_tracker(config: Config, folder: Path, main: bool, run_id: str | None, announce: Announce) -> Tracker:
    """Begin or, given the run_id of before, go on with the W&B run of the run in `folder`.

    Its files go to `folder`/wandb. `announce` gets the few lines worth showing: where the run is, or why
    there is none. Never raises.

    Steps that W&B has already are left out, so that everything may be told again: what it has of them was
    logged by a job that was killed after its last checkpoint, or before; training again from there gives the
    same values bit for bit, clocks and memory apart (in another world, to rounding).
    """
    if not (main and config.track.wandb):
        return NullTracker(run_id)
    try:
        mode, reason = choose_mode()
    except Exception as error:
        announce(f"W&B is off: {_told(error)}")
        return NullTracker(run_id)
    if mode == "disabled":
        return NullTracker(run_id)
    sys.argv[1:] = map(redacted, sys.argv[1:])  # W&B uploads them
    known = recall(folder)
    run_id = run_id or (known.run_id if known else None)
    if known is None or known.run_id != run_id:
        known = Tracked(run_id or _new_id(folder), online=False, has=-1)
    for attempt in (mode, "offline") if mode == "online" else (mode,):
        if attempt == "offline" and known.online:
            # What the server has got of what was sent is not known here. A file beside it would hold a step
            # twice or leave a gap, either for good.
            announce(f"W&B cannot be reached ({reason}). {_LATER}")
            return NullTracker(run_id)
        try:
            run, known = _open(config, folder, known, attempt, new=run_id is None)
            tracked = _now(run, folder, known)
        except Exception as error:
            reason = _told(error)
            with suppress(Exception):
                _end_service()  # which holds on to the run's id
            continue
        where, because = _where(run, folder), f" ({reason})" if reason else ""
        announce(f"W&B: {where}{because}")
        wanted = os.environ.get("WANDB_RUN_ID", known.run_id)
        if wanted != known.run_id:
            announce(f"W&B: WANDB_RUN_ID={wanted} is another run's; this one is {known.run_id}.")
        return WandbTracker(run, tracked, where, folder, announce)
    announce(f"W&B is off: {reason}")
    return NullTracker(run_id)


def is_behind(folder: Path, step: int) -> bool:
    """Whether W&B may not have everything up to `step`, as far as can be told without asking the server."""
    known = recall(folder)
    if known is None:
        return True
    return known.has < step and (known.online or last_step(folder, known.run_id) < step)


class WandbTracker:
    """A W&B run, spoken to by a thread of its own. The first failure is announced, and then it is silent.

    After a failure nothing more is handed over, so that what W&B lacks is always the end, never a gap, and
    the next start knows where to go on.
    """

    def __init__(
        self, run: wandb.Run, tracked: Tracked, where: str, folder: Path, announce: Announce
    ) -> None:
        self.where = where
        self.run_id: str | None = tracked.run_id
        self._run, self._tracked, self._folder, self._announce = run, tracked, folder, announce
        self._last = tracked.has
        self._open = self._sound = True
        self._pending: queue.Queue[Send | None] = queue.Queue(_MOST_PENDING)
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
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

    def finish(self) -> None:
        if not self._open:
            return
        self._open = False
        with suppress(queue.Full):
            self._pending.put(None, timeout=1)
        self._thread.join(_FINISH_S + _TEARDOWN_S)
        if self._thread.is_alive():
            self._fail(TimeoutError("it does not come to an end"))
        elif self._sound and not self._tracked.online:
            # Of a server it is not even now sure, as the client gives up after some hours without it: the
            # next start of the same command asks it.
            remember(self._folder, replace(self._tracked, has=self._last))

    def abandon(self) -> None:
        self._open = self._sound = False

    def _later(self, send: Send) -> None:
        if self._open and self._sound:
            try:
                self._pending.put_nowait(send)
            except queue.Full:
                self._fail(TimeoutError(f"{_MOST_PENDING} messages wait to be taken"))

    def _work(self) -> None:
        while send := self._pending.get():
            if self._sound:
                self._try(send)
        self._try(_finish)

    def _try(self, send: Send) -> None:
        try:
            send(self._run)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._sound:
            self._sound = False
            self._announce(f"W&B has stopped, training goes on without it: {_told(error)}. {_LATER}")


def _new_id(folder: Path) -> str:
    """The id of a run of which nothing is known yet: that of WANDB_RUN_ID, unless a run beside it has it."""
    wanted = os.environ.get("WANDB_RUN_ID")
    others = (recall(file.parents[1]) for file in folder.parent.glob("*/wandb/run.json"))
    if wanted and not any(other and other.run_id == wanted for other in others):
        return wanted
    return secrets.token_hex(4)


def _open(config: Config, folder: Path, known: Tracked, mode: Mode, new: bool) -> tuple[wandb.Run, Tracked]:
    """The run, and what is known of it. new: W&B must not know of its id yet, or it is another run's."""
    from wandb.errors import UsageError

    if not new:
        return _init(config, folder, known, mode, "allow"), known
    try:
        return _init(config, folder, known, mode, "never"), known
    except UsageError:
        with suppress(Exception):
            _end_service()  # which holds on to the other run's id
        known = replace(known, run_id=secrets.token_hex(4))
        return _init(config, folder, known, mode, "never"), known


def _now(run: wandb.Run, folder: Path, known: Tracked) -> Tracked:
    """What W&B has of the run that was just opened, noted down."""
    if run.offline:
        mend(folder, known.run_id, Path(run.dir).parent / f"run-{known.run_id}.wandb")
        tracked = replace(known, has=max(known.has, last_step(folder, known.run_id)))
    else:
        leave_to_the_server(folder, known.run_id)
        tracked = replace(known, online=True, has=run.starting_step - 1)
    tracked = replace(tracked, project=run.project, entity=run.entity or None)
    remember(folder, tracked)
    return tracked


def _log_picture(run: wandb.Run, key: str, content: bytes, step: int, caption: str) -> None:
    import wandb
    from PIL import Image

    picture = wandb.Image(Image.open(io.BytesIO(content)), caption=caption)
    run.log({key: picture, _X_AXIS: step / 1000}, step=step)


def _init(config: Config, folder: Path, known: Tracked, mode: Mode, resume: Resume) -> wandb.Run:
    import wandb

    called = names(config, known.project, known.entity)
    run = wandb.init(
        dir=folder.absolute(),
        project=called.project,
        entity=called.entity,
        group=config.track.group,
        tags=called.tags,
        name=called.name,
        id=known.run_id,
        resume=resume,
        config=_public(config),
        mode=mode,
        save_code=False,
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=_INIT_S,
            finish_timeout=_FINISH_S,
            finish_timeout_raises=True,
        ),
    )
    run.define_metric(_X_AXIS)
    run.define_metric("*", step_metric=_X_AXIS)
    return run


def _finish(run: wandb.Run) -> None:
    run.finish()
    if run.offline:  # finish() returns before the file is written; the end of the service is waited for
        _end_service()


def _end_service() -> None:
    import wandb

    try:
        wandb.teardown()
    except SystemExit as error:  # its way of saying so, which would end the training
        raise ChildProcessError(f"its service has ended with status {error.code}") from None


def _where(run: wandb.Run, folder: Path) -> str:
    return f"offline; to upload it: wandb sync {folder}/wandb/offline-run-*" if run.offline else str(run.url)


def _public(config: Config) -> dict[str, Any]:
    """The resolved config, without what a URL may hold of passwords and signatures."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [clean(entry) for entry in value]
        return redacted(value) if isinstance(value, str) else value

    values: dict[str, Any] = clean(yaml.safe_load(dump(config)))
    return values


def _told(error: Exception) -> str:
    """The error in one line, without the key, should it quote it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "…") if key else text
