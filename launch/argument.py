"""What `shardgan train`, `doctor` and `submit` are given: a config, a run, shards, or images.

All become a config file and settings on top of it, as every process of a training gets them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from launch.training import Training, of_run

_YAML = (".yaml", ".yml")


def training_of(argument: str, settings: Sequence[str], *, gpu: bool) -> Training:
    """Tell what an argument is. gpu: whether the training has one, which decides the preset for new runs.

    Only looks. Raises UserError for what can be none of it, or could be several.
    """
    from pipeline.config import UserError

    path = Path(argument).expanduser()
    if "://" in argument:
        raise UserError(
            f"{_shown(argument)} is not on this machine. Give a config, with the shards as data.train: "
            "shardgan train CONFIG data.train=URL data.size=N"
        )
    if path.is_dir():
        return _of_folder(argument, path, settings, gpu)
    if (path.is_file() and argument.lower().endswith(".tar")) or _is_zip(path):
        from launch.own_images import of_data

        return of_data(argument, path, settings, gpu)
    if path.suffix.lower() in _YAML or path.is_file():
        return Training(argument, tuple(settings))
    raise UserError(f"There is no config, folder, zip or run called {argument}.{_meant(argument)}")


def _of_folder(argument: str, path: Path, settings: Sequence[str], gpu: bool) -> Training:
    from launch.own_images import of_data
    from pipeline.config import UserError

    if not (path / "config.yaml").is_file():
        return of_data(argument, path, settings, gpu)
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file():
        return of_run(path, settings)
    if (path / "G_ema.safetensors").is_file():
        raise UserError(
            f"{argument} is an export: it can be sampled, but lacks what resuming needs. To begin with its "
            f"weights: shardgan train CONFIG run.init={argument}"
        )
    return of_data(argument, path, settings, gpu)


def _is_zip(path: Path) -> bool:
    return path.is_file() and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path))


def _meant(argument: str) -> str:
    """What the person may have meant by a name that stands for nothing."""
    from launch.installed import configs
    from pipeline.data.prepare.known import KNOWN

    name = Path(argument).name
    if name in KNOWN:
        return f" To fetch that data set: shardgan prepare {name} data/{name}"
    near = configs() / f"{name}.yaml"
    return f" Did you mean {near}?" if near.is_file() else ""


def _shown(argument: str) -> str:
    from pipeline.credentials import redacted

    return redacted(argument)
