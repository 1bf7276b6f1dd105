"""`shardgan doctor --live` inside an allocation: the nodes meet, and the one that differs is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import Project

pytestmark = pytest.mark.long


@pytest.fixture
def doctor(project: Project) -> Callable[[], subprocess.CompletedProcess[str]]:
    """Called on the head, as a user does within salloc; the nodes see the project on their own disks."""
    local = project.cluster.local
    for name in ("head", "n1", "n2"):
        disk = project.cluster.folder / f"local-{name}" / "project"
        shutil.copytree(project.path, disk)

    def call() -> subprocess.CompletedProcess[str]:
        asked = "doctor configs/tiny.yaml --nodes 2 --gpus 2 --live"
        salloc = "salloc --nodes=2 --ntasks-per-node=1 --cpus-per-task=2"
        line = f"cd {local}/project && exec {salloc} {sys.executable} -m launch.cli {asked}"
        return project.cluster.run(
            "bash", "-c", line, check=False, PYTHONPATH=f"{local}/project", COLUMNS="150",
            ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1", SHARDGAN_CACHE=str(project.cluster.folder / "cache"),
        )  # fmt: skip

    return call


def test_two_nodes(project: Project, doctor: Callable[[], subprocess.CompletedProcess[str]]) -> None:
    fine = doctor()
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert "n1, n2: code, versions, config and data are the same on all" in fine.stdout
    assert "n2: ranks 2 to 3" in fine.stdout
    assert "4 ranks add up 64 MiB" in fine.stdout
    other = project.cluster.folder / "local-n2" / "project" / "launch" / "smooth.py"
    other.write_text("# changed\n")
    differing = doctor()
    assert differing.returncode == 2, differing.stdout + differing.stderr
    assert "n2 has other code than n1" in differing.stdout
    (other.parent / "doctor_worker.py").write_text("import no_such_thing\n")
    broken = doctor()
    assert broken.returncode == 2, broken.stdout + broken.stderr
    assert "No module named 'no_such_thing'" in broken.stdout
    assert not project.left_behind()
