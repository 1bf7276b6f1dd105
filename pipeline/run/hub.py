"""Exports on the Hugging Face Hub, through its own client (extra `hub`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import UserError
from pipeline.credentials import scrubbed, shareable
from pipeline.plugins import require
from pipeline.run.exported import FILE, NAMES, read
from pipeline.wording import in_kimg, one_line

_NAME = r"[\w.-]+/[\w.-]+"
_TEXTS = (".md", ".yaml", ".json")
_LOADED = ("G_ema.safetensors", "config.yaml", FILE)


def push(export: Path, repository: str, *, public: bool = False, replace: bool = False) -> str:
    """Publish an export as the repository USER/NAME, in one commit; returns its address.

    Only files that the export lists; what is text without credentials in URLs. A new repository is private
    unless `public`. replace: overwrite an export there, and remove what is left of it. Raises UserError,
    before anything is sent, without huggingface_hub, an export, a name or a token; if the repository holds
    files already and not `replace`, or is public and not `public` (or the reverse); if the Hub refuses.
    """
    hub = _client("shardgan push")
    facts = read(export)
    if lacking := [name for name in facts.files if not (export / name).is_file()]:
        raise UserError(f"{export} is no whole export: {lacking[0]} is missing. Export the run again.")
    if not re.fullmatch(_NAME, repository):
        raise UserError(f"{repository!r} is no repository of the Hub: write USER/NAME.")
    if not hub.get_token():
        raise UserError("You are not logged in to the Hugging Face Hub: `hf auth login`, or set HF_TOKEN.")
    api = hub.HfApi()
    with _one_message(hub, repository):
        there, before = _there(hub, api, repository, public)
        if there and not replace:
            raise UserError(
                f"{repository} holds files already ({', '.join(sorted(there)[:3])}, …). --replace overwrites "
                "an export there; or choose another name."
            )
        if before is None:
            api.create_repo(repository, private=not public)
        additions = [hub.CommitOperationAdd(name, _content(export / name)) for name in facts.files]
        stale = (there & {*NAMES}) - {*facts.files}
        removals = [hub.CommitOperationDelete(name) for name in sorted(stale)]
        message = f"{facts.name} at kimg {in_kimg(facts.cur_nimg / 1000)}"
        # parent_commit: refused if somebody else has changed it since.
        done = api.create_commit(
            repository, [*removals, *additions], commit_message=message, parent_commit=before
        )
    return str(done.repo_url)


def is_repository(name: str) -> bool:
    """Whether `name` is written as USER/NAME or USER/NAME@REVISION, and no folder here is called USER."""
    written = re.fullmatch(rf"{_NAME}(@[\w./-]+)?", name) and not name.startswith(".")
    return bool(written) and not Path(name.partition("/")[0]).exists()


def fetch(repository: str) -> Path:
    """The folder, in the Hub's own cache, of USER/NAME or USER/NAME@REVISION: what `load_exported` reads.

    REVISION: a branch, tag or commit. Raises UserError without huggingface_hub, or if it is not there.
    """
    hub = _client(f"Loading {repository} from the Hugging Face Hub")
    name, _, revision = repository.partition("@")
    with _one_message(hub, repository):
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=list(_LOADED)))


def _client(what: str) -> Any:
    require("huggingface_hub.errors", "hub", what)  # which the package does not import itself
    return require("huggingface_hub", "hub", what)


def _there(hub: Any, api: Any, repository: str, public: bool) -> tuple[set[str], str | None]:
    """Files of the repository and its newest commit; none and None if there is no such repository yet."""
    try:
        info = api.model_info(repository)
    except hub.errors.RepositoryNotFoundError:
        return set(), None
    if info.private == public:
        wanted, found = ("public", "private") if public else ("private", "public")
        raise UserError(
            f"{repository} exists and is {found}, so it cannot be {wanted} now: "
            + (
                "leave out --public, or change it on its page."
                if public
                else "add --public to publish there."
            )
        )
    return {file.rfilename for file in info.siblings or ()} - {".gitattributes"}, info.sha


def _content(file: Path) -> Path | bytes:
    if file.suffix not in _TEXTS:
        return file
    clean = shareable if file.suffix == ".md" else scrubbed  # a card's links are to work
    return clean(file.read_text("utf-8")).encode()


@contextmanager
def _one_message(hub: Any, repository: str) -> Iterator[None]:
    """What goes wrong between here and the Hub, in one line."""
    try:
        yield
    except UserError:
        raise
    except hub.errors.RepositoryNotFoundError:
        raise UserError(f"There is no {repository} on the Hub, or you have no access to it.") from None
    except hub.errors.RevisionNotFoundError:
        raise UserError(f"There is no such revision on the Hub: {repository}.") from None
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        if getattr(getattr(error, "response", None), "status_code", 0) == 401:
            raise UserError(
                "The Hugging Face Hub refuses your token: `hf auth login` again, or set another HF_TOKEN."
            ) from None
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{repository}, Hugging Face Hub: {one_line(scrubbed(text))}") from None
