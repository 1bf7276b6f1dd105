"""Trainings in which one rank misbehaves, one after the other in the processes of one launch:

    accelerate launch … -m sabotage CONFIG OUT

Each prints its name before and its exit status after what it has to say.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch

import pipeline.loop
import pipeline.run.session
import pipeline.train
from pipeline.gan.losses import Adversarial, adversarial
from pipeline.parallel.ranks import Ranks, end_process, read_launch
from pipeline.parallel.weight_penalty import LocalPenalty

BAD_RANK = 1
Cases = dict[str, tuple[Callable[[Ranks], AbstractContextManager[Any]], tuple[str, ...]]]


def cases() -> Cases:
    """Name → (what goes wrong, further settings). A name that ends in + continues the run before it."""
    everlasting = range(30, 10**9)
    return {
        "unbroken": (lambda _: nullcontext(), ()),
        "told-to-stop-while-scoring": (_signal_in_score, ("run.stop_signal=USR2",)),
        "told-to-stop-while-scoring+": (lambda _: nullcontext(), ()),
        "nan-in-D-once": (lambda ranks: _nan_loss(ranks, "d", range(30, 31)), ()),
        "nan-in-D": (lambda ranks: _nan_loss(ranks, "d", everlasting), ()),
        "nan-in-G": (lambda ranks: _nan_loss(ranks, "g", everlasting), ()),
        "nan-in-penalty-once": (_nan_penalty, ()),
        "flipped-bit": (_flip, ()),
    }


@contextmanager
def _nan_loss(ranks: Ranks, player: str, calls: range) -> Iterator[None]:
    """A player's loss is not a number on one rank, in these of its calls."""

    def make(kind: Any) -> Adversarial:
        right, count = adversarial(kind), iter(range(10**9))

        def wrong(*logits: torch.Tensor) -> torch.Tensor:
            bad = ranks.rank == BAD_RANK and next(count) in calls
            return getattr(right, player)(*logits) * (float("nan") if bad else 1.0)

        return replace(right, **{player: wrong})

    with patch.object(pipeline.train, "adversarial", make):
        yield


@contextmanager
def _nan_penalty(ranks: Ranks) -> Iterator[None]:
    """A penalty is not a number on one rank, once."""
    right, count = LocalPenalty.values, iter(range(10**9))

    def wrong(self: LocalPenalty) -> dict[str, torch.Tensor]:
        bad = ranks.rank == BAD_RANK and next(count) == 42  # two when made, then D and G in turn
        return {part: value * (float("nan") if bad else 1.0) for part, value in right(self).items()}

    with patch.object(LocalPenalty, "values", wrong):
        yield


@contextmanager
def _flip(ranks: Ranks) -> Iterator[None]:
    """One bit of one weight of D changes in the memory of one rank."""
    right, count = pipeline.loop.train_step, iter(range(10**9))

    def wrong(gan: Any, *arguments: Any) -> int:
        if ranks.rank == BAD_RANK and next(count) == 33:
            gan.D.fragments[0].data.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        return right(gan, *arguments)

    with patch.object(pipeline.loop, "train_step", wrong):
        yield


@contextmanager
def _signal_in_score(ranks: Ranks) -> Iterator[None]:
    """One rank, and only that, is told to stop in the middle of the second evaluation."""
    right, count = pipeline.run.session.evaluate, iter(range(10**9))

    def signalled(*arguments: Any) -> Any:
        if ranks.rank == BAD_RANK and next(count) == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return right(*arguments)

    with patch.object(pipeline.run.session, "evaluate", signalled):
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
            with sabotaged(ranks):
                arguments = [f"run.out={out}", f"run.name={name.rstrip('+')}", *settings]
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
