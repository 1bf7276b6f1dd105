"""A user's own classes and functions by name, as `package.module:Name`, also from the current folder."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from pipeline.api.shadows import SEARCHED_LAST
from pipeline.config import UserError

_OURS = Path(__file__).parent


def import_named(name: str, title: str) -> Any:
    """The object at `package.module:Name`. title: the setting it comes from, for messages.

    The current folder is searched last, so that no file in it hides another module. Raises UserError if it
    cannot be imported.
    """
    module, _, attribute = name.partition(":")
    last = os.environ.get(SEARCHED_LAST, "").split(os.pathsep)
    for folder in (str(Path.cwd()), *filter(None, last)):
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        if module == "__main__":
            raise UserError(
                f"{title}: {attribute} is not here, as the classes of a notebook or script are only in its "
                f"own process. Put it in a file, mine.py say, and give mine:{attribute}."
            ) from None
        raise UserError(f"{title} cannot be imported: {reason(error)}{_mistaken(module)}") from error


def import_class(path: str, title: str, base: type[Any]) -> type[Any]:
    """The class at `package.module:Class`.

    Raises UserError if it cannot be imported or is not derived from `base`.
    """
    found = import_named(path, title)
    if not (isinstance(found, type) and issubclass(found, base)):
        where = "torch.nn" if base.__module__.startswith("torch.nn.") else base.__module__
        raise UserError(f"{title} is not a class derived from {where}.{base.__name__}.")
    return found


def require(module: str, extra: str, what: str) -> Any:
    """The module, which `pip install 'shardgan[extra]'` brings. what: needs it, for the message.

    Raises UserError if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what} needs {module}: pip install 'shardgan[{extra}]'") from None


def own_version() -> str:
    """Of this package; "unknown" for a source folder that is not installed, as in a container's image."""
    try:
        return importlib.metadata.version("shardgan")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def reason(error: Exception) -> str:
    """One line: the error, and the line of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not (_is_installed(f.filename) or Path(f.filename).is_relative_to(_OURS))]
    where = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _mistaken(module: str) -> str:
    """What to add if a module of the same name is found before the user's file."""
    top = module.partition(".")[0]
    mine = next((p for p in (Path.cwd() / f"{top}.py", Path.cwd() / top) if p.exists()), None)
    file = getattr(sys.modules.get(top), "__file__", None)
    if mine is None or top not in sys.modules or (file and Path(file).is_relative_to(Path.cwd())):
        return ""
    return f". `{top}` is {file or 'built into Python'}: give {mine} another name"


def _is_installed(filename: str) -> bool:
    return filename.startswith("<") or "site-packages" in filename or filename == importlib.__file__
