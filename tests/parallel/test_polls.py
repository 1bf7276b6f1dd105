"""Flags combined by ranks that are threads of this process, connected by gloo."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from pipeline.parallel.polls import Polls

QUESTIONS = 20


def on_ranks(world, work):
    """`work(rank, polls)` of every rank, each in a thread, with connections as in a training."""
    store = dist.HashStore()

    def rank(number):
        polls = Polls(number, world, dist.ProcessGroupGloo(store, number, world, timedelta(seconds=60)))
        try:
            return work(number, polls)
        finally:
            polls.close()

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8, 13])
def test_every_rank_hears_of_every_flag(world):
    """One rank's bit in each question, of one rank after another; none in the last."""

    def work(rank, polls):
        answers = [polls.ask(1 << number if number % world == rank else 0) for number in range(QUESTIONS)]
        return [answer() for answer in [*answers, polls.ask(0)]]

    expected = [*(1 << number for number in range(QUESTIONS)), 0]
    assert on_ranks(world, work) == [expected] * world


def test_a_late_rank_keeps_no_other_waiting_until_the_answer_is_wanted():
    """The first rank asks twice before the others ask at all."""
    asked = threading.Event()

    def work(rank, polls):
        if rank:
            assert asked.wait(60)
        answers = [polls.ask(1), polls.ask(2)]
        asked.set()
        return [answer() for answer in answers]

    assert on_ranks(4, work) == [[1, 2]] * 4


def test_a_lost_peer_is_an_error_and_not_a_wait():
    store, timeout = dist.HashStore(), timedelta(seconds=0.2)

    def rank(number):
        group = dist.ProcessGroupGloo(store, number, 2, timeout)
        if number:
            return None  # asks nothing
        with pytest.raises(RuntimeError, match=r"(?i)timed out|gloo"):
            Polls(number, 2, group).ask(1)()
        return group

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))
