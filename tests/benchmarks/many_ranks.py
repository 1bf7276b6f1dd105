"""What ranks ask each other and the launcher's store, as there are more of them. By hand:

    python tests/benchmarks/many_ranks.py

prints, for worlds of 2 to 16 processes, how long the flags of an update take to go round, by our Polls and
by an all-reduce of gloo, in turns; and what processor time a beat of the watch takes of the launcher's store.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from pipeline.parallel.polls import Polls
from pipeline.parallel.watch.beats import Beat, Process, read_beat, read_verdict

WORLDS = (2, 4, 8, 16)
TURNS, QUESTIONS = 15, 40
BEATS = 5_000


def questions(rank: int, world: int, folder: str) -> None:
    """In a rank: time turns of questions, each of which is answered before the next."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    group: Any = dist.group.WORLD
    polls = Polls(rank, world, group)

    def ours() -> None:
        polls.ask(0)()

    def ring() -> None:
        dist.all_reduce(torch.tensor([0, 0, 0], dtype=torch.int32), op=dist.ReduceOp.MAX, group=group)

    ways = {"polls": ours, "all-reduce": ring}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, ask in ways.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(QUESTIONS):
                ask()
            taken[name].append((time.perf_counter() - start) / QUESTIONS)
    if rank == 0:
        mine, theirs = (1000 * statistics.median(times) for times in taken.values())
        print(
            f"{world} ranks: {mine:.2f} ms, all-reduce {theirs:.2f} ms ({theirs / mine:.1f} times)",
            flush=True,
        )
    polls.close()
    dist.destroy_process_group()


def beats(_: int, port: int) -> None:
    """In a rank: what its watch asks of the store, once a second for each of BEATS ranks."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    mine = Beat(0, Process(), at="in an update, at pipeline/step.py:40 (train_step)")
    for _ in range(BEATS):
        mine.publish(store)
        read_verdict(store)
        read_beat(store, 0)


def main() -> None:
    for world in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(questions, (world, folder), world)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = _others_cpu_s()
    multiprocessing.spawn(beats, (store.port,), 1)
    each = (_others_cpu_s() - before) / BEATS
    print(
        f"a beat takes {1e6 * each:.0f} µs of the store: {100 * 1024 * each:.1f} % of a core for 1,024 ranks"
    )


def _others_cpu_s() -> float:
    """Processor time of this process's threads but the main one: the store's."""
    return time.process_time() - time.thread_time()


if __name__ == "__main__":
    main()
