"""Trainings in which one rank misbehaves, one after the other in the processes of one launch:

    accelerate launch … -m sabotage CONFIG OUT

Each prints its name before and its exit status after what it has to say.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import pipeline.loop
import pipeline.players
import pipeline.run.saving
import pipeline.run.scorer
import pipeline.train
from pipeline.console import end_process
from pipeline.gan.losses import Adversarial, adversarial
from pipeline.parallel.launched import read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.weight_penalty import LocalPenalty

BAD_RANK = 1
Sabotage = Callable[[Ranks, Path], AbstractContextManager[Any]]  # of a rank, in the run of that folder


def cases() -> dict[str, tuple[Sabotage, tuple[str, ...]]]:
    """Name → (what goes wrong, further settings). A name that ends in + continues the run before it."""
    everlasting = range(30, 10**9)
    may_mount = os.geteuid() == 0
    return {
        "unbroken": (_nothing, ()),
        "told-to-stop-while-scoring": (_signal_in_score, ("run.stop_signal=USR2",)),
        "told-to-stop-while-scoring+": (_nothing, ()),
        "nan-in-D-once": (partial(_nan_loss, "d", range(30, 31)), ()),
        "nan-in-D": (partial(_nan_loss, "d", everlasting), ()),
        "nan-in-G": (partial(_nan_loss, "g", everlasting), ()),
        "nan-in-penalty-once": (_nan_penalty, ()),
        "flipped-bit": (_flip, ()),
        "slow-disk": (partial(_slow_disk, 3), ()),
        "slower-disk": (partial(_slow_disk, 11), ()),
        **({"read-only-disk": (_read_only, ("run.snapshot_kimg=0.06",))} if may_mount else {}),
    }


def _nothing(_ranks: Ranks, _folder: Path) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def _nan_loss(player: str, calls: range, ranks: Ranks, _folder: Path) -> Iterator[None]:
    """A player's loss is not a number on one rank, in these of its calls."""

    def make(kind: Any) -> Adversarial:
        right, count = adversarial(kind), iter(range(10**9))

        def wrong(*logits: torch.Tensor) -> torch.Tensor:
            bad = ranks.rank == BAD_RANK and next(count) in calls
            return getattr(right, player)(*logits) * (float("nan") if bad else 1.0)

        return replace(right, **{player: wrong})

    with patch.object(pipeline.players, "adversarial", make):
        yield


@contextmanager
def _nan_penalty(ranks: Ranks, _folder: Path) -> Iterator[None]:
    """A penalty is not a number on one rank, once."""
    right, count = LocalPenalty.sums, iter(range(10**9))

    def wrong(self: LocalPenalty, *given: torch.Tensor) -> dict[str, torch.Tensor]:
        bad = ranks.rank == BAD_RANK and next(count) == 40  # D and G in turn
        return {part: value * (float("nan") if bad else 1.0) for part, value in right(self, *given).items()}

    with patch.object(LocalPenalty, "sums", wrong):
        yield


@contextmanager
def _flip(ranks: Ranks, _folder: Path) -> Iterator[None]:
    """One bit of one weight of D changes in the memory of one rank."""
    right, count = pipeline.loop.train_step, iter(range(10**9))

    def wrong(gan: Any, *arguments: Any) -> int:
        if ranks.rank == BAD_RANK and next(count) == 33:
            gan.D.fragments[0].data.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        return right(gan, *arguments)

    with patch.object(pipeline.loop, "train_step", wrong):
        yield


@contextmanager
def _after_updates(happens: Callable[[int], None]) -> Iterator[None]:
    """Calls `happens` after each update, with how many there have been."""
    right, count = pipeline.loop.train_step, iter(range(1, 10**9))

    def followed(*arguments: Any) -> int:
        cur_nimg = right(*arguments)
        happens(next(count))
        return cur_nimg

    with patch.object(pipeline.loop, "train_step", followed):
        yield


@contextmanager
def _slow_disk(updates: int, _ranks: Ranks, _folder: Path) -> Iterator[None]:
    """A checkpoint is on disk only so many updates later or, if training waits for it, 1.5 s after that."""
    right, done, changed, waiting = os.fsync, 0, threading.Condition(), threading.Event()
    finish = pipeline.run.saving.Saver.finish

    def note(count: int) -> None:
        nonlocal done
        with changed:
            done = count
            changed.notify_all()

    def slow(descriptor: int) -> None:
        if "buffers" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):  # one file of each rank's
            with changed:
                until = done + updates
                changed.wait_for(lambda: done >= until or waiting.is_set())
            if waiting.is_set():
                time.sleep(1.5)
        right(descriptor)

    def waited_for(self: pipeline.run.saving.Saver) -> list[str]:
        with changed:
            waiting.set()
            changed.notify_all()
        try:
            return finish(self)
        finally:
            waiting.clear()

    with (
        _after_updates(note),
        patch.object(os, "fsync", slow),
        patch.object(pipeline.run.saving.Saver, "finish", waited_for),
    ):
        yield


@contextmanager
def _read_only(ranks: Ranks, folder: Path) -> Iterator[None]:
    """The run folder cannot be written to from the 33rd update, by when all saves are done, to the 47th."""
    begin, savers = pipeline.run.saving.Saver.begin, list[pipeline.run.saving.Saver]()
    commands = {
        33: [["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder]],
        47: [["umount", "-l", folder]],
    }

    def noted(self: pipeline.run.saving.Saver, *arguments: Any) -> None:
        savers.append(self)
        begin(self, *arguments)

    def change(count: int) -> None:
        if count == 33:
            savers[-1].finish()
        for command in commands.get(count, []) if ranks.main else []:
            subprocess.run(command, check=True)

    with _after_updates(change), patch.object(pipeline.run.saving.Saver, "begin", noted):
        yield


@contextmanager
def _signal_in_score(ranks: Ranks, _folder: Path) -> Iterator[None]:
    """One rank, and only that, is told to stop in the second evaluation, before its first batch."""
    right, count = pipeline.run.scorer.Scorer._interrupt, iter(range(10**9))

    def told(self: pipeline.run.scorer.Scorer, *given: Any) -> None:
        if ranks.rank == BAD_RANK and self._scored == 0 and next(count) == 1:
            heard = threading.Event()
            with patch.object(self._signals, "_on_stop", lambda _: heard.set()):
                os.kill(os.getpid(), signal.SIGUSR2)
                assert heard.wait(60.0)
        right(self, *given)

    with patch.object(pipeline.run.scorer.Scorer, "_interrupt", told):
        yield


def main(config: str, out: str) -> None:
    launch = read_launch()
    ranks = Ranks(launch, timedelta(seconds=120))
    with ExitStack() as stack:
        stack.enter_context(patch.object(pipeline.train, "read_launch", lambda: launch))
        stack.enter_context(patch.object(pipeline.train, "Ranks", lambda *_: ranks))
        stack.enter_context(patch.object(ranks, "leave", lambda: None))
        for name, (sabotaged, settings) in cases().items():
            _say(ranks, f"=== {name}")
            folder = Path(out) / name.rstrip("+")
            with sabotaged(ranks, folder):
                arguments = [f"run.out={out}", f"run.name={folder.name}", *settings]
                status = pipeline.train.main([config, *arguments])
            _say(ranks, f"=== status {status}")
    ranks.leave()


def _say(ranks: Ranks, text: str) -> None:
    ranks.barrier()
    if ranks.main:
        print(text, flush=True)
    ranks.barrier()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    end_process(0)
