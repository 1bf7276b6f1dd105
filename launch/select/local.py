"""Training the trials of `shardgan select` on this machine, some at a time."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

from launch.processes import ask_to_stop, kill, start, training
from launch.select.trials import LaunchOptions, Trial
from pipeline.config import UserError
from pipeline.cores import cores
from pipeline.lock import LOCK, Lock, take
from pipeline.parallel.environment import threads
from pipeline.parallel.gpus import gpus
from pipeline.run.stop import StopSignals

Say = Callable[[str], None]
Ended = Callable[[Trial, str], None]


def hold(folder: Path, trials: Sequence[Trial], say: Say) -> Lock:
    """Lock a selection's folder, once no other process holds it or any of `trials`.

    Trials outlive a select that was killed, as they save before they end.
    """
    lock = take(folder, say, wait=True)
    try:
        _wait_for([trial.folder for trial in trials if (trial.folder / LOCK).exists()], say)
    except BaseException:
        lock.release()
        raise
    return lock


def _wait_for(folders: Sequence[Path], say: Say) -> None:
    """For all at the same time: a lock that a crash left on another machine takes most of a minute."""
    given_up = threading.Event()

    def wait(folder: Path) -> None:
        take(folder, say, wait=True, stopped=given_up.is_set).release()

    with ThreadPoolExecutor(max(1, len(folders))) as pool:
        try:
            for one in as_completed([pool.submit(wait, folder) for folder in folders]):
                one.result()
        except BaseException:
            given_up.set()
            raise


def train(
    todo: Sequence[Trial], launch: LaunchOptions, jobs: int, folder: Path, say: Say, ended: Ended
) -> StopSignals:
    """Train the trials, `jobs` at a time; `ended` is called after each, with what went wrong or "".

    folder: the selection's, for logs. Returns the signals received: one stops all trials, which save first.
    If `ended` raises, no more are started, those in training are asked to stop, and it is raised again here.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    jobs = min(jobs, max(1, len(todo)))
    if todo:
        say(f"Training now, with logs in {logs}: {'; '.join(trial.name for trial in todo[:jobs])}")
    crew = _Crew(launch, jobs, logs, ended)
    signals = StopSignals(on_stop=lambda _: crew.stop(), on_kill=crew.kill)
    with closing(signals), ThreadPoolExecutor(jobs) as pool:
        for outcome in [pool.submit(crew.train, trial) for trial in todo]:
            outcome.result()
    return signals


def shares(launch: LaunchOptions, jobs: int) -> list[dict[str, str]]:
    """The part of this machine that each of `jobs` trials has to itself, as environment variables.

    Raises UserError if there are GPUs, but not one for each process.
    """
    each = threads(os.environ) or max(1, cores() // (jobs * launch.procs))
    share = {"OMP_NUM_THREADS": str(each)}
    if not (found := gpus()):
        return [share] * jobs
    if jobs * launch.procs > found:
        raise UserError(
            f"--jobs {jobs} x --procs {launch.procs} need a GPU each, but this machine has {found}. Lower "
            "one of them."
        )
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(found)]
    parts = [names[slot * launch.procs : (slot + 1) * launch.procs] for slot in range(jobs)]
    return [share | {"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


class _Crew:
    """Trains trials in several threads, each in its share of the machine, until asked to stop."""

    def __init__(self, launch: LaunchOptions, jobs: int, logs: Path, ended: Ended) -> None:
        self._launch, self._logs, self._ended = launch, logs, ended
        self.stopped = threading.Event()
        self._running, self._reporting = set[subprocess.Popen[bytes]](), threading.Lock()
        self._shares = SimpleQueue[dict[str, str]]()
        for share in shares(launch, jobs):
            self._shares.put(share)

    def train(self, trial: Trial) -> None:
        if self.stopped.is_set():
            return
        log, share = self._logs / f"{trial.name}.log", self._shares.get()
        try:
            status = self._call(trial, log, share)
            with self._reporting:
                if not self.stopped.is_set():
                    self._ended(trial, "" if status == 0 and trial.done else _complaint(log, status))
        except BaseException:
            self.stop()  # or all that is queued would be trained before the error is raised
            raise
        finally:
            self._shares.put(share)

    def stop(self) -> None:
        """Start no more; those in training save and end."""
        self.stopped.set()
        for child in list(self._running):
            ask_to_stop(child)

    def kill(self) -> None:
        """End those in training, unsaved."""
        for child in list(self._running):
            kill(child)

    def _call(self, trial: Trial, log: Path, share: dict[str, str]) -> int:
        """Train in a process of its own; returns its exit status."""
        how = self._launch
        line, environment = training(
            how.strategy, how.procs, how.precision, list(trial.arguments), how.compiled
        )
        environment |= share
        for name in ("WANDB_RUN_ID", "WANDB_NAME"):  # or all trials would be one run there, or look like one
            environment.pop(name, None)
        with log.open("wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            child = start(line, environment, **streams)
            self._running.add(child)
            if self.stopped.is_set():  # since the check above, and without this child
                ask_to_stop(child)
            status = child.wait()
            self._running.discard(child)
        return status


def _complaint(log: Path, status: int) -> str:
    """The error of a failed trial, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = (number for number, line in enumerate(lines) if line.startswith("error:"))
    said = next((lines[number:] for number in errors), lines[-1:]) or ["without a word"]
    text = " ".join(said[: 2 if said[0].endswith(":") else 1])  # what follows a colon is the reason
    return f"exit status {status}: {text} ({log})"
