"""`shardgan selfcheck --mixed_precision`: it passes what trains right in bf16 and fp16, and nothing else."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner

from launch import selfcheck
from launch.selfcheck import low_precision, parity
from pipeline.parallel.engine import Engine
from pipeline.parallel.loss_scale import LossScale
from pipeline.parallel.weight_penalty import LocalPenalty

ADD, SKIPPING = LocalPenalty.add_gradient, Engine.skipping


def penalty_times(factor):
    def add(penalty, gradients, now):
        ADD(penalty, gradients, replace(now, l2=factor * now.l2, l1=factor * now.l1))

    return patch.object(LocalPenalty, "add_gradient", add)


def never_skipping(self, squares):
    SKIPPING(self, squares)
    return torch.zeros_like(squares, dtype=torch.float32)


MISTAKES = {
    "none": nullcontext,
    "penalty lost": lambda: penalty_times(0.0),
    "penalty halved": lambda: penalty_times(0.5),
    "never skipping": lambda: patch.object(Engine, "skipping", never_skipping),
    "gradients left scaled": lambda: patch.object(LossScale, "down_", lambda *_: None),
}
MADE = {
    "bf16": ("none", "penalty lost", "penalty halved", "never skipping"),
    "fp16": ("none", "gradients left scaled"),
}


@pytest.mark.parametrize("precision", MADE)
def test_it_sees_mistakes_through_the_rounding(tmp_path, precision):
    ranks = parity.join()
    chosen = low_precision.cases()
    for mistake in MADE[precision]:
        with patch.object(ranks, "precision", precision), MISTAKES[mistake]():
            parity.train_all(chosen, ranks, tmp_path)
            seen = low_precision.overflow(chosen[0], ranks)
        (tmp_path / low_precision.OVERFLOW).write_text(json.dumps(seen))
        errors = selfcheck.judge(tmp_path, "single", 1, "cpu", precision)
        wrong = {c: error for c, error in errors.items() if error > selfcheck.tolerance(c, precision)}
        assert bool(wrong) == (mistake != "none"), (mistake, errors)


@pytest.mark.parametrize(
    ("precision", "strategies"),
    [("bf16", "zero2"), pytest.param("fp16", "single,ddp,fsdp2,zero1,zero2,zero3", marks=pytest.mark.long)],
)
def test_the_command(precision, strategies):
    arguments = ["--strategies", strategies, "--procs", "2", "--mixed_precision", precision]
    ended = CliRunner().invoke(selfcheck.selfcheck, arguments)
    assert ended.exit_code == 0, ended.output
    rows = [
        line
        for line in ended.output.splitlines()
        if line.split()[:1] and line.split()[0] in strategies.split(",")
    ]
    assert [row.split()[0] for row in rows] == strategies.split(",")
    assert all(row.count("✓") == len(selfcheck.COLUMNS) + 1 for row in rows)
    assert f"mixed_precision {precision}" in ended.output
