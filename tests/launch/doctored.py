"""A job that doctor finds nothing wrong with, and jobs that differ from it."""

from __future__ import annotations

from pathlib import Path

from launch.doctor.finding import Job
from pipeline import config

FASHION = Path(__file__).parents[1] / "assets" / "fashion-mnist-500"
PENALISED = ["penalty.r1.gamma=1", "penalty.r1.interval=1", "penalty.r2.gamma=1"]
VIT = [
    f"{player}.{key}"
    for player in "GD"
    for key in ("kind=vit", "norm=batch", "width=32", "depth=4", "patch=4", "checkpoint=true")
]
GOOD = f"""
data: {{train: {FASHION}, size: 28, channels: 1, batch_size: 20}}
G: {{width: 8, norm: group}}
D: {{width: 8, norm: none}}
score: {{images: 50}}
"""


def job(*settings: str, procs: int = 2, strategy: str = "ddp", precision: str = "no", nodes: int = 1) -> Job:
    return Job(config.load("good.yaml", settings), nodes, procs, strategy, precision)
