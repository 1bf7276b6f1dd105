"""`slurm/array.sbatch`: one run per line, so many at once; and the job after the array of a selection."""

from __future__ import annotations

import shlex
import sys

import pytest
from cluster import ENDED

from launch.select import candidates as select_candidates
from launch.select import queue as select_queue
from launch.select import trials as select_trials
from launch.select.trials import LaunchOptions
from launch.slurm.jobs import Resources

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
    after = project.sbatch(f"--dependency=afterany:{job}", "--wrap=true")
    at_once: set[int] = set()

    def watch(seen) -> bool:
        running = project.cluster.run(
            "squeue", "--noheader", "--states=RUNNING", "--format=%i"
        ).stdout.split()
        at_once.add(sum(name.startswith(f"{job}_") for name in running))
        return seen["JobState"] in ENDED

    project.cluster.until(after, watch)
    return job, at_once


def test_every_line_is_a_run_and_never_more_at_once_than_allowed(project, array):
    _, at_once = array
    assert max(at_once) == 2
    for line in LINES:
        run = project.run(line[1].removeprefix("run.name="))
        assert run.done and run.rows[-1]["cur_nimg"] == 120
    assert (
        project.run("l2 = 0").rows[-1]["Loss/D/l2_penalty"]
        == 0
        < project.run("four").rows[-1]["Loss/D/l2_penalty"]
    )


def test_logs_are_one_per_run(project, array):
    job, _ = array
    for number, name in enumerate(NAMES, 1):
        log = (project.path / f"shardgan-{job}_{number}.log").read_text()
        assert f"runs.txt, line {number}: {name}\n" in log and "Finished at kimg 0.12" in log


def test_the_job_after_the_trials_collects(project, monkeypatch):
    """List, batch files and code in one folder, two jobs; the second one waits for the first."""
    monkeypatch.chdir(project.path)
    monkeypatch.setenv("PATH", str(project.cluster.clients()))
    given, grid = ["run.name=of mine", "run.total_kimg=0.12", "score.metrics=[kid]"], ["penalty.l2=0,1"]
    base, trials = select_trials.trials("configs/tiny.yaml", given, select_candidates.grid(grid), 2, 1)
    line = ["shardgan", "select", "configs/tiny.yaml", *given, "--grid", *grid, "--folds", "2", "--slurm"]
    monkeypatch.setattr(sys, "argv", line)
    folder, said = project.path / "runs" / str(base.run.name), []
    select_queue.submit(trials, LaunchOptions(), Resources(time="10"), 2, folder, said.append, {})
    job, collecting = (folder / "slurm" / "job").read_text().split()
    assert f"4 trials as job {job}, 2 at once; job {collecting}" in said[0]
    project.cluster.run("scancel", job)  # what they would train has been seen above
    seen = project.cluster.ended(collecting)
    log = (folder / "slurm" / f"{collecting}.log").read_text()
    assert seen["JobState"] == "COMPLETED" and "4 trials of 0.12 kimg" in log, log
    assert "Nothing to choose by yet" in log
    lines = (folder / "slurm" / "runs.txt").read_text().splitlines()
    assert lines == [shlex.join(trial.arguments) for trial in trials]
    assert (folder / "slurm" / "code" / "pipeline" / "train.py").exists()
