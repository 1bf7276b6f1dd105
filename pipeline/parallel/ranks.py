"""Who am I, how many are we, on which device, under which strategy: read from what the launcher set up."""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from pipeline import console
from pipeline.config import UserError
from pipeline.parallel.environment import clear_for, flag, place_of, started_alone
from pipeline.parallel.watch.whereabouts import Progress
from pipeline.parallel.zero_settings import read_settings

Strategy = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
Precision = Literal["no", "bf16", "fp16"]
T = TypeVar("T")
_LONG_S = 10.0  # after which a person wonders what is being waited for
_ZERO: dict[int, Strategy] = {1: "zero1", 2: "zero2", 3: "zero3"}


class CommonError(UserError):
    """A UserError that every rank knows of: the main rank tells."""

    status = 2


class RunError(CommonError):
    """What ends a run that began well, whatever the user gave it: exit status 1."""

    status = 1


@dataclass(frozen=True)
class Launch:
    """What the launcher asked for, before anything is joined."""

    strategy: Strategy
    precision: Precision
    rank: int
    world: int
    zero: dict[str, Any] | None = None  # DeepSpeed's settings as the launcher gave them
    keep_gathered: bool = False  # FSDP: within a turn (fsdp_reshard_after_forward: false)


def read_launch(environ: dict[str, str] | None = None) -> Launch:
    """Strategy, precision, rank and world size from the environment `accelerate launch` made.

    Raises UserError for a launcher set-up that would quietly train something else.
    """
    env = dict(os.environ) if environ is None else environ
    env = {name: value for name, value in env.items() if value}
    rank, world = place_of(env)
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"--mixed_precision {precision} is not one of no, bf16, fp16.")
    if "WORLD_SIZE" not in env and env.get("MASTER_PORT"):
        raise UserError(
            "The launcher was told to start several processes but its file says distributed_type: NO, so "
            "each would train alone. Use --config_file launch/accelerate/ddp.yaml (or another strategy); for "
            "one process, unset MASTER_PORT."
        )
    strategy = _strategy(env)
    zero = read_settings(env) if strategy.startswith("zero") else None
    keep = env.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
    return Launch(strategy, precision, rank, world, zero, keep)  # type: ignore[arg-type]


def _strategy(env: dict[str, str]) -> Strategy:
    if flag(env, "ACCELERATE_USE_DEEPSPEED"):
        return _ZERO[read_settings(env)["zero_optimization"]["stage"]]
    if flag(env, "ACCELERATE_USE_FSDP"):
        if env.get("FSDP_VERSION") != "2":
            raise UserError(
                "FSDP version 1 is not supported: set fsdp_version: 2 (launch/accelerate/fsdp2.yaml)."
            )
        return "fsdp2"
    return "ddp" if "WORLD_SIZE" in env and not started_alone(env) else "single"


class Ranks:
    """The processes training together, seen from one of them.

    Every method is a no-op or the identity in a world of one, so that callers never ask which rank they are.
    """

    def __init__(self, launch: Launch, timeout: timedelta, progress: Progress | None = None) -> None:
        """Join the others. Raises UserError when the launcher's world and ours disagree."""
        clear_for(os.environ, alone=launch.strategy == "single")
        # When a rank fails, it is for the watch to name it and to end the others. Left to itself, NCCL ends
        # them first: at its first error, and where its own thread has been silent for 480 seconds.
        # 2: abort communicators, not the process. Not a default: torch's launcher has set 1 by now.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"
        silence = max(480, round(timeout.total_seconds()))
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(silence))
        cpu = flag(os.environ, "ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        with _said_if_long(launch):
            state = PartialState(cpu=cpu, timeout=timeout, **_meeting_place(launch, timeout))
        if (state.num_processes, state.process_index) != (launch.world, launch.rank):
            raise UserError(
                f"The launcher started {launch.world} processes but Accelerate sees {state.num_processes}: "
                "each would train alone. On a machine without GPUs set ACCELERATE_USE_CPU=1."
            )
        self.rank, self.world = launch.rank, launch.world
        self.progress = progress or Progress()  # for whoever watches over this rank
        self.strategy, self.precision, self.zero = launch.strategy, launch.precision, launch.zero
        self.keep_gathered = launch.keep_gathered
        self.timeout = timeout  # of collectives
        self.device: torch.device = state.device
        torch.backends.cudnn.deterministic = True  # a resumed run ends with the bits of an unbroken one
        # Control flags must not queue behind gradients: they travel on a group of their own.
        self._control = dist.new_group(backend="gloo", timeout=timeout) if self.world > 1 else None

    @property
    def main(self) -> bool:
        """The one rank that writes files and talks to people."""
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

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tensors of equal shape [n, …] from every rank → [world·n, …], in the order of the ranks."""
        self.progress.moves += 1
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather_objects(self, value: T) -> list[T]:
        """One small picklable value from each rank, in the order of the ranks."""
        self.progress.moves += 1
        if self._control is None:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values  # type: ignore[return-value]

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, given to all; its UserError is raised on all."""
        self.progress.moves += 1
        answer: list[Any] = [None, None]  # what was made, or why it could not be
        if self.main:
            try:
                answer[0] = make()
            except UserError as error:
                answer[1] = str(error)
        if self._control is not None:
            dist.broadcast_object_list(answer, src=0, group=self._control)
        value, failure = answer
        if failure is not None:
            raise CommonError(failure)
        return value  # type: ignore[no-any-return]

    def broadcast_on_machine(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank of each machine, given to the others of that machine."""
        machines = self.gather_objects(_machine())
        first = machines.index(machines[self.rank])
        return self.gather_objects(make() if self.rank == first else None)[first]  # type: ignore[return-value]

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise on every rank the UserError that any rank met inside, named by rank unless all met it."""
        failure: str | None = None
        try:
            yield
        except UserError as error:
            failure = str(error)
        failures = self.gather_objects(failure)
        distinct = {text for text in failures if text is not None}
        if len(distinct) == 1 and None not in failures:
            raise CommonError(distinct.pop())
        if distinct:
            raise CommonError("\n".join(f"rank {r}: {text}" for r, text in enumerate(failures) if text))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.progress.moves += 1
        if self._control is not None:
            dist.barrier(group=self._control)

    def poll_any(self, *flags: bool) -> Callable[[], list[bool]]:
        """Ask which flags any rank has raised. The answer comes when called, so that work fits between."""
        self.progress.moves += 1
        if self._control is None:
            return lambda: list(flags)
        seen = torch.tensor(flags, dtype=torch.int32)
        pending = dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._control, async_op=True)

        def answer() -> list[bool]:
            pending.wait()
            return [bool(flag) for flag in seen.tolist()]

        return answer

    def leave(self) -> None:
        """Part in good order, so that no peer reports a broken connection."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _said_if_long(launch: Launch) -> Iterator[None]:
    """Say, once per machine, what this rank waits for while the others have not come."""
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


def _machine() -> tuple[str, str]:
    """Equal for processes that see each other in /proc: those of one kernel and, in it, one container."""
    if sys.platform != "linux":
        return platform.node(), ""
    return Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())


def _meeting_place(launch: Launch, timeout: timedelta) -> dict[str, Any]:
    """What torch is to be told besides, where the launcher keeps the store in which ranks find each other."""
    if launch.world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    return {"store": launcher_store(timeout), "rank": launch.rank, "world_size": launch.world}


def launcher_store(timeout: timedelta) -> Store:
    """A connection to the launcher's store, for this attempt alone.

    The store outlives a restart of the ranks (`accelerate launch --max_restarts`), and torch, left to
    itself, then reads the addresses of processes that are gone whenever it is the faster.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return PrefixStore(f"shardgan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def end_process(status: int) -> NoReturn:
    """End this process here and now, when all is written and said.

    At the interpreter's own pace, threads of torch.distributed and DeepSpeed that outlive the objects they
    wait on abort the process now and then, and a launcher takes a finished training for a failed one.
    """
    console.settle()
    os._exit(status)
