"""Environment variables that launchers leave to the processes they start, and that others leave lying about.

A PyTorchJob's pod, an MPI job or a debugging shell has variables of the same names as ours. Those of the
launcher that did start a process are read by launched.py; all others are cleared before a library obeys them.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping

from pipeline.config import UserError

# Who a process is among others: torchrun's names, which Accelerate, DeepSpeed and torch read.
RANK_VARIABLES = frozenset(
    "RANK LOCAL_RANK GROUP_RANK ROLE_RANK NODE_RANK CROSS_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE "
    "ROLE_WORLD_SIZE LOCAL_SIZE CROSS_SIZE ROLE_NAME MASTER_ADDR MASTER_PORT FORK_LAUNCHED".split()
)
_TORCHRUN = ("TORCHELASTIC_", "PET_")
# Of launchers that never start our processes, yet which Accelerate asks before torchrun's; and settings of
# Accelerate that would change a plain state.
_FOREIGN = (
    *("OMPI_", "PMI_", "PMIX_", "MV2_", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    *(
        "ACCELERATE_TORCH_DEVICE",
        "ACCELERATE_USE_SAGEMAKER",
        "ACCELERATE_SAGEMAKER_",
        "ACCELERATE_DEBUG_MODE",
    ),
)
# What `accelerate launch` leaves behind for its own plugins. The engines are built here instead, and a
# plain Accelerate state would act on these on its own (one DeepSpeed engine for two players, say).
_PLUGINS = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_",
    "FSDP_",
)
_SETTINGS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "DS_ACCELERATOR", "SHARDGAN_NODE")
UNMEANT = ("OMPI_", "PMI_", "PMIX_", "MV2_", "SHARDGAN_")  # which MPI and Slurm set in every shell of theirs
_MEANT = "ACCELERATE_USE_CPU"  # a person's wish, whoever starts the processes


def left_over(environ: Mapping[str, str]) -> list[str]:
    """The variables by which another launcher, or its settings, would rule processes that we start."""
    prefixes = (*_TORCHRUN, *_FOREIGN, *_SETTINGS)
    return sorted(
        name for name in environ if name in RANK_VARIABLES or (name.startswith(prefixes) and name != _MEANT)
    )


def clear_for(environ: MutableMapping[str, str], alone: bool) -> None:
    """Remove what Accelerate's state, torch or DeepSpeed would act on in this process by themselves.

    alone: no launcher started it, so that whatever says how many there are is of someone else.
    """
    for name in list(environ):
        others = alone and (name in RANK_VARIABLES or name.startswith(_TORCHRUN))
        if others or name.startswith((*_PLUGINS, *_FOREIGN)):
            del environ[name]


def place_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """Rank and world size. Raises UserError for a place that the launcher cannot have given."""
    world, rank = whole_number(environ, "WORLD_SIZE", 1), whole_number(environ, "RANK", 0)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        whole_number(environ, name, 0)
    if rank >= world:
        raise UserError(f"The variables RANK={rank} and WORLD_SIZE={world} do not go together. Unset both.")
    if started_alone(environ) and world > 1:
        raise UserError(
            f"This is the only process that was started here, but WORLD_SIZE={world}, a variable of another "
            "launcher, says that there are others. Unset RANK and WORLD_SIZE, or start by `shardgan train`."
        )
    if world > 1:
        check_interfaces(environ)
    return rank, world


def started_alone(environ: Mapping[str, str]) -> bool:
    """Accelerate sets the precision for every process that it starts; several it leaves to torchrun, or to
    DeepSpeed's launchers."""
    several = "TORCHELASTIC_RUN_ID" in environ or flag(environ, "ACCELERATE_USE_DEEPSPEED")
    return "ACCELERATE_MIXED_PRECISION" in environ and not several


def whole_number(environ: Mapping[str, str], name: str, default: int) -> int:
    """A variable that counts something; empty is unset. Raises UserError if it is no number, or negative."""
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"The variable {name}={text} is not a whole number. Unset it, or set it right.")
    return int(text)


def flag(environ: Mapping[str, str], name: str) -> bool:
    """A variable that is true or false; empty is unset. Raises UserError for anything else."""
    text = environ.get(name, "").strip().lower()
    if text in ("1", "true", "yes", "y", "t", "on"):
        return True
    if text in ("", "0", "false", "no", "n", "f", "off"):
        return False
    raise UserError(f"The variable {name}={text} is neither true nor false. Unset it, or set it to 1 or 0.")


def threads(environ: Mapping[str, str]) -> int | None:
    """Threads that OMP_NUM_THREADS asks for in each process; None if it is unset or empty.

    Of a list for nested parallelism, as OpenMP has it, the first. Raises UserError if that is no number.
    """
    text = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not environ.get("OMP_NUM_THREADS", "").strip():
        return None
    if not (text.isdecimal() and int(text)):
        raise UserError(
            f"The variable OMP_NUM_THREADS={environ['OMP_NUM_THREADS']} is not a number of threads. "
            "Unset it, or set it to 1 or more."
        )
    return int(text)


def check_interfaces(environ: Mapping[str, str]) -> None:
    """Raises UserError if gloo is told to use network interfaces of which this machine has none."""
    wanted = [name for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    here = [name for _, name in socket.if_nameindex()]
    if wanted and not set(wanted) & set(here):
        raise UserError(
            f"The variable GLOO_SOCKET_IFNAME={','.join(wanted)}: this machine has no such interface, but "
            f"{', '.join(here)}. Unset it, or name one of these."
        )
