"""Whether a W&B run can be uploaded at once: with a key configured and the server answering it is online.

Otherwise it is kept in the run folder. WANDB_MODE decides if it is set.
"""

from __future__ import annotations

import http.client
import netrc
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["online", "offline", "disabled"]

_ANSWER_S = 4.0  # how long the server may take to show that it is there


def choose_mode() -> tuple[Mode, str]:
    """Online or not, and why not, in at most `_ANSWER_S` seconds. Sends nothing but a request for a page."""
    import wandb

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
