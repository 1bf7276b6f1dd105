"""The whole job under sharded strategies: what the parity matrix, of small norm-free networks, leaves out."""

from __future__ import annotations

import math

import pytest
from launching import FASHION, hybrid, rows_written, shardgan, train, without_clocks
from launching import Started as start

CONFIG = f"""
data: {{train: {FASHION}, size: 28, channels: 1, batch_size: 24, batch_gpu: 6}}
G: {{width: 8, norm: batch}}
D: {{width: 8, norm: batch, dropout: 0.1}}
penalty: {{l2: 1.0e-3, r1: {{gamma: 0.1, interval: 4}}}}
run: {{total_kimg: 0.48, tick_kimg: 0.12, checkpoint_kimg: 0.24, snapshot_kimg: 0.24, eval_kimg: 0.48}}
score: {{images: 24}}
track: {{wandb: false}}
"""


@pytest.mark.parametrize(
    "strategy",
    ["fsdp2", *(pytest.param(name, marks=pytest.mark.long) for name in ("hsdp", "zero2", "zero3"))],
)
def test_bf16_batch_norm_dropout_and_an_interruption(strategy, tmp_path):
    """In bf16 with BatchNorm, dropout, R1 and accumulation; stopped and continued, bit-identical."""
    (tmp_path / "job.yaml").write_text(CONFIG)
    line = shardgan("train", "job.yaml", "--procs", "2", "--strategy", strategy, "--mixed_precision", "bf16")
    if strategy == "hsdp":
        line = hybrid("job.yaml", "data.batch_gpu=3", precision="bf16")
    unbroken = train([*line, "run.name=unbroken"], tmp_path / "runs" / "unbroken", cwd=tmp_path)

    broken = tmp_path / "runs" / "broken"
    ended = start([*line, "run.name=broken"], tmp_path).until(rows_written(broken, 2)).ctrl_c()
    assert ended.status == 130, ended.output
    continued = train([*line, "run.name=broken"], broken, cwd=tmp_path)

    assert [without_clocks(row) for row in continued.rows] == [without_clocks(row) for row in unbroken.rows]
    for network, tensors in unbroken.exported().items():
        for name, tensor in tensors.items():
            assert tensor.isfinite().all() and tensor.equal(continued.exported()[network][name]), name
    assert all(math.isfinite(value) for row in unbroken.rows for value in row.values())
