"""One cluster for all tests here, and a copy of the project on it, as a user would have one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster, missing
from launching import ROOT, RunFolder

# Large enough to be caught at work, small enough to be done in seconds.
TINY = f"""
run: {{total_kimg: 2.4, tick_kimg: 0.12, checkpoint_kimg: 0.24, keep: 99}}
data: {{train: {ROOT}/tests/assets/fashion-mnist-500, size: 28, channels: 1, batch_size: 12, workers: 1}}
G: {{width: 8, norm: none, z_dim: 32}}
D: {{width: 8, norm: none}}
penalty: {{G: {{l2: 1.0e-3}}, D: {{l2: 2.0e-3}}}}
ema: {{kimg: 0.05}}
score: {{metrics: []}}
track: {{wandb: false}}
"""


@dataclass(frozen=True)
class Project:
    """A checkout of the project in a user's folder, on a file system that all nodes see."""

    cluster: Cluster
    path: Path

    def sbatch(self, *arguments: str, **environment: str) -> str:
        """`sbatch …` typed in the project's folder; returns the job's id."""
        return self.cluster.sbatch(*arguments, cwd=self.path, **(self.environment | environment))

    @property
    def environment(self) -> dict[str, str]:
        return {"SHARDGAN_VENV": sys.prefix, "SHARDGAN_LOCAL": str(self.cluster.local)}

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.path / "runs" / name)

    def log(self, job: str) -> str:
        return Path(self.cluster.job(job)["StdOut"]).read_text(errors="replace")

    def left_behind(self) -> list[str]:
        """Processes on any node."""
        return [line for name in ("n1", "n2") for line in self.cluster.processes(name)]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def project(cluster: Cluster) -> Project:
    path = cluster.folder / "project"
    for name in ("pipeline", "launch", "slurm"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (path / "configs").mkdir()
    (path / "configs" / "tiny.yaml").write_text(TINY)
    return Project(cluster, path)
