"""Training for Python: in this process, or in several that the command starts."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from launch import processes
from launch.argument import training_of
from pipeline.config import load
from pipeline.config_layers import as_override
from pipeline.errors import RunError, UserError
from pipeline.parallel.gpus import on_gpu
from pipeline.parallel.launched import Precision, Strategy
from pipeline.run.features import check_features
from pipeline.run.folder import under_a_free_name
from pipeline.run.stop import INTERRUPTED
from pipeline.train import in_this_process


def train(
    config: str | Path,
    settings: Mapping[str, Any],
    procs: int,
    strategy: Strategy | None,
    precision: Precision,
) -> Path:
    """See `shardgan.train`."""
    if not isinstance(settings, Mapping):
        raise UserError(f"settings={settings!r}: give a dictionary, as {{'penalty.l2': 0.001}}.")
    if not isinstance(procs, int) or procs < 1:
        raise UserError(f"procs={procs}: give a whole number, 1 or more.")
    if strategy not in (None, *get_args(Strategy)):
        raise UserError(f"strategy={strategy}: choose one of {', '.join(get_args(Strategy))}.")
    if precision not in get_args(Precision):
        raise UserError(f"mixed_precision={precision}: choose one of {', '.join(get_args(Precision))}.")
    overrides = [f"{key}={_text(value, '.options.' in key)}" for key, value in settings.items()]
    training = training_of(str(config), overrides, gpu=on_gpu())
    if procs == 1 and strategy in (None, "single"):
        training.explain()
        training.prepare()
        check_features(load(training.config, training.settings).score)  # before training, as the command does
        return in_this_process(training.config, training.settings, precision)
    run = under_a_free_name(load(training.config, training.settings)).run
    overrides += [as_override("run.name", str(run.name)), f"run.resume={_text(run.resume)}"]
    options = ["--procs", str(procs), "--mixed_precision", precision]
    _command(
        ["train", str(config), *overrides, *options, *(["--strategy", strategy] if strategy else [])], procs
    )
    return Path(run.out) / str(run.name)


def _command(arguments: list[str], procs: int) -> None:
    """Run `shardgan …` and print here what it prints; Ctrl-C is passed on, and raised once it has ended.

    Raises UserError with its message if it fails.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = processes.environment_of(procs, on_cpu=False)
    with processes.start([sys.executable, "-m", "launch.cli", *arguments], environment, **pipes) as child:
        try:
            error = _shown(child)
        except BaseException:
            processes.ask_to_stop(child, signal.SIGINT)
            try:
                _shown(child)
            except BaseException:
                processes.kill(child)
            raise
    if child.returncode == INTERRUPTED:  # stopped by someone else
        raise KeyboardInterrupt
    if child.returncode:
        kind = UserError if child.returncode == 2 else RunError
        raise kind(error or f"Training ended with status {child.returncode}; see above.")


def _shown(child: subprocess.Popen[bytes]) -> str:
    """Print what it prints until it ends; returns its error message instead, which comes last."""
    error: list[str] = []
    for line in (written.decode(errors="replace") for written in child.stdout or ()):
        if error or line.startswith("error: "):
            error.append(line)
        else:
            print(line, end="", flush=True)
    child.wait()
    return "".join(error).removeprefix("error: ").strip()


def _text(value: object, quoted: bool = False) -> str:
    """As settings are written on the command line. quoted: also a text, for an option of a user's class,
    whose type nothing else tells."""
    value = str(value) if isinstance(value, Path) else value
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")  # YAML's spelling, not JSON's
    return value if isinstance(value, str) and not quoted else json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    """A number of numpy's, say. Raises UserError."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        raise UserError(
            f"{value!r} cannot be a setting: give a number, a text, a list, true, false or None."
        ) from None
