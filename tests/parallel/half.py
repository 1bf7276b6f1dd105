"""fp16 in the ranks of a launch: its loss scale alone, and all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from launch.selfcheck import low_precision, parity
from pipeline.parallel import zero
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.zero_settings import deepspeed_config

CASES = ("adam-l2-clipped-2", "r1-clipped")


def train(ranks: Ranks, out: Path) -> list[dict[str, Any]]:
    """Train some cases with the loss scale over fp32 networks, into OUT/scaled, and in fp16, into OUT/fp16.
    Returns what `low_precision.overflow` saw."""
    chosen = [case for case in parity.cases(ranks.world) if case.name in CASES]
    for folder in ("scaled", "fp16"):
        (out / folder).mkdir(exist_ok=True)
    with patch.object(ranks, "precision", "fp16"):
        with patch.object(Ranks, "low_precision", None), patch.object(zero, "deepspeed_config", _in_fp32):
            parity.train_all(chosen, ranks, out / "scaled")
            seen = low_precision.overflow(chosen[0], ranks)
        parity.train_all(chosen, ranks, out / "fp16")
    return seen


def _in_fp32(given: Any, _precision: str, *rest: Any) -> dict[str, Any]:
    return deepspeed_config(given, "no", *rest)
