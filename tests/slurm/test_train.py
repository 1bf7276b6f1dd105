"""`sbatch slurm/train.sbatch`, as it is, on two nodes: what is trained is what is trained without Slurm."""

from __future__ import annotations

import pytest
from launching import rows_written
from project import assert_same_run

TICK, EPOCH = 120, 450  # images


@pytest.fixture(scope="module")
def preempted(project):
    """Two nodes of one process; asked to make room as soon as there are two rows, and again if it stopped
    where a tick or an epoch ends. W&B is on."""
    job = project.sbatch(
        "--nodes=2", "slurm/train.sbatch", "configs/tiny.yaml", "run.name=ddp-2", "track.wandb=true"
    )
    run = project.run("ddp-2")
    stops: list[int] = []
    while not stops or not (stops[-1] % TICK and stops[-1] % EPOCH):
        rows = 2 + (len(run.rows) if stops else 0)
        project.cluster.until(job, lambda _, rows=rows: rows_written(run.path, rows)())
        project.preempt(job)
        project.cluster.until(job, lambda seen: seen["Restarts"] == str(len(stops) + 1))
        stops.append(run.stopped_at)
    local = project.locally(2, "ddp", "ddp-2")  # while the job waits to start again
    return job, project.cluster.ended(job), stops, local


def test_preempted_saved_requeued_and_resumed_bit_identical(project, preempted):
    _, seen, stops, local = preempted
    assert seen["JobState"] == "COMPLETED" and seen["Restarts"] == str(len(stops))
    assert_same_run(project.run("ddp-2"), local)


def test_the_log_tells_both_halves(project, preempted):
    job, _, stops, _ = preempted
    log, parts = project.log(job), len(stops) + 1
    assert log.count("ddp; nodes: 2, processes on each: 1,") == parts == log.count("ddp on 2 x cpu")
    assert "Stopped at kimg" in log and "requeue 1 of at most 100" in log and "Finished at kimg 2.4" in log
    assert "warning: n1: 1 CPU for 1 process with 1 loader each" in log, "as Slurm has it if not asked"
    assert "Traceback" not in log and "error" not in log.replace("slurmstepd-n1: error: ***", "")


def test_wandb_is_offline_on_the_nodes_and_goes_on_as_one_run(project, preempted):
    parts = sorted(project.run("ddp-2").path.glob("wandb/offline-run-*"))
    assert len(parts) == len(preempted[2]) + 1 and len({part.name.rsplit("-", 1)[1] for part in parts}) == 1


def test_caches_are_on_each_nodes_own_disk(cluster, preempted):
    for node in ("n1", "n2"):
        assert (cluster.folder / f"local-{node}" / "tmp").is_dir()


def test_no_process_is_left(project, preempted):
    assert project.left_behind() == []


def test_a_longer_training_that_fails_is_not_done(project, preempted):
    """The marker of the shorter one is still there."""
    run = project.run("ddp-2")
    for file in run.path.glob("checkpoints/*/*.safetensors"):
        file.write_bytes(b"")
    line = ("slurm/train.sbatch", "configs/tiny.yaml", "run.name=ddp-2", "track.wandb=true")
    longer = project.sbatch("--nodes=2", *line, "run.total_kimg=9")
    assert project.cluster.ended(longer)["JobState"] == "FAILED", project.log(longer)
    assert run.done and "checkpoint" in project.log(longer)
    again = project.sbatch("--nodes=2", *line)
    assert project.cluster.ended(again)["JobState"] == "COMPLETED", project.log(again)
