"""What cannot work ends at once, on all nodes, with one message that names the node and the remedy."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from launching import FASHION

SUBMIT = ("--nodes=2", "slurm/train.sbatch", "configs/tiny.yaml")


@pytest.fixture
def refused(project):
    """Submit, and read the log of a job that is to fail before any training starts."""

    def submit(
        *settings: str, options: tuple[str, ...] = (), expected_processes: int = 0, **environment: str
    ) -> str:
        job = project.sbatch(*options, *SUBMIT, "run.name=refused", *settings, **environment)
        seen = project.cluster.ended(job)
        log = project.log(job)
        assert (seen["JobState"], seen["ExitCode"]) == ("FAILED", "2:0"), log
        assert "Traceback" not in log and log.count("\nerror: ") + log.startswith("error: ") == 1, log
        assert len(project.left_behind()) == expected_processes
        assert not (project.run("refused").path / "metrics.jsonl").exists()
        return log

    return submit


def test_a_node_with_other_versions(project, refused):
    """n2 has another accelerate, on its own disk, first on its path."""
    other = project.cluster.folder / "local-n2" / "site" / "accelerate-1.2.3.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 1.2.3\n")
    log = refused(PYTHONPATH=str(project.cluster.local / "site"))
    assert "error: n2: other versions than n1: accelerate 1.2.3 (not 1." in log
    assert "Install the same everywhere" in log


def test_a_node_that_does_not_see_the_data(project, refused):
    shutil.copytree(FASHION, project.cluster.folder / "local-n1" / "data")
    log = refused(f"data.train={project.cluster.local}/data")
    assert f"error: n2: There are no shards at {project.cluster.local}/data" in log
    assert "Put the data where all nodes see it (data.train)" in log


def test_nodes_with_other_numbers_of_gpus(refused):
    """Slurm may spread --gpus as it likes: here 3 and 1."""
    log = refused(options=("--gpus=4",))
    assert "error: n2: 1 process here, 3 on n1" in log and "Ask for them by --gpus-per-node" in log


def test_a_run_folder_on_one_nodes_own_disk(project, refused):
    log = refused(f"run.out={project.cluster.local}/runs")
    assert f"error: n2: the run folder {project.cluster.local}/runs/refused is not" in log
    assert "Set run.out" in log


def test_no_virtual_environment(refused):
    log = refused(SHARDGAN_VENV="/nowhere/venv")
    assert "error: n1: no virtual environment at /nowhere/venv" in log and "set SHARDGAN_VENV" in log


def test_a_port_in_use(project, refused):
    listen = (
        "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); input()"
    )
    other = subprocess.Popen(
        [*project.cluster.machines["n1"].enter(), "python3", "-c", listen],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    port = other.stdout.readline().strip()
    log = refused(SHARDGAN_PORT=port, expected_processes=1)
    other.communicate("\n")
    assert f"error: n1: port {port} is in use. Set SHARDGAN_PORT to another one" in log


def test_settings_that_do_not_fit(refused):
    log = refused("data.batch_size=13")
    assert "error: n1: data.batch_size=13 cannot be divided equally over 2 processes" in log


def test_starting_over_is_not_for_jobs_that_requeue(refused):
    assert "error: n1: run.resume=false would start over at every requeue" in refused("run.resume=false")


def test_a_strategy_that_there_is_not(refused):
    assert "error: n1: SHARDGAN_STRATEGY=zero4: there is no such strategy" in refused(
        SHARDGAN_STRATEGY="zero4"
    )


def test_nodes_of_one_process_each_for_hsdp(refused):
    assert "error: n1: hsdp: one process per node has nothing to share" in refused(SHARDGAN_STRATEGY="hsdp")


def test_without_slurm(project):
    ended = subprocess.run(
        ["bash", "slurm/train.sbatch", "configs/tiny.yaml"],
        check=False, cwd=project.path, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 2 and "error: this is a job for sbatch: sbatch --nodes N" in ended.stderr
