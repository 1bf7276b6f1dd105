"""Strategy, precision, rank and world size: read from the environment that the launcher set up."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from pipeline.errors import UserError
from pipeline.parallel.compilation import Compilation, check_compilation, read_compilation
from pipeline.parallel.environment import (
    clear_for,
    flag,
    place_of,
    settle_gloo,
    settle_nccl,
    started_alone,
    whole_number,
)
from pipeline.parallel.gpus import on_gpu
from pipeline.parallel.hybrid import read_shards
from pipeline.parallel.zero_settings import read_settings, settle_deepspeed

Strategy = Literal["single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]
Precision = Literal["no", "bf16", "fp16"]
_ZERO: dict[int, Strategy] = {1: "zero1", 2: "zero2", 3: "zero3"}
# A CPU's instructions for it, on x86 and ARM, as torch.cpu names them.
_INSTRUCTIONS = {
    "bf16": ("amx_bf16", "avx512_bf16", "bf16"),
    "fp16": ("amx_fp16", "avx512_fp16", "fp16_arith"),
}


@dataclass(frozen=True)
class Launch:
    """What the launcher asked for, before the ranks meet."""

    strategy: Strategy
    precision: Precision
    rank: int
    world: int
    zero: dict[str, Any] | None = None  # the launcher's DeepSpeed settings
    keep_gathered: bool = False  # FSDP: within a turn (fsdp_reshard_after_forward: false)
    compilation: Compilation | None = None
    shards: int | None = None  # hsdp: ranks that share one copy of a player

    def check(self, rounds: int) -> None:
        """Raises UserError for what this machine cannot do. rounds: of an update."""
        check_compilation(self.compilation, self.strategy, rounds, on_gpu())

    def settle(self, environ: MutableMapping[str, str], timeout_s: float) -> None:
        """Set all variables that ranks need; a second time changes nothing. timeout_s: of collectives.

        To be called before threads start: glibc's getenv, in a thread that opens a connection, crashes while
        another adds a variable.
        """
        clear_for(environ, alone=self.strategy == "single")
        settle_nccl(environ, timeout_s)
        if whole_number(environ, "LOCAL_WORLD_SIZE", self.world) < self.world:
            settle_gloo(environ)
        if self.world == 1:  # which talks to no other GPU; Accelerate insists on some pairs of cards
            environ.setdefault("NCCL_P2P_DISABLE", "1")
            environ.setdefault("NCCL_IB_DISABLE", "1")
        # Else every rank connects to every other, in each group, by addresses from the launcher's store:
        # 1,024 ranks read 8.8 GB from it per group and hold 1,023 sockets each.
        environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        if self.zero is not None:
            settle_deepspeed(environ, on_gpu())


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Raises UserError for a launcher set-up that would quietly train something else."""
    env = {name: value for name, value in environ.items() if value}
    rank, world = place_of(env)
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"--mixed_precision {precision} is not one of no, bf16, fp16.")
    if "WORLD_SIZE" not in env and env.get("MASTER_PORT"):
        raise UserError(
            "MASTER_PORT asks for several processes, but the launcher's file says distributed_type: NO: each "
            "would train alone. Use --config_file launch/accelerate/ddp.yaml (or another strategy); for one "
            "process, unset MASTER_PORT."
        )
    strategy, zero = _strategy(env)
    keep = env.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
    shards = read_shards(env, world) if strategy == "hsdp" else None
    how = read_compilation(env)
    return Launch(strategy, precision, rank, world, zero, keep, how, shards)  # type: ignore[arg-type]


def _strategy(env: Mapping[str, str]) -> tuple[Strategy, dict[str, Any] | None]:
    """The strategy, and DeepSpeed's settings if it has some."""
    if flag(env, "ACCELERATE_USE_DEEPSPEED"):
        settings = read_settings(env)
        return _ZERO[settings["zero_optimization"]["stage"]], settings
    if flag(env, "ACCELERATE_USE_FSDP"):
        if env.get("FSDP_VERSION") != "2":
            raise UserError(
                "FSDP version 1 is not supported: set fsdp_version: 2 (launch/accelerate/fsdp2.yaml)."
            )
        return ("hsdp" if flag(env, "ACCELERATE_USE_PARALLELISM_CONFIG") else "fsdp2"), None
    return ("ddp" if "WORLD_SIZE" in env and not started_alone(env) else "single"), None


def arithmetic(precision: str, device: torch.device) -> str:
    """A precision in words. On NVIDIA GPUs from Ampere on, PyTorch computes float32 convolutions in TF32,
    which keeps 10 bits of the mantissa; NVIDIA's own variable forbids it."""
    if precision != "no" or device.type != "cuda" or not torch.cuda.is_tf32_supported():
        return precision
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    if convolutions.fp32_precision != "tf32" or os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return precision
    return f"{precision} (float32, convolutions in TF32 unless NVIDIA_TF32_OVERRIDE=0)"


def emulated(precision: str, device: torch.device) -> str:
    """What to know of a precision that this device computes without instructions for it; empty for others.

    On a CPU with AVX2 alone, networks of configs/ take 8 to 16 times as long in bf16 as in float32
    (`python tests/benchmarks/low_precision.py CONFIG …`).
    """
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(False):
        return "this GPU has no instructions for bf16, which torch emulates: use --mixed_precision fp16"
    names = _INSTRUCTIONS.get(precision)
    if device.type != "cpu" or names is None or any(torch.cpu.get_capabilities().get(n) for n in names):
        return ""
    return (
        f"{precision} is slow on this CPU, which has no instructions for it, and takes more memory: "
        "omit --mixed_precision"
    )


def launcher_store(timeout: timedelta) -> Store:
    """A connection to the launcher's store, for this attempt alone.

    The store outlives a restart of the ranks (`accelerate launch --max_restarts`); without a prefix of its
    own, a faster rank may read addresses of processes that are gone.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return PrefixStore(f"shardgan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
