"""What `shardgan train`, `doctor` and `submit` are given: a config, a run, shards, or images.

All become a config file and settings on top of it, as every process of a training gets them.
"""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path

from launch.installed import config_path
from launch.training import Training, of_run
from pipeline.credentials import redacted
from pipeline.data.prepare.listing import EXTENSIONS
from pipeline.errors import UserError, expanded, readable

_ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def training_of(argument: str, settings: Sequence[str], *, gpu: bool) -> Training:
    """Tell what an argument is. gpu: whether the training has one, which decides the preset for new runs.

    Only looks. Raises UserError for what can be none of it, or could be several.
    """
    if not argument:
        raise UserError("The argument for what to train on is empty. (Is a shell variable unset?)")
    if "://" in argument:
        raise UserError(
            f"{redacted(argument)} is not on this machine. Give a config, with the shards as data.train: "
            "shardgan train CONFIG data.train=URL data.size=N"
        )
    with readable(argument):
        return _of_path(argument, expanded(argument), settings, gpu)


def _of_path(argument: str, path: Path, settings: Sequence[str], gpu: bool) -> Training:
    if path.is_dir():
        return _of_folder(argument, path, settings, gpu)
    if (path.is_file() and argument.lower().endswith(".tar")) or _is_zip(path):
        from launch.own_images import of_data

        return of_data(argument, path, settings, gpu)
    if path.is_file() and path.suffix.lower() in (*EXTENSIONS, *_ARCHIVES):
        raise UserError(
            f"{argument} is neither a config nor a zip. Give a folder, or a zip, of images or shards."
        )
    return Training(config_path(argument, "config, folder, zip or run"), tuple(settings))


def _of_folder(argument: str, path: Path, settings: Sequence[str], gpu: bool) -> Training:
    from launch.own_images import of_data

    configured = (path / "config.yaml").is_file()
    if configured and ((path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file()):
        return of_run(path, settings)
    if configured and (path / "G_ema.safetensors").is_file():
        raise UserError(
            f"{argument} is an export: it can be sampled, but lacks what resuming needs. To begin with its "
            f"weights: shardgan train CONFIG run.init={argument}"
        )
    _refuse_runs(argument, path)
    return of_data(argument, path, settings, gpu)


def _refuse_runs(argument: str, path: Path) -> None:
    """Raise UserError for a folder of runs, or in a run: their sample grids are no images to train on."""
    for above in path.absolute().parents:
        if all((above / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            raise UserError(
                f"{argument} is in the folder of a run, and holds no images to train on. To resume the run: "
                f"shardgan train {shlex.quote(str(above))}"
            )
    beside = sorted(found for kind in ("*", "trials/*") for found in path.glob(f"{kind}/checkpoints"))
    if runs := [found.parent for found in beside if found.with_name("config.yaml").is_file()]:
        raise UserError(
            f"{argument} holds runs, not images. To resume one: shardgan train {shlex.quote(str(runs[0]))}"
        )


def _is_zip(path: Path) -> bool:
    return path.is_file() and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path))
