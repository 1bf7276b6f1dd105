"""`shardgan doctor --live` inside an allocation: the nodes meet, and the one that differs is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from project import Project

pytestmark = pytest.mark.long


@pytest.fixture
def doctor(project: Project) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Called on the head, as a user does within salloc; the nodes see the project on their own disks."""
    local = project.cluster.local
    for name in ("head", "n1", "n2"):
        disk = project.cluster.folder / f"local-{name}" / "project"
        shutil.copytree(project.path, disk)

    def call(nodes: int = 2, options: str = "--cpus-per-task=2") -> subprocess.CompletedProcess[str]:
        asked = f"doctor configs/tiny.yaml --nodes {nodes} --gpus 2 --live"
        salloc = f"salloc --nodes={nodes} --ntasks-per-node=1 {options}"
        line = f"cd {local}/project && exec {salloc} {sys.executable} -m launch.cli {asked}"
        return project.cluster.run(
            "bash", "-c", line, check=False, PYTHONPATH=f"{local}/project", COLUMNS="150",
            ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1", SHARDGAN_CACHE=str(project.cluster.folder / "cache"),
        )  # fmt: skip

    yield call
    for name in ("head", "n1", "n2"):
        shutil.rmtree(project.cluster.folder / f"local-{name}" / "project")


def test_two_nodes(project: Project, doctor: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    fine = doctor()
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert "n1, n2: code, versions, config and data are the same on all" in fine.stdout
    assert "n2: ranks 2 to 3" in fine.stdout
    assert "4 ranks add up 64 MiB" in fine.stdout
    other = project.cluster.folder / "local-n2" / "project" / "launch" / "doctor" / "worker.py"
    worker = other.read_text()
    other.write_text(f"{worker}# changed\n")
    differing = doctor()
    assert differing.returncode == 2, differing.stdout + differing.stderr
    assert "n2 has other code than n1" in differing.stdout
    other.write_text(worker.replace("import torch\n", "import no_such_thing\n", 1))
    broken = doctor()
    assert broken.returncode == 2, broken.stdout + broken.stderr
    assert "No module named 'no_such_thing'" in broken.stdout
    assert not project.left_behind()


def test_one_node_that_was_asked_for_no_cpus(
    project: Project, doctor: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The places are those of the node, not of the machine that this is called on."""
    said = doctor(1, "--exclusive --nodelist=n2")
    assert said.returncode == 0, said.stdout + said.stderr
    assert "n2: the processes meet" in said.stdout and "2 ranks add up 64 MiB" in said.stdout
    few = doctor(1, "--nodelist=n2")
    assert few.returncode == 0, few.stdout + few.stderr
    assert "1 CPU per node for 2 processes with 1 loader each" in few.stdout
    assert "Ask for --cpus-per-task=4" in few.stdout
