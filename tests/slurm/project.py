"""A copy of the project on the cluster, as a user would have one, and what its runs are compared with."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster
from launching import BIN, ROOT, RunFolder, accelerate, identical, train, without_clocks

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
        """What a user's shell would have; one thread each, as everywhere in the tests."""
        return {
            "SHARDGAN_VENV": sys.prefix,
            "SHARDGAN_LOCAL": str(self.cluster.local),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "1",  # the nodes' GPUs are pretended
        }

    def shardgan(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command, typed on the head in the project's folder."""
        here = {"PYTHONPATH": str(self.path), **self.environment, **environment}
        return self.cluster.run(str(BIN / "shardgan"), *arguments, cwd=self.path, check=False, **here)

    def locally(self, world: int, strategy: str, name: str, *settings: str) -> RunFolder:
        """The tiny config trained on this machine, without Slurm: what a job is compared with."""
        out = self.path / "local"
        line = ["configs/tiny.yaml", f"run.name={name}", f"run.out={out}", *settings]
        return train(accelerate(world, *line, file=f"{strategy}.yaml"), out / name, cwd=self.path)

    def preempt(self, job: str) -> None:
        """What Slurm does before the time limit, or to make room."""
        self.cluster.run("scancel", "--signal=USR1", "--batch", job)

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.path / "runs" / name)

    def log(self, job: str) -> str:
        return Path(self.cluster.job(job)["StdOut"]).read_text(errors="replace")

    def left_behind(self) -> list[str]:
        """Processes on any node."""
        return [line for name in ("n1", "n2") for line in self.cluster.processes(name)]


def assert_same_run(here: RunFolder, there: RunFolder) -> None:
    """The same weights bit for bit, and the same rows: so the same samples in the same order, too."""
    assert here.done and there.done
    assert identical(here.exported(), there.exported())
    assert list(map(without_clocks, here.rows)) == list(map(without_clocks, there.rows))
