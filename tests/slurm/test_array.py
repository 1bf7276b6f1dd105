"""`slurm/array.sbatch`: one run per line, so many at once, and one job that gathers when all have ended."""

from __future__ import annotations

import shlex

import pytest
from cluster import ENDED

from launch.slurm import jobs as slurm

NAMES = ["l2 = 0", "it's", "three", "four"]
LINES = [
    ["configs/tiny.yaml", f"run.name={name}", "run.total_kimg=0.12", f"penalty.l2={number}e-4"]
    for number, name in enumerate(NAMES)
]


@pytest.fixture(scope="module")
def array(project):
    """Four runs, two at a time, watched until the job that depends on them has ended."""
    (project.path / "runs.txt").write_text("".join(f"{shlex.join(line)}\n" for line in LINES))
    job = project.sbatch("--array=1-4%2", "--nodes=1", "slurm/array.sbatch", "runs.txt")
    gather = project.sbatch(
        f"--dependency=afterany:{job}", "slurm/gather.sbatch", "launch.slurm.gather", "runs.txt"
    )
    at_once, unfinished = set(), set()

    def watch(seen) -> bool:
        running = project.cluster.run(
            "squeue", "--noheader", "--states=RUNNING", "--format=%i"
        ).stdout.split()
        at_once.add(sum(name.startswith(f"{job}_") for name in running))
        if gather in running:
            unfinished.update(name for name in NAMES if not project.run(name).done)
        return seen["JobState"] in ENDED

    seen = project.cluster.until(gather, watch)
    return job, gather, seen, at_once, unfinished


def test_every_line_is_a_run_and_never_more_at_once_than_allowed(project, array):
    _, _, _, at_once, _ = array
    assert max(at_once) == 2
    for line in LINES:
        run = project.run(line[1].removeprefix("run.name="))
        assert run.done and run.rows[-1]["cur_nimg"] == 120
    assert (
        project.run("l2 = 0").rows[-1]["Loss/D/l2_penalty"]
        == 0
        < project.run("four").rows[-1]["Loss/D/l2_penalty"]
    )


def test_the_gathering_job_came_last_and_tells_how_they_stand(project, array):
    _, gather, seen, _, unfinished = array
    assert seen["JobState"] == "COMPLETED" and not unfinished
    table = project.log(gather).splitlines()
    assert table[0].split() == ["run", "state", "kimg"]
    assert [line.split("  ")[0] for line in table[1:]] == [f"runs/{name}" for name in NAMES]
    assert all(line.endswith("done   0.12") for line in table[1:])


def test_logs_are_one_per_run(project, array):
    job, *_ = array
    for number, name in enumerate(NAMES, 1):
        log = (project.path / f"shardgan-{job}_{number}.log").read_text()
        assert f"runs.txt, line {number}: {name}\n" in log and "Finished at kimg 0.12" in log


def test_from_python(project, monkeypatch):
    """What `shardgan select --slurm` stands on: list, batch files and code in one folder, two jobs."""
    monkeypatch.chdir(project.path)
    monkeypatch.setenv("PATH", str(project.cluster.clients()))
    folder = project.path / "runs" / "selection"
    lines = [[line[0], f"run.name=of mine {n}"] for n, line in enumerate(LINES)]
    resources = slurm.Resources(nodes=1, procs=1, cpus=2, time="10")
    job = slurm.submit_array(
        lines,
        folder,
        resources,
        name="selection",
        throttle=2,
        gather=["launch.slurm.gather", f"{folder}/runs.txt"],
    )
    project.cluster.run("scancel", job.job)  # what they would train has been seen above
    seen = project.cluster.ended(job.gather)
    assert seen["JobState"] == "FAILED", "not all runs are there to be gathered, and it says so"
    assert (folder / "runs.txt").read_text().splitlines() == list(map(shlex.join, lines))
    assert "not done" in (folder / f"{job.gather}.log").read_text()
    assert (folder / "code" / "pipeline" / "train.py").exists()
