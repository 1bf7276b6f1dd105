"""The processes that train together: which one this is, and how they communicate."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from pipeline.errors import CommonError, RunError, StoppedError, UserError
from pipeline.heap import keep_freed_memory
from pipeline.holder import kernel, pid_namespace
from pipeline.parallel.gpus import on_gpu
from pipeline.parallel.launched import Launch, launcher_store
from pipeline.parallel.polls import Polls
from pipeline.parallel.watch.whereabouts import Progress
from pipeline.wording import ranks_named

T = TypeVar("T")
_LONG_S = 10.0  # of waiting for other ranks: then say so


class Ranks:
    """The processes that train together. In a world of one, every method is a no-op or the identity."""

    def __init__(self, launch: Launch, timeout: timedelta, progress: Progress | None = None) -> None:
        """Join the others. Raises UserError when the launcher's world and ours disagree."""
        launch.settle(os.environ, timeout.total_seconds())
        self.progress = progress or Progress()  # for the watch
        with self.progress.during("joining the other ranks"), _said_if_long(launch):
            state = PartialState(cpu=not on_gpu(), timeout=timeout, **_meeting_place(launch, timeout))
        if (state.num_processes, state.process_index) != (launch.world, launch.rank):
            raise UserError(
                f"The launcher started {launch.world} processes but Accelerate sees {state.num_processes}: "
                "each would train alone. On a machine without GPUs set ACCELERATE_USE_CPU=1."
            )
        self.rank, self.world = launch.rank, launch.world
        self.strategy, self.precision, self.zero = launch.strategy, launch.precision, launch.zero
        self.keep_gathered, self.compilation = launch.keep_gathered, launch.compilation
        # Ranks that share one copy of a player, next to each other.
        self.shards = launch.shards or (1 if launch.strategy == "ddp" else launch.world)
        self.timeout = timeout  # of collectives
        self.device: torch.device = state.device
        # A resumed run ends with the bits of an unbroken one: no kernel is chosen by its time.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        if self.device.type == "cpu":
            keep_freed_memory()
        # Control flags must not queue behind gradients: they have a group of their own.
        self._control = dist.new_group(backend="gloo", timeout=timeout) if self.world > 1 else None
        self._polls = Polls(self.rank, self.world, self._control) if self._control is not None else None
        if 1 < self.shards < self.world:
            first = self.rank - self.rank % self.shards
            self.within_copy = _group(range(first, first + self.shards), timeout)
            self.over_copies = _group(range(self.rank % self.shards, self.world, self.shards), timeout)
        with self.progress.during("joining the other ranks"), _said_if_long(launch):
            self.barrier()  # gloo connects when it first sends: until here the others need not be alive

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and talks to people."""
        return self.rank == 0

    @property
    def low_precision(self) -> torch.dtype | None:
        """What networks compute in, over fp32 masters; None: fp32."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks of a tensor of equal shape on each; in place."""
        self.progress.moves += 1
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def confirm(self) -> None:
        """Raises RuntimeError if collectives no longer work.

        After an error NCCL ends a communicator but not the process: gradients since then may be garbage.
        """
        found = self.sum(torch.ones((), device=self.device)).item()
        if found != self.world:
            raise RuntimeError(f"a sum of ones over {self.world} ranks came out as {found:g}")

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tensors of equal shape [n, …] from every rank → [world·n, …], in the order of the ranks."""
        self.progress.moves += 1
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather_objects(self, value: T) -> list[T]:
        """A small picklable value from each rank, in the order of the ranks."""
        self.progress.moves += 1
        if self._control is None:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values  # type: ignore[return-value]

    def gather_on_main(self, value: T) -> list[T]:
        """As gather_objects, on the main rank; [] on the others, which need no memory for all ranks'."""
        self.progress.moves += 1
        if self._control is None:
            return [value]
        values: list[T | None] | None = [None] * self.world if self.main else None
        dist.gather_object(value, values, dst=0, group=self._control)
        return values or []  # type: ignore[return-value]

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, on all ranks; its UserError is raised on all."""
        self.progress.moves += 1
        value, failure = _broadcast(make, self.main, 0, self._control)
        if failure is not None:
            text, status = failure
            kinds = {kind.status: kind for kind in (RunError, StoppedError)}
            raise kinds.get(status, CommonError)(text)
        return value  # type: ignore[return-value]

    def broadcast_on_machine(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank of each machine, on all ranks of that machine, where its
        UserError is raised on all."""
        self.progress.moves += 1
        first, group = self._machine
        value, failure = _broadcast(make, self.rank == first, first, group)
        if failure is not None:
            raise UserError(failure[0])
        return value  # type: ignore[return-value]

    @cached_property
    def _machine(self) -> tuple[int, dist.ProcessGroup | None]:
        """Its first rank, and a group of its ranks, None for one rank. The first use is collective."""
        machines = self.gather_objects((kernel(), pid_namespace()))  # processes that see each other in /proc
        here = [rank for rank, machine in enumerate(machines) if machine == machines[self.rank]]
        if len(here) in (1, self.world):
            return here[0], self._control if len(here) > 1 else None
        group = dist.new_group(here, backend="gloo", timeout=self.timeout, use_local_synchronization=True)
        return here[0], group

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise any rank's UserError on every rank, with the ranks' numbers unless all ranks had it."""
        failure: str | None = None
        try:
            yield
        except UserError as error:
            failure = str(error)
        if not self.poll_any(failure is not None)()[0]:
            return
        ranks_of: dict[str, list[int]] = {}
        for rank, text in enumerate(self.gather_objects(failure)):
            if text is not None:
                ranks_of.setdefault(text, []).append(rank)
        if [len(ranks) for ranks in ranks_of.values()] == [self.world]:
            raise CommonError(next(iter(ranks_of)))
        raise CommonError("\n".join(f"{ranks_named(ranks)}: {text}" for text, ranks in ranks_of.items()))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.progress.moves += 1
        if self._control is not None:
            dist.barrier(group=self._control)

    def poll_any(self, *flags: bool) -> Callable[[], list[bool]]:
        """Ask which flags are set on any rank. Call the result for the answer, after work in between."""
        self.progress.moves += 1
        if self._polls is None:
            return lambda: list(flags)
        bits = self._polls.ask(sum(flag << place for place, flag in enumerate(flags)))

        def answer() -> list[bool]:
            found = bits()
            return [bool(found >> place & 1) for place in range(len(flags))]

        return answer

    def leave(self) -> None:
        """Disconnect in good order, so that no peer reports a broken connection."""
        if self._polls is not None and dist.is_initialized():
            self._polls.close()
            dist.destroy_process_group()


def _broadcast(
    make: Callable[[], T], makes: bool, source: int, group: dist.ProcessGroup | None
) -> tuple[T | None, tuple[str, int] | None]:
    """What `make` returns where `makes`, on all ranks of the group, or its UserError's text and exit status:
    one broadcast of a size and one of the bytes."""
    answer: list[Any] = [None, None]
    if makes:
        try:
            answer[0] = make()
        except UserError as error:
            answer[1] = str(error), error.status
    if group is not None:
        dist.broadcast_object_list(answer, src=source, group=group)
    return answer[0], answer[1]


@contextmanager
def _said_if_long(launch: Launch) -> Iterator[None]:
    """Say, once per machine, what this rank waits for if the others do not come."""
    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    text = (
        f"Waiting at {where} until all {launch.world} processes are there (by the environment this one has "
        f"RANK={launch.rank} of WORLD_SIZE={launch.world}); Ctrl-C ends it."
    )
    timer = threading.Timer(_LONG_S, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if launch.world > 1 and os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _meeting_place(launch: Launch, timeout: timedelta) -> dict[str, Any]:
    """Arguments for torch where the launcher keeps the store in which ranks find each other."""
    if launch.world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    return {"store": launcher_store(timeout), "rank": launch.rank, "world_size": launch.world}


def _group(members: range, timeout: timedelta) -> dist.ProcessGroup:
    """A group of this rank and others. Only they wait for each other here: a thousand ranks make hundreds."""
    group: dist.ProcessGroup = dist.new_group([*members], timeout, use_local_synchronization=True)
    return group


def taking_part(arguments: Sequence[Any]) -> list[int]:
    """The ranks in a collective, of the arguments that torch's dispatcher gets; none without a group."""
    boxed = next((a for a in arguments if isinstance(a, torch.ScriptObject)), None)  # a ReduceOp may follow
    group = None if boxed is None else dist.ProcessGroup.unbox(boxed)
    return [] if group is None else dist.get_process_group_ranks(group)
