"""Whether two versions of the code train the same numbers, bit for bit. By hand:

    python tests/benchmarks/same_numbers.py train CHECKOUT OUT [key=value …]
    python tests/benchmarks/same_numbers.py compare OUT OTHER_OUT

trains 20 updates with rounds, clipping, R1, L2, batch norm, dropout and labels by the code in CHECKOUT under
every strategy; and compares the files of the checkpoints and the rows of metrics.jsonl but for clocks.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
FASHION = ROOT / "tests" / "assets" / "fashion-mnist-500"
LAUNCHES = (
    ("single", 1, "no"), ("ddp", 2, "no"), ("fsdp2", 2, "no"),
    ("zero1", 2, "no"), ("zero2", 2, "no"), ("zero3", 2, "no"),
    ("single", 1, "bf16"), ("ddp", 2, "bf16"), ("fsdp2", 2, "bf16"),
)  # fmt: skip
CONFIG = f"""
run: {{total_kimg: 0.48, tick_kimg: 0.072, checkpoint_kimg: 0.168, eval_kimg: 99, keep: 9}}
data:
  {{train: {FASHION}, size: 28, channels: 1, batch_size: 24, batch_gpu: 6, conditional: true}}
G: {{width: 8, norm: batch, z_dim: 16, dropout: 0.2}}
D: {{width: 8, norm: batch, dropout: 0.2}}
penalty: {{l2: 1.0e-3, G: {{l1: 1.0e-4}}, r1: {{gamma: 1, interval: 3}}}}
optim: {{G: {{clip: 0.5}}, D: {{clip: 0.4}}}}
ema: {{kimg: 0.1}}
score: {{metrics: []}}
track: {{wandb: false}}
"""
ZERO3 = ROOT / "launch" / "deepspeed" / "zero3-partition-all.json"  # else nothing so small is partitioned


def train(checkout: Path, out: Path, settings: list[str]) -> None:
    """A run folder OUT/STRATEGY-PRECISION for every launch."""
    out.mkdir(parents=True)
    (out / "same.yaml").write_text(CONFIG)
    ours = {"PYTHONPATH": str(checkout.resolve()), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    for strategy, world, precision in LAUNCHES:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(world)]
        command += ["--config_file", str(ROOT / "launch" / "accelerate" / f"{strategy}.yaml")]
        command += ["--main_process_port", str(free_port())] if world > 1 else []
        command += ["--mixed_precision", precision]
        command += ["--deepspeed_config_file", str(ZERO3)] if strategy == "zero3" else []
        name = f"{strategy}-{precision}"
        command += ["-m", "pipeline.train", "same.yaml", f"run.name={name}", "run.out=.", *settings]
        with (out / f"{name}.log").open("w") as log:
            subprocess.run(command, cwd=out, env=os.environ | ours, stdout=log, stderr=log, check=True)
        print(f"{name} trained", flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def compare(one: Path, other: Path) -> bool:
    """Print what differs under each strategy; whether nothing does."""
    same = True
    for strategy, _, precision in LAUNCHES:
        name = f"{strategy}-{precision}"
        tensors, rows = (
            differing_tensors(one / name, other / name),
            differing_charts(one / name, other / name),
        )
        same = same and not tensors and not rows
        print(f"{name}: {len(tensors)} tensors differ {tensors[:3]}; charts: {rows or 'the same'}")
    return same


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Tensors of any checkpoint that are not the same, bit for bit."""
    files = [
        sorted(p.relative_to(run) for p in run.glob("checkpoints/*/*.safetensors")) for run in (one, other)
    ]
    assert files[0] and files[0] == files[1]
    found = []
    for file in files[0]:
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys(), (file, a.keys() ^ b.keys())
        bits = {key: a[key].view(torch.uint8) if a[key].ndim else a[key] for key in a}
        found += [f"{file}:{key}" for key in a if not torch.equal(bits[key], b[key].view(bits[key].dtype))]
    return found


def differing_charts(one: Path, other: Path) -> dict[str, float]:
    """Chart → its largest relative difference in any row."""
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, other)
    ]
    assert len(rows[0]) == len(rows[1])
    found: dict[str, float] = {}
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        for chart in a:
            clock = chart == "time" or chart.startswith(("Timing/", "Resources/"))
            if a[chart] != b[chart] and not clock:
                difference = abs(a[chart] - b[chart]) / max(abs(a[chart]), abs(b[chart]))
                found[chart] = max(difference, found.get(chart, 0.0))
    return found


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), Path(sys.argv[3]).resolve(), sys.argv[4:])
    else:
        sys.exit(not compare(Path(sys.argv[2]), Path(sys.argv[3])))
