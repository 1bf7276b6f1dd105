"""DeepSpeed's settings: the launcher's, checked against the run's config and completed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

from pipeline.config import Optimizer, UserError
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.environment import whole_number

Settings = dict[str, Any]
_ONE_GROUP = 10**15  # elements in a stage-3 sub-group: all of them
_BUCKET = 2**24  # gradient elements reduced at once; DeepSpeed's 5·10⁸ take 2 GB, however small the player


def read_settings(env: Mapping[str, str]) -> Settings:
    """The launcher's DeepSpeed settings: its JSON file, or the stage and offload of its YAML.

    Raises UserError for unsupported ones (stage 0, NVMe, an optimizer) and a file that cannot be read.
    """
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file and file.lower() != "none":
        try:
            settings: Settings = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"The DeepSpeed config {file} cannot be read: {error}") from None
    else:
        settings = {
            "zero_optimization": {"stage": whole_number(env, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)},
            "gradient_clipping": _number(env.get("ACCELERATE_GRADIENT_CLIPPING", "auto")),
        }
        device = env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none").lower()
        if device != "none":
            settings["zero_optimization"]["offload_optimizer"] = {"device": device}
    zero = settings.setdefault("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2, 3):
        raise UserError(
            "ZeRO stage 0 is plain data parallelism: use --config_file launch/accelerate/ddp.yaml, which has "
            "no DeepSpeed overhead."
        )
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in (("none", "cpu") if key == "offload_optimizer" else ("none",)):
            raise UserError(f"{key} to {device} is not supported: only optimizer state can go to the CPU.")
    if settings.get("optimizer") or settings.get("scheduler") or zero.get("round_robin_gradients"):
        raise UserError(
            "Leave optimizer, scheduler and round_robin_gradients out of the DeepSpeed config: the "
            "optimizers are set by optim.G and optim.D of the run's config."
        )
    return settings


def _number(text: str) -> float | str:
    return text if text in ("auto", "none", "None", "") else float(text)


def deepspeed_config(
    given: Settings | None, precision: str, optimizer: Optimizer, batch: BatchShape, elements: int
) -> Settings:
    """The whole DeepSpeed config of one player with so many trainable elements.

    given: the launcher's. Raises UserError where its numbers disagree with ours.
    """
    given = copy.deepcopy(given or {})
    zero = given["zero_optimization"]
    ours: Settings = {
        "train_batch_size": batch.world * batch.local,
        "train_micro_batch_size_per_gpu": batch.images,
        "gradient_accumulation_steps": batch.rounds,
    }
    for key, value in ours.items():
        if given.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"The DeepSpeed config says {key}={given[key]}, but data.batch_size, data.batch_gpu and the "
                f"number of processes make it {value}. Set it to auto there."
            )
    if given.get("gradient_clipping", "auto") not in ("auto", "none", "None", "", optimizer.clip, 0, 0.0):
        raise UserError(
            f"The launcher says gradient_clipping={given['gradient_clipping']}, the run's config "
            f"optim.*.clip={optimizer.clip}. Set it to auto there."
        )
    for section in ("bf16", "fp16"):
        enabled = (given.pop(section, None) or {}).get("enabled", "auto")
        if enabled not in ("auto", precision == section):
            raise UserError(
                f"The DeepSpeed config says {section}.enabled={enabled}, the launcher mixed_precision="
                f"{precision}. Set it to auto there."
            )
    # This timer waits for the device in every pass and step, for a report that is not printed.
    given.setdefault("timers", {"throughput": {"enabled": False}})
    zero.setdefault("reduce_bucket_size", min(elements, _BUCKET))
    # Each rank gets the sum of its own part only: half of what an all-reduce sends.
    zero.setdefault("use_multi_rank_bucket_allreduce", False)
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if zero["stage"] == 3:
        zero["sub_group_size"] = _ONE_GROUP
    elif not offload:
        zero["compute_grad_norm"] = False  # ours includes the penalty and does not wait for the device
    return (
        given
        | ours
        | {
            "gradient_clipping": 0.0,  # the engine's hook clips, after adding the penalty
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {
                "enabled": precision != "no",
                "dtype": "float16" if precision == "fp16" else "bfloat16",
                "lower_precision_safe_modules": [],  # gradients are reduced in fp32
            },
        }
    )


@contextmanager
def waiting_for(timeout: timedelta) -> Iterator[None]:
    """Process groups made inside get this timeout. DeepSpeed's own is 10 minutes (NCCL) or 30 (gloo), which
    slow work on one rank may take."""
    before = set(c10d._world.pg_map)
    yield
    for group in set(c10d._world.pg_map) - before:
        c10d._set_pg_timeout(timeout, group)


def settle_deepspeed(environ: MutableMapping[str, str], gpus: bool) -> None:
    """Say where DeepSpeed is to run, which it reads when it is imported."""
    environ["DS_ACCELERATOR"] = "cuda" if gpus else "cpu"
    if not gpus:
        # Otherwise it runs `numactl` to count devices, once for every bucket of gradients.
        environ.setdefault("LOCAL_SIZE", environ.get("LOCAL_WORLD_SIZE", "1"))


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed; on a CPU it compiles no kernel of its own (97 s) before it starts. Call `settle_deepspeed`
    before."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # otherwise it tries a compiler to find them
    logger.setLevel("ERROR")  # it warns of what we do on purpose
    return deepspeed
