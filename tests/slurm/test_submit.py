"""`shardgan submit`: looks first, then hands in a job with the code and config as they are, and says so."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from project import assert_same_run

from launch.slurm.submit import submit
from pipeline import config
from pipeline.config import UserError

ODD = """it's "odd" $HOME `id` λ; &(x) *"""
KEY = "0123456789abcdef0123456789abcdef01234567"  # made up: as long as a real one
SHORT = "run.total_kimg=0.12"
TINY = ("configs/tiny.yaml", "--nodes", "2", "--gpus", "2")


@pytest.fixture(scope="module")
def submitted(project):
    """ZeRO 2 on two nodes of two (pretended) GPUs, under a name that a shell would trip over, from another
    job's shell, with GPUs asked for in the user's own way."""
    line = ("submit", *TINY, "--strategy", "zero2", "--time", "20", f"run.name={ODD}", SHORT)
    of_another_job = {"SLURM_MEM_PER_CPU": "50", "SLURM_MEM_PER_NODE": "500", "SLURM_GPUS_PER_TASK": "1"}
    options = ("--hold", "--gres=gpu:2")
    ended = project.shardgan(*line, "--", *options, WANDB_API_KEY=KEY, **of_another_job)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    job = ended.stdout.split()[1].rstrip(":")
    twice = project.shardgan(*line)  # on a busy machine it may take as long as the job would
    project.cluster.run("scontrol", "release", job)
    local = project.locally(4, "zero2", "zero2-4", SHORT)  # meanwhile
    seen = project.cluster.ended(job)
    again = project.shardgan(*line)
    return job, ended.stdout, twice, seen, local, again


def test_two_by_two_under_zero2_is_the_run_one_gets_locally(project, submitted):
    job, _, _, seen, local, _ = submitted
    assert seen["JobState"] == "COMPLETED", project.log(job)
    assert "zero2 on 4 x cpu" in project.log(job)
    assert_same_run(project.run(ODD), local)


def test_it_says_where_the_log_is_and_how_to_follow_and_stop(project, submitted):
    job, said, *_ = submitted
    assert f"Job {job}: {ODD}, zero2 on 2 nodes x 2 processes" in said
    log = project.run(ODD).path / "slurm" / "1" / f"{job}.log"
    assert f"tail -F {shlex.quote(str(log))}\n" in said and log.read_text() == project.log(job)
    assert f"scancel --batch --signal=TERM {job}" in said


def test_two_jobs_never_write_one_run(submitted):
    job, _, twice, *_ = submitted
    assert twice.returncode == 2 and f"is in the queue already, as job {job}" in twice.stderr


def test_a_finished_run_is_not_submitted(project, submitted):
    *_, again = submitted
    assert again.returncode == 0 and "is finished" in again.stdout
    assert not (project.run(ODD).path / "slurm" / "2").exists()


def test_code_and_config_are_kept_as_they_were(project, submitted):
    kept = project.run(ODD).path / "slurm" / "1"
    # The run's own file says besides what `penalty.on: auto` is for these players.
    trained = config.load(project.run(ODD).path / "config.yaml", ["penalty.on=auto"])
    assert config.load(kept / "config.yaml") == trained
    for name in ("pipeline/step.py", "launch/accelerate/zero2.yaml", "slurm/node.sh"):
        assert (kept / "code" / name).read_bytes() == (project.path / name).read_bytes()


def test_no_secret_is_in_any_file(project, submitted):
    files = [p for p in project.run(ODD).path.rglob("*") if p.is_file()]
    assert len(files) > 50
    assert [p for p in files if KEY.encode() in p.read_bytes()] == []


# Without waiting for a job


def dry_run(project, monkeypatch, *arguments: str) -> str:
    monkeypatch.chdir(project.path)
    result = CliRunner().invoke(submit, [*TINY, "--dry-run", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_dry_run_prints_what_slurm_takes_and_writes_nothing(project, monkeypatch):
    options = ("--time", "1-12", "--partition", "main", "--account", "mine", "--cpus", "6")
    name = ODD.replace("odd", "dry")
    text = dry_run(
        project, monkeypatch, *options, f"run.name={name}", "--mixed_precision", "bf16", "--compile"
    )
    assert not project.run(name).path.exists()
    rendered = project.cluster.folder / "dry.sbatch"
    rendered.write_text(text)
    assert "to start at" in project.cluster.run("sbatch", "--test-only", str(rendered)).stderr
    for line in ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=6", "--time=1-12", "--account=mine"):
        assert f"\n#SBATCH {line}\n" in text
    assert "export SHARDGAN_PRECISION=bf16\n" in text and "export SHARDGAN_COMPILE=inductor\n" in text


def test_starting_over_takes_a_free_name_once_and_for_all(project, monkeypatch):
    (project.path / "runs" / "taken").mkdir(parents=True)
    text = dry_run(project, monkeypatch, "run.name=taken", "run.resume=false")
    assert "/runs/taken-2/slurm/1/config.yaml" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--partition", "nope"], "Invalid partition name specified. Partitions here: main, urgent, "),
        (["--nodes", "3"], "Requested node configuration is not available"),
        (["--time", "soon"], "Invalid --time specification"),
        (["run.name=a%j"], "Slurm gives % and \\ in the path of a log another meaning"),
        (['run.name="a\\nb"'], "run.name: has characters that cannot be printed"),
        (['run.out="a\\nb"'], "Slurm gives % and \\ in the path of a log another meaning"),
        (
            ["data.train=https://me:secret@host/data"],
            "https://host/data: a user, password or signature in a URL",
        ),
        (["data.batch_sise=3"], "did you mean `batch_size`?"),
    ],
)
def test_what_cannot_be_submitted_is_refused_before_anything_is_written(project, arguments, said):
    ended = project.shardgan("submit", *TINY, "run.name=bad", *arguments)
    assert ended.returncode == 2 and said in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr and "secret" not in ended.stderr
    assert not project.run("bad").path.exists()


def test_without_slurm(project, monkeypatch):
    monkeypatch.chdir(project.path)
    monkeypatch.setenv("PATH", str(Path(shutil.which("true")).parent / "nowhere"))
    with pytest.raises(UserError, match="There is no `sbatch` on this machine"):
        CliRunner().invoke(submit, list(TINY), catch_exceptions=False)


def test_what_the_doctor_finds_is_shown_and_nothing_submitted(project, monkeypatch):
    monkeypatch.chdir(project.path)
    result = CliRunner().invoke(submit, [*TINY, "--dry-run", "run.name=bad", "data.batch_size=13"])
    assert result.exit_code == 2 and "cannot be divided equally" in result.stderr.replace("\n", " ")
    assert "#SBATCH" not in result.output and not project.run("bad").path.exists()
