"""Whether a W&B run is online, and its names and config there: from our config and W&B's variables.

It is online if a key is configured and the server answers, else it is kept in the run folder. WANDB_MODE, if
set, decides; but without a key nothing is online.
"""

from __future__ import annotations

import http.client
import netrc
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError

from pipeline.config import Config, dump
from pipeline.credentials import all_redacted
from pipeline.wording import one_line

if TYPE_CHECKING:
    import wandb

_T = TypeVar("_T")
Mode = Literal["online", "offline", "disabled"]

_ANSWER_S = 4.0  # for the server to answer
_SERVICE_S = 40.0  # for W&B's service to start, which W&B itself gives 30
_stuck = threading.Event()  # in W&B, for good
_PROJECT, _TAG = 128, 64  # characters at most


@dataclass(frozen=True)
class Names:
    """Where a run is at W&B, and its name. entity: None is the account's default."""

    project: str
    entity: str | None
    name: str
    tags: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} in project {f'{self.entity}/' if self.entity else ''}{self.project}"


def names(config: Config, project: str | None = None, entity: str | None = None) -> Names:
    """From the config; else as earlier jobs of the run had them; else from W&B's variables. Fitted to what
    W&B takes, which would refuse the run with others."""
    track, given = config.track, os.environ.get
    tags = dict.fromkeys(t.strip()[:_TAG] for t in track.tags or given("WANDB_TAGS", "").split(","))
    chosen = track.project or project or given("WANDB_PROJECT") or "shardgan"
    return Names(
        project=re.sub(r"[/\\#?%:]", "-", chosen)[:_PROJECT],
        entity=track.entity or entity or given("WANDB_ENTITY") or None,
        name=given("WANDB_NAME") or str(config.run.name),
        tags=tuple(filter(None, tags)),
    )


def choose_mode() -> tuple[Mode, str]:
    """Online or not, and why not, within some `_ANSWER_S` seconds. Requests one page."""
    refused = refusals()
    for name in refused:
        del os.environ[name]
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled", "as configured"
    settings = set_up()
    if refused and settings.mode != "disabled":  # a server could get what is not meant for it
        return "offline", "; ".join(f"W&B refuses {name}: {why}" for name, why in refused.items())
    if settings.mode in ("disabled", "offline", "dryrun"):  # WANDB_MODE, or an earlier `wandb offline`
        return ("disabled" if settings.mode == "disabled" else "offline"), "as configured"
    if not (settings.api_key or settings.identity_token_file or _in_netrc(settings.base_url)):
        return "offline", "no API key is configured (`wandb login`)"
    if not os.environ.get("WANDB_MODE") and not _answers(settings.base_url):
        return "offline", f"{settings.base_url} does not answer"
    return "online", ""


def refusals() -> dict[str, str]:
    """Which of its variables W&B refuses, and why. A mistake in one would end all that is done with W&B.

    Takes blanks and line ends off all of them, which a secret often ends in, and leaves out empty ones: W&B
    takes these for a value.
    """
    import wandb

    refused = dict[str, str]()
    for name, given in [(name, given) for name, given in os.environ.items() if name.startswith("WANDB_")]:
        os.environ[name] = value = given.strip()
        if not value:
            del os.environ[name]
            continue
        try:
            wandb.Settings(resume="allow").update_from_env_vars({name: value})  # "allow" excludes some
        except Exception as error:
            refused[name] = in_a_line(error)
    return refused


def in_a_line(error: Exception) -> str:
    """Of an error of W&B's, without the API key."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, ValidationError):  # of W&B's settings, over several lines
        text = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
    key = os.environ.get("WANDB_API_KEY")
    return one_line(" ".join(text.replace(key, "…").split() if key else text.split()))


def set_up() -> wandb.Settings:
    """W&B's settings. Being silent, it never asks for a key at a terminal, where a training would wait for
    the answer. `wandb.teardown` forgets that."""
    import wandb

    os.environ.pop("WANDB_SERVICE", None)  # of who started this process, and may have ended since
    return bounded(lambda: wandb.setup(wandb.Settings(silent=True, relogin=False)).settings)


def bounded(call: Callable[[], _T]) -> _T:
    """What `call` returns, which starts or ends W&B's service. Raises what it raises, and TimeoutError.

    If the service does not start, wandb 0.31 waits for a lock that it holds, and so do all later calls.
    """
    ended: Future[_T] = Future()

    def work() -> None:
        try:
            ended.set_result(call())
        except BaseException as error:
            ended.set_exception(error)

    if not _stuck.is_set():
        threading.Thread(target=work, name="W&B", daemon=True).start()
        if not wait([ended], _SERVICE_S).not_done:
            return ended.result()
        _stuck.set()
    raise TimeoutError("its service, wandb-core, does not start or end")


def leave_sweep(run_id: str) -> bool:
    """Whether this process is a sweep's trial of another run than `run_id`: then it forgets the trial, whose
    id W&B would take, and not ours."""
    trial = os.environ.get("WANDB_SWEEP_ID")
    if not trial or os.environ.get("WANDB_RUN_ID") == run_id:
        return False
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        os.environ.pop(name, None)
    return True


def public(config: Config) -> dict[str, Any]:
    """The resolved config, without passwords and signatures in URLs."""
    values: dict[str, Any] = all_redacted(yaml.safe_load(dump(config)))
    return values


def _in_netrc(url: str) -> bool:
    """Whether `wandb login` has stored a key for the server at `url`."""
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with suppress(OSError, netrc.NetrcParseError):
            path = os.path.expanduser(path)  # noqa: PTH111, which raises for the home of nobody
            if netrc.netrc(path).authenticators(urlsplit(url).netloc):
                return True
    return False


def _answers(url: str) -> bool:
    """Whether anything answers at `url`, with any status, through the proxy if one is set."""
    answered = threading.Event()

    def ask() -> None:
        with suppress(OSError, ValueError, http.client.HTTPException):
            with suppress(urllib.error.HTTPError):
                urllib.request.urlopen(url, timeout=_ANSWER_S).close()
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # as resolving a name has no time limit
    asking.start()
    asking.join(_ANSWER_S)
    return answered.is_set()
