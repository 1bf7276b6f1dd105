"""Whether a W&B run can be uploaded at once, and under which names: from the config and W&B's variables.

With a key configured and the server answering it is online. Otherwise it is kept in the run folder.
WANDB_MODE decides if it is set.
"""

from __future__ import annotations

import http.client
import netrc
import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pipeline.config import Config

Mode = Literal["online", "offline", "disabled"]

_ANSWER_S = 4.0  # how long the server may take to show that it is there


@dataclass(frozen=True)
class Names:
    """Where a run stands at W&B, and under what name. None: as the account has it."""

    project: str
    entity: str | None
    name: str
    tags: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} in project {f'{self.entity}/' if self.entity else ''}{self.project}"


def names(config: Config, project: str | None = None, entity: str | None = None) -> Names:
    """What the config says; or else what is known of the run from before; or else W&B's variables."""
    track, given = config.track, os.environ.get
    tags = track.tags or tuple(tag.strip() for tag in given("WANDB_TAGS", "").split(",") if tag.strip())
    return Names(
        project=track.project or project or given("WANDB_PROJECT") or "shardgan",
        entity=track.entity or entity or given("WANDB_ENTITY") or None,
        name=given("WANDB_NAME") or str(config.run.name),
        tags=tags,
    )


def choose_mode() -> tuple[Mode, str]:
    """Online or not, and why not, in at most `_ANSWER_S` seconds. Sends nothing but a request for a page."""
    import wandb

    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # an empty one is not set, but W&B takes it for a value, and refuses many
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled", "as configured"
    settings = wandb.setup(wandb.Settings(silent=True)).settings
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
