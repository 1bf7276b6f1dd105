"""`shardgan select --slurm`: trials as an array of jobs, the table by the job that comes after them."""

from __future__ import annotations

import json

import pytest


def test_an_array_beyond_the_cluster_s_limit_names_it(project):
    select = ["select", "configs/tiny.yaml", "run.name=many", "score.metrics=[kid]"]
    select += ["score.images=16", "--grid", "penalty.l2=0", "--folds", "3", "--seeds", "10"]
    ended = project.shardgan(*select, "--slurm")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    said = "Invalid job array specification. Arrays here have fewer than 30 jobs (MaxArraySize)."
    assert said in " ".join(ended.stderr.split()), ended.stderr


@pytest.mark.long
def test_trials_are_jobs_and_the_last_job_makes_the_table(project):
    arguments = [
        "select",
        "configs/tiny.yaml",
        "run.name=lambda",
        "run.total_kimg=0.12",
        "score.metrics=[kid]",
    ]
    arguments += ["score.images=16", "--grid", "penalty.l2=0,1e-3", "--folds", "2", "--jobs", "2", "--slurm"]
    submitted = project.shardgan(*arguments)
    assert submitted.returncode == 0, submitted.stderr
    folder = project.path / "runs" / "lambda"
    job, gather = (folder / "slurm" / "job").read_text().split()
    assert "4 trials" in submitted.stdout and job in submitted.stdout

    again = project.shardgan(*arguments)
    assert again.returncode == 2 and f"Job {job} of this selection is" in again.stderr

    assert project.cluster.ended(gather)["JobState"] == "COMPLETED"
    table = json.loads((folder / "table.json").read_text())
    assert [row["finished"] for row in table["rows"]] == [2, 2] and table["one_standard_error"]
    assert (folder / "curve.png").exists() and "penalty.l2" in (folder / f"slurm/{gather}.log").read_text()

    done = project.shardgan(*arguments)
    assert done.returncode == 0 and "4 of them done" in done.stdout


@pytest.mark.long
def test_a_search_proposes_its_batches_between_arrays(project):
    """Each batch waits as an array of jobs, whose trials the job before it lists."""
    search = ["select", "configs/tiny.yaml", "run.total_kimg=0.12", "score.metrics=[kid]"]
    search += ["score.images=16", "--search", "tpe", "--trials", "3", "--grid", "penalty.l2=1e-4..1"]
    search += ["--folds", "2", "--jobs", "2"]
    submitted = project.shardgan(*search, "run.name=searched", "--slurm")
    assert submitted.returncode == 0, submitted.stderr
    folder = project.path / "runs" / "searched"
    jobs = (folder / "slurm" / "job").read_text().split()
    assert len(jobs) == 4 and "6 trials" in submitted.stdout
    for job in jobs[1::2]:
        assert project.cluster.ended(job)["JobState"] == "COMPLETED", project.log(job)
    table = json.loads((folder / "table.json").read_text())
    assert [row["finished"] for row in table["rows"]] == [2] * 3 and table["rule"] == "search"
