"""A job that makes room for one of a higher partition: requeued, with and without a period of grace."""

from __future__ import annotations

import pytest
from launching import rows_written
from project import assert_same_run

pytestmark = pytest.mark.long
URGENT = ("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 3")


@pytest.fixture(autouse=True)
def queue_left_empty(project):
    yield
    project.cluster.run("scancel", "--user=root")


@pytest.fixture(scope="module")
def whole(project):
    return project.locally(2, "ddp", "unpreempted")


@pytest.mark.parametrize("partition", ["gentle", "spare"])
def test_it_is_requeued_and_comes_to_the_same(project, whole, partition):
    """`gentle` tells the processes alone (SIGTERM) and waits; `spare` takes the job away at once."""
    line = ("--nodes=2", f"--partition={partition}", "slurm/train.sbatch", "configs/tiny.yaml")
    job, run = project.sbatch(*line, f"run.name={partition}"), project.run(partition)
    project.cluster.until(job, lambda _: rows_written(run.path, 2)())
    urgent = project.sbatch(*URGENT)
    project.cluster.until(job, lambda seen: seen["Restarts"] == "1")
    assert partition == "spare" or "Stopped at kimg" in project.log(job)
    assert project.cluster.ended(urgent)["JobState"] == "COMPLETED"
    assert project.cluster.ended(job)["JobState"] == "COMPLETED", project.log(job)
    assert_same_run(run, whole)
    assert project.left_behind() == []


def test_one_element_of_an_array_is_requeued_alone(project):
    """Also the one whose number is that of the array as well, which is the last."""
    lines = (f"configs/tiny.yaml run.name=element-{n} run.total_kimg=24\n" for n in (1, 2))
    (project.path / "elements.txt").write_text("".join(lines))
    job = project.sbatch("--array=1-2", "--nodes=1", "slurm/array.sbatch", "elements.txt")
    runs = [project.run(f"element-{n}").path for n in (1, 2)]
    project.cluster.until(f"{job}_2", lambda _: all(rows_written(path, 2)() for path in runs))
    assert project.cluster.job(f"{job}_2")["JobId"] == job
    project.preempt(f"{job}_2")
    project.cluster.until(f"{job}_2", lambda seen: seen["Restarts"] == "1")
    other = project.cluster.job(f"{job}_1")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")


def test_processes_that_someone_else_stopped_are_not_started_again(project):
    line = ("--nodes=2", "slurm/train.sbatch", "configs/tiny.yaml", "run.name=stopped", "run.total_kimg=24")
    job = project.sbatch(*line)
    project.cluster.until(job, lambda _: rows_written(project.run("stopped").path, 2)())
    project.cluster.run("scancel", "--signal=TERM", job)  # not the batch script
    seen = project.cluster.ended(job)
    assert (seen["JobState"], seen["Restarts"]) == ("FAILED", "0") and project.run("stopped").stopped_at
