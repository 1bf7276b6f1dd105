"""Weights & Biases, the only file that knows of it. Tracking may fail in any way: training goes on.

Whether a run is uploaded at once is found out: with a key configured and the server answering it is online,
otherwise it is kept in the run folder for `wandb sync`. WANDB_MODE decides if it is set.
"""

from __future__ import annotations

import http.client
import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

import yaml

from pipeline.config import Config, dump
from pipeline.credentials import redacted

if TYPE_CHECKING:
    import wandb

Announce = Callable[[str], None]
Mode = Literal["online", "offline", "disabled"]

_ANSWER_S = 4.0  # how long the server may take to show that it is there
_INIT_S = 45.0  # … and to take up a run, before it is kept offline instead
_FINISH_S = 60.0  # … and to receive the rest at the end; what is missing then stays on disk for `wandb sync`
_X_AXIS = "Progress/kimg"


class Tracker(Protocol):
    """Where charts and pictures go. No method raises, waits for the network, or is needed for training."""

    @property
    def run_id(self) -> str | None:
        """What to hand to `open_tracker` when the run is resumed, so that it stays one run."""

    @property
    def where(self) -> str:
        """Where a person finds the tracked run, in one line; empty if it is not tracked."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Points in charts. step: cur_nimg, never falling."""

    def image(self, key: str, path: Path, step: int, caption: str) -> None:
        """A picture from a file; the file may be moved or changed afterwards."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Figures that stand for the whole run."""

    def finish(self) -> None:
        """Write out what is buffered: to be called on every way out. Further calls do nothing."""


class NullTracker:
    """Tracks nothing: on other ranks than the main one, and where tracking is off or broken."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id
        self.where = ""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, key: str, path: Path, step: int, caption: str) -> None: ...

    def summary(self, values: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


def open_tracker(config: Config, folder: Path, main: bool, run_id: str | None, announce: Announce) -> Tracker:
    """Begin or, given the run_id of before, go on with the W&B run of the run in `folder`.

    Its files go to `folder`/wandb. `announce` gets the few lines worth showing: where the run is, or why
    there is none. Never raises.
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
    for attempt in (mode, "offline") if mode == "online" else (mode,):
        try:
            run = _init(config, folder, run_id, attempt)
        except Exception as error:
            reason = _told(error)
            continue
        where, because = _where(run, folder), f" ({reason})" if reason else ""
        announce(f"W&B: {where}{because}")
        return WandbTracker(run, where, announce)
    announce(f"W&B is off: {reason}")
    return NullTracker(run_id)


class WandbTracker:
    """A W&B run. The first thing that goes wrong is announced, and then it is silent."""

    def __init__(self, run: wandb.Run, where: str, announce: Announce) -> None:
        self.where = where
        self.run_id: str | None = run.id
        self._run: wandb.Run | None = run
        self._announce = announce

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda run: run.log(dict(values), step=step))

    def image(self, key: str, path: Path, step: int, caption: str) -> None:
        def send(run: wandb.Run) -> None:
            import wandb

            picture = wandb.Image(str(path), caption=caption)
            run.log({key: picture, _X_AXIS: step / 1000}, step=step)

        self._try(send)

    def summary(self, values: Mapping[str, float]) -> None:
        self._try(lambda run: run.summary.update(dict(values)))

    def finish(self) -> None:
        self._try(_finish)
        self._run = None

    def _try(self, send: Callable[[wandb.Run], object]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:
            self._run = None
            self._announce(f"W&B has stopped, training goes on without it: {_told(error)}")


def _init(config: Config, folder: Path, run_id: str | None, mode: Mode) -> wandb.Run:
    import wandb

    track = config.track
    run = wandb.init(
        dir=folder,
        project=track.project,
        entity=track.entity,
        group=track.group,
        tags=track.tags,
        name=config.run.name,
        id=run_id,
        resume="allow",
        config=_public(config),
        mode=mode,
        save_code=False,
        settings=wandb.Settings(console="off", silent=True, init_timeout=_INIT_S, finish_timeout=_FINISH_S),
    )
    run.define_metric(_X_AXIS)
    run.define_metric("*", step_metric=_X_AXIS)
    return run


def _finish(run: wandb.Run) -> None:
    import wandb

    run.finish()
    if run.offline:  # finish() returns before the file is written; teardown waits for the service that writes
        wandb.teardown()


def choose_mode() -> tuple[Mode, str]:
    """Online or not, and why not, in at most `_ANSWER_S` seconds. Sends nothing but a request for a page."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("disabled", "offline", "dryrun"):  # WANDB_MODE, or `wandb offline` at some time
        return ("disabled" if settings.mode == "disabled" else "offline"), "as configured"
    if os.environ.get("WANDB_MODE"):
        return "online", ""
    if not (settings.api_key or settings.identity_token_file or _in_netrc(settings.base_url)):
        return "offline", "no API key is configured (`wandb login`)"
    if not _answers(settings.base_url):
        return "offline", f"{settings.base_url} does not answer"
    return "online", ""


def _in_netrc(url: str) -> bool:
    """Whether `wandb login` has left a key for the server at `url`."""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(Path(path).expanduser()).authenticators(urlsplit(url).netloc):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _answers(url: str) -> bool:
    """Whether anything answers at `url`, through whichever proxy is set, whatever it says."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=_ANSWER_S).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError, http.client.HTTPException):
            return
        answers.append(True)

    # In a thread, because looking up a name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_S)
    return bool(answers)


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
