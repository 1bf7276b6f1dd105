"""Environment variables that launchers set, and that others leave in a shell.

A PyTorchJob's pod, an MPI job or a debugging shell has variables of the same names as ours. launched.py reads
those of the launcher that started this process; the others are removed before a library reads them.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, MutableMapping

import psutil

from pipeline.errors import UserError

# Who a process is among others: torchrun's names, which Accelerate, DeepSpeed and torch read.
RANK_VARIABLES = frozenset(
    "RANK LOCAL_RANK GROUP_RANK ROLE_RANK NODE_RANK CROSS_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE "
    "ROLE_WORLD_SIZE LOCAL_SIZE CROSS_SIZE ROLE_NAME MASTER_ADDR MASTER_PORT FORK_LAUNCHED".split()
)
_TORCHRUN = ("TORCHELASTIC_", "PET_")
# Of launchers that never start our processes, yet which Accelerate asks before torchrun's; and settings of
# Accelerate that would change a plain state.
_FOREIGN = tuple(
    "OMPI_ PMI_ PMIX_ MV2_ MPI_LOCALNRANKS MPI_LOCALRANKID ACCELERATE_TORCH_DEVICE ACCELERATE_USE_SAGEMAKER "
    "ACCELERATE_SAGEMAKER_ ACCELERATE_DEBUG_MODE".split()
)
# What `accelerate launch` sets for its own plugins. We build the engines, and a plain Accelerate state would
# act on these itself (one DeepSpeed engine for two players, say).
_PLUGINS = tuple(
    "ACCELERATE_USE_DEEPSPEED ACCELERATE_USE_FSDP ACCELERATE_USE_MEGATRON_LM ACCELERATE_DEEPSPEED_ FSDP_ "
    "ACCELERATE_USE_PARALLELISM_CONFIG ACCELERATE_CONFIG_DS_FIELDS ACCELERATE_MIXED_PRECISION "
    "ACCELERATE_GRADIENT_ ACCELERATE_DYNAMO_".split()
)
_SETTINGS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "DS_ACCELERATOR", "SHARDGAN_NODE")
UNMEANT = ("OMPI_", "PMI_", "PMIX_", "MV2_", "SHARDGAN_")  # which MPI and Slurm set in all their shells
_NCCL_ERRORS, _NCCL_SILENCE = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
_ELSEWHERE = "192.0.2.1"  # an address of no machine (RFC 5737): the way to it is the default route
_MEANT = "ACCELERATE_USE_CPU"  # the user's choice, whoever starts the processes


def left_over(environ: Mapping[str, str]) -> list[str]:
    """The variables of other launchers that would affect processes that we start."""
    prefixes = (*_TORCHRUN, *_FOREIGN, *_SETTINGS)
    return sorted(
        name for name in environ if name in RANK_VARIABLES or (name.startswith(prefixes) and name != _MEANT)
    )


def clear_for(environ: MutableMapping[str, str], alone: bool) -> None:
    """Remove what Accelerate's state, torch or DeepSpeed would act on in this process.

    alone: no launcher started it, so variables that count processes are someone else's.
    """
    for name in list(environ):
        others = alone and (name in RANK_VARIABLES or name.startswith(_TORCHRUN))
        if others or name.startswith((*_PLUGINS, *_FOREIGN)):
            del environ[name]


def settle_nccl(environ: MutableMapping[str, str], timeout_s: float) -> None:
    """Leave it to the watch to name a failed rank and end the others, unless the user has decided otherwise.

    By default torch's NCCL threads would end them first: at the first error, and when one of these threads is
    silent for 480 seconds, as it may be while another works.
    """
    if environ.get(_NCCL_ERRORS, "1") == "1":  # which torch's launcher sets in all its processes
        environ[_NCCL_ERRORS] = "2"  # end communicators, not the process
    environ.setdefault(_NCCL_SILENCE, str(max(480, round(timeout_s))))


def settle_gloo(environ: MutableMapping[str, str]) -> None:
    """Name the network interface that leads to the main rank, unless the user has named one or this machine's
    name has an address that others can reach.

    gloo tells other machines to look for it at its own name's address, which Debian's /etc/hosts says is
    127.0.1.1, on the main rank's machine too.
    """
    if environ.get("GLOO_SOCKET_IFNAME") or not all(map(_is_loopback, _addresses(socket.gethostname()))):
        return
    ways = (_source(host) for host in (environ.get("MASTER_ADDR"), _ELSEWHERE) if host)
    own = next((address for address in ways if address and not _is_loopback(address)), None)
    for name, found in psutil.net_if_addrs().items():
        if own in [each.address.partition("%")[0] for each in found]:
            environ["GLOO_SOCKET_IFNAME"] = name


def _addresses(host: str) -> list[str]:
    try:
        return [str(found[4][0]).partition("%")[0] for found in socket.getaddrinfo(host, None)]
    except OSError:
        return []


def _source(host: str) -> str | None:
    """The address of this machine from which packets would leave for `host`; none is sent."""
    try:
        family, kind, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def place_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """Rank and world size. Raises UserError for values that no launcher of ours sets."""
    world, rank = whole_number(environ, "WORLD_SIZE", 1), whole_number(environ, "RANK", 0)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        whole_number(environ, name, 0)
    if rank >= world:
        raise UserError(f"The variables RANK={rank} and WORLD_SIZE={world} do not go together. Unset both.")
    if started_alone(environ) and world > 1:
        raise UserError(
            f"This process was started alone, but another launcher's variable WORLD_SIZE={world} says that "
            "there are others. Unset RANK and WORLD_SIZE, or start by `shardgan train`."
        )
    if world > 1:
        check_interfaces(environ)
    return rank, world


def started_alone(environ: Mapping[str, str]) -> bool:
    """Whether Accelerate started this process alone: it sets the precision for every process, and leaves
    several to torchrun or DeepSpeed's launchers."""
    several = "TORCHELASTIC_RUN_ID" in environ or flag(environ, "ACCELERATE_USE_DEEPSPEED")
    return "ACCELERATE_MIXED_PRECISION" in environ and not several


def whole_number(environ: Mapping[str, str], name: str, default: int) -> int:
    """A variable's count, `default` if unset or empty. Raises UserError if it is not a whole number ≥ 0."""
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"The variable {name}={text} is not a whole number. Unset it, or set it right.")
    return int(text)


def flag(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable is true; unset or empty is false. Raises UserError for anything else."""
    text = environ.get(name, "").strip().lower()
    if text in ("1", "true", "yes", "y", "t", "on"):
        return True
    if text in ("", "0", "false", "no", "n", "f", "off"):
        return False
    raise UserError(f"The variable {name}={text} is neither true nor false. Unset it, or set it to 1 or 0.")


def threads(environ: Mapping[str, str]) -> int | None:
    """Threads per process by OMP_NUM_THREADS, the first of a list; None if it is unset or empty.

    Raises UserError if it is not a number ≥ 1.
    """
    given = environ.get("OMP_NUM_THREADS", "")
    if not given.strip():
        return None
    text = given.partition(",")[0].strip()
    if not (text.isdecimal() and int(text)):
        raise UserError(
            f"The variable OMP_NUM_THREADS={given} is not a number of threads. Unset it, or set it to 1 or "
            "more."
        )
    return int(text)


def check_interfaces(environ: Mapping[str, str]) -> None:
    """Raises UserError if this machine has none of the network interfaces that gloo is to use."""
    wanted = [name for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    here = [name for _, name in socket.if_nameindex()]
    if wanted and not set(wanted) & set(here):
        raise UserError(
            f"The variable GLOO_SOCKET_IFNAME={','.join(wanted)}: this machine has no such interface, but "
            f"{', '.join(here)}. Unset it, or name one of those."
        )
