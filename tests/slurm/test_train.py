"""`sbatch slurm/train.sbatch`, as it is, on two nodes: what is trained is what is trained without Slurm."""

from __future__ import annotations

import pytest
from launching import rows_written
from project import assert_same_run

TICK, EPOCH = 120, 450  # images


@pytest.fixture(scope="module")
def preempted(project):
    """Two nodes of one process; asked to make room as soon as there are two rows. W&B is on."""
    job = project.sbatch(
        "--nodes=2", "slurm/train.sbatch", "configs/tiny.yaml", "run.name=ddp-2", "track.wandb=true"
    )
    run = project.run("ddp-2")
    project.cluster.until(job, lambda _: rows_written(run.path, 2)())
    project.preempt(job)
    project.cluster.until(job, lambda seen: seen["Restarts"] == "1")
    stopped_at = run.stopped_at
    local = project.locally(2, "ddp", "ddp-2")  # while the job waits to start again
    return job, project.cluster.ended(job), stopped_at, local


def test_preempted_saved_requeued_and_resumed_bit_identical(project, preempted):
    _, seen, stopped_at, local = preempted
    assert seen["JobState"] == "COMPLETED" and seen["Restarts"] == "1"
    assert stopped_at % TICK and stopped_at % EPOCH, "not in mid-tick and mid-epoch"
    assert_same_run(project.run("ddp-2"), local)


def test_the_log_tells_both_halves(project, preempted):
    log = project.log(preempted[0])
    assert log.count("ddp on 2 nodes x 1 processes") == 2 == log.count("ddp on 2 x cpu")
    assert "Stopped at kimg" in log and "requeue 1 of at most 100" in log and "Finished at kimg 2.4" in log
    assert "warning: n1: 1 CPUs for 1 processes with 1 loaders each" in log, "as Slurm has it if not asked"
    assert "Traceback" not in log and "error" not in log.replace("slurmstepd-n1: error: ***", "")


def test_wandb_is_offline_on_the_nodes_and_goes_on_as_one_run(project, preempted):
    parts = sorted(project.run("ddp-2").path.glob("wandb/offline-run-*"))
    assert len(parts) == 2 and len({part.name.rsplit("-", 1)[1] for part in parts}) == 1


def test_caches_are_on_each_nodes_own_disk(cluster, preempted):
    for node in ("n1", "n2"):
        assert (cluster.folder / f"local-{node}" / "tmp").is_dir()


def test_no_process_is_left(project, preempted):
    assert project.left_behind() == []
