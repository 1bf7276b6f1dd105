"""The trials of `shardgan select`: which there are, and running them, each a run folder like any other."""

from __future__ import annotations

import fcntl
import math
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import FrameType

import yaml

from launch.train import ask_to_stop, die_with_parent, process
from pipeline import config
from pipeline.config import Config, UserError
from pipeline.run.folder import check_same, finished

Say = Callable[[str], None]

# Settings that decide what scores are against, and those that select itself gives to each trial.
_FIXED = (
    "score",
    "data.train",
    "data.size",
    "data.channels",
    "data.stages",
    "data.holdout",
    "data.folds",
    "data.fold",
)
_OURS = ("run.name", "run.out", "run.seed", "run.resume")


@dataclass(frozen=True)
class Arm:
    """One candidate: the settings it changes."""

    name: str
    settings: tuple[str, ...]
    values: Mapping[str, str] = field(hash=False)  # of a grid: key → value as written; of named arms: empty

    @property
    def slug(self) -> str:
        """The name, as part of a folder's."""
        return re.sub(r"[^\w.=+,-]+", "_", self.name.replace(", ", ","))

    def number(self, key: str) -> float | None:
        """A grid's value as a number, if it is one."""
        try:
            return float(self.values[key])
        except ValueError:
            return None


@dataclass(frozen=True)
class Trial:
    """One training: an arm, with one seed, and one part of the data held out."""

    arm: Arm
    seed: int
    fold: int
    settings: Config
    arguments: tuple[str, ...]  # for pipeline.train

    @property
    def name(self) -> str:
        return str(self.settings.run.name)

    @property
    def folder(self) -> Path:
        return Path(self.settings.run.out) / self.name

    @property
    def done(self) -> bool:
        return finished(self.folder, self.settings)


@dataclass(frozen=True)
class Launch:
    """How each trial is launched."""

    strategy: str = "single"
    procs: int = 1
    precision: str = "no"


def grid(axes: Sequence[str]) -> list[Arm]:
    """Every combination of axes `KEY=V1,V2,…`, where 1e-6:1e-2:5 stands for 5 values evenly spaced in log.

    Raises UserError for an axis that cannot be read.
    """
    parsed = [_axis(text) for text in axes]
    if len({key for key, _ in parsed}) < len(parsed):
        raise UserError("--grid: each key once; several values go behind one, with commas between.")
    arms = []
    for combination in product(*(values for _, values in parsed)):
        values = dict(zip((key for key, _ in parsed), combination, strict=True))
        settings = tuple(f"{key}={value}" for key, value in values.items())
        arms.append(Arm(", ".join(settings), settings, values))
    return arms


def arms(file: Path) -> list[Arm]:
    """Arms from a YAML file of `name: [key=value, …]`. Raises UserError if it is not one."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--arms {file} cannot be read: {' '.join(str(error).split())}") from None
    listed = content.items() if isinstance(content, dict) else ()
    found = [Arm(str(name), tuple(settings), {}) for name, settings in listed if _is_settings(settings)]
    if len(found) < max(1, len(listed)):
        raise UserError(f"--arms {file}: not a list of arms, each as `name: [key=value, …]`.")
    return found


def trials(
    path: str, overrides: Sequence[str], candidates: Sequence[Arm], folds: int, seeds: int
) -> tuple[Config, list[Trial]]:
    """The base config and all trials, fold by fold, so that those that are done first compare.

    Raises UserError, before anything is started, for an arm that cannot be trained or compared.
    """
    base = config.load(path, overrides)
    folder = Path(base.run.out) / str(base.run.name)
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run; give the selection another run.name.")
    slugs = [arm.slug for arm in candidates]
    if clash := {slug for slug in slugs if slugs.count(slug) > 1}:
        raise UserError(f"Two arms would be called {clash.pop()}.")
    made = []
    for seed, fold, arm in product(range(base.run.seed, base.run.seed + seeds), range(folds), candidates):
        _check_comparable(arm, base, config.load(path, [*overrides, *arm.settings]))
        arguments = (
            *overrides,
            *arm.settings,
            f"run.seed={seed}",
            f"data.folds={folds}",
            f"data.fold={fold}",
            f"run.out='{folder / 'trials'}'",
            f"run.name='{arm.slug},seed={seed},fold={fold}'",
            f"track.group='{base.track.group or base.run.name}'",
        )
        trial = Trial(arm, seed, fold, config.load(path, arguments), (path, *arguments))
        check_same(trial.settings, trial.folder)
        made.append(trial)
    return base, made


def hold(folder: Path, say: Say) -> int:
    """Lock a selection's folder, for this process and its trials; returns the lock's file descriptor.

    Waits for the trials of an earlier select that was killed: two of one name must not train at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"Another `shardgan select` is at work on {folder}, or its last trials are; waiting for them.")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def run(
    todo: Sequence[Trial],
    launch: Launch,
    jobs: int,
    folder: Path,
    lock: int,
    ended: Callable[[Trial, str], None],
) -> bool:
    """Train the trials, `jobs` at a time; `ended` hears of each, with what went wrong or "".

    folder: the selection's, where logs go. lock: from `hold`, kept by the trials too.
    Returns False if asked to stop (SIGTERM, Ctrl-C) before all were trained; those at work save and leave.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    stop, running, telling = threading.Event(), set[subprocess.Popen[bytes]](), threading.Lock()

    def train(trial: Trial) -> None:
        if stop.is_set():
            return
        line, environment = process(launch.strategy, launch.procs, launch.precision, list(trial.arguments))
        log = logs / f"{trial.name}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                line,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )
            running.add(child)
            status = child.wait()
            running.discard(child)
        if not stop.is_set():
            with telling:
                ended(trial, "" if status == 0 and trial.done else _complaint(log, status))

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        for child in list(running):
            child.terminate() if launch.strategy == "single" else ask_to_stop(child)

    with _handling(ask), ThreadPoolExecutor(jobs) as pool:
        for outcome in [pool.submit(train, trial) for trial in todo]:
            outcome.result()
    return not stop.is_set()


@contextmanager
def _handling(ask: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not (key and equals and values):
        raise UserError(f"--grid {text}: not of the form KEY=V1,V2,…")
    found = [value for part in values.split(",") for value in _range(part.strip(), text)]
    return key, list(dict.fromkeys(found))


def _range(part: str, axis: str) -> list[str]:
    """LOW:HIGH:COUNT → so many values, or the value itself; numbers in their shortest form."""
    try:
        if ":" not in part:
            return [f"{float(part):g}"]
        low, high, count = part.split(":")
        start, step = float(low), math.log(float(high) / float(low)) / (int(count) - 1)
        return [f"{start * math.exp(step * i):.6g}" for i in range(int(count))]
    except (ValueError, ZeroDivisionError):
        if ":" in part and re.match(r"[\d.]", part):
            raise UserError(
                f"--grid {axis}: {part} is not LOW:HIGH:COUNT with 0 < LOW, as in 1e-6:1e-2:5."
            ) from None
        return [part]  # a word


def _is_settings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and "=" in entry for entry in value)


def _check_comparable(arm: Arm, base: Config, changed: Config) -> None:
    for key in (*_FIXED, *_OURS):
        before, after = base, changed
        for part in key.split("."):
            before, after = getattr(before, part), getattr(after, part)
        if before != after:
            hint = "use --seeds" if key == "run.seed" else "set it for all, behind CONFIG"
            raise UserError(
                f"{arm.name}: {key} cannot differ between trials, whose scores would not compare; {hint}."
            )


def _complaint(log: Path, status: int) -> str:
    """What a failed trial said last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")] or lines[-1:]
    return f"exit status {status}: {told[0] if told else 'without a word'} ({log})"
