"""What is written for Slurm and how it is called, without a cluster."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from launching import FASHION, ROOT
from PIL import Image

from launch.select import candidates as select_candidates
from launch.select import queue as select_queue
from launch.select import select
from launch.select import trials as select_trials
from launch.select.trials import LaunchOptions
from launch.slurm import index_copies, nodes
from launch.slurm import jobs as slurm
from launch.slurm.submit import submit
from pipeline import config
from pipeline.config import Config, Data, UserError
from pipeline.data.index import load_index
from pipeline.data.record import places

URL = "https://me:secret@host/data"


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Slurm that takes every job but those with the option $REFUSES, and writes down what it is asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(f"data: {{train: {FASHION}, size: 28, channels: 1, workers: 3}}\n")
    folder, note = tmp_path / "slurm", tmp_path / "said"
    folder.mkdir()
    for name in ("sbatch", "scancel", "sinfo"):
        (folder / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >> {note}\n'
            '[[ -z "$REFUSES" || "$*" != *$REFUSES* ]] ||\n'
            '{ echo "sbatch: error: too many jobs" >&2; exit 1; }\n'
            '[[ -z "$INTERRUPTS" || "$*" != *$INTERRUPTS* ]] || kill -INT $PPID\n'
            'echo "${REPLY_OF_SBATCH:-17}"\n'
        )
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda: note.read_text().splitlines() if note.exists() else []


def submit_trials(name: str = "a", *settings: str) -> None:
    given = [f"run.name={name}", "run.out=runs", *settings]
    arms = select_candidates.grid(["penalty.l2=0,1"])
    base, trials = select_trials.trials("tiny.yaml", given, arms, 2, 1)
    folder, resources = Path("runs") / str(base.run.name), slurm.Resources(time="10", partition="long")
    select_queue.submit(trials, LaunchOptions(), resources, 1, folder, lambda _: None, {})


def test_trials_whose_job_after_them_is_refused_do_not_run(said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSES", "--dependency")
    with pytest.raises(UserError, match=r"too many jobs.*submitted before it, job 17, is cancelled"):
        submit_trials()
    calls = [line.split()[:2] for line in said()]
    assert [call[0] for call in calls] == ["sbatch"] * 4 + ["scancel"] and calls[-1] == ["scancel", "17"]
    assert [call[1] for call in calls[:2]] == ["--test-only"] * 2, "both are checked before one is submitted"


def test_trials_whose_submission_is_interrupted_do_not_run(said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERRUPTS", "/job.sbatch")
    with pytest.raises(KeyboardInterrupt):
        submit_trials()
    assert said()[-1] == "scancel 17" and said()[-2].endswith("/job.sbatch")
    assert Path("runs/a/slurm/job").read_text() == "17\n"


def test_jobs_read_copies_of_what_the_command_names(said, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files may be edited, and published configs are not where a job's code is. The selection keeps the
    name that follows from the config's, not its copy's."""
    Path("arms.yaml").write_text("none: []\nsome: [penalty.l2=1]\n")
    words = ["select", "--slurm", "--arms=arms.yaml", "tiny.yaml", "--", "run.out=runs", "score.images=20"]
    monkeypatch.setattr("sys.argv", ["shardgan", *words])
    ended = CliRunner().invoke(select, sys.argv[2:])
    assert ended.exit_code == 0, ended.output
    place = Path("runs/tiny/slurm").absolute()
    for file, copy in (("tiny.yaml", "config.yaml"), ("arms.yaml", "arms.yaml")):
        assert (place / copy).read_text() == Path(file).read_text()
    lines = (place / "runs.txt").read_text().splitlines()
    assert len(lines) == 6 and all(line.startswith(f"{place}/config.yaml ") for line in lines)
    collects = f"select --collect --arms={place}/arms.yaml {place}/config.yaml -- run.out=runs"
    assert f"{collects} score.images=20 run.name=tiny" in (place / "collect.sbatch").read_text()


def test_a_line_break_would_be_another_line(said) -> None:
    with pytest.raises(UserError, match="has a line break"):
        submit_trials("a", 'track.tags=["a\nb"]')
    assert not said() and not Path("runs").exists()


def test_what_is_asked_for_wins_over_the_users_variables(said) -> None:
    submit_trials()
    array, after = said()[-2:]
    for option in ("--time=10", "--partition=long", "--job-name=a", "--cpus-per-task=", "--output="):
        assert option in array and option in after
    assert "--array=1-4%1" in array and "--dependency=afterany:17" in after and "--array" not in after
    assert "--account" not in array
    for option in ("--requeue", "--signal=B:USR1@120", "--open-mode=append"):
        assert option in array and option in after


def test_no_secret_is_in_the_files_of_an_array(said) -> None:
    with pytest.raises(UserError, match="a user, password or signature in a URL") as refused:
        submit_trials("a", f"data.train={URL}")
    assert "secret" not in str(refused.value) and not said() and not Path("runs").exists()


def test_the_log_of_an_array_names_the_run_and_tells_no_secret(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "train.sbatch").write_text('printf "<%s>" "$@" > arguments\n')
    (tmp_path / "runs.txt").write_text(
        f"tiny.yaml 'run.name=of mine' data.train={URL}\ntiny.yaml 'run.name=\n"
    )

    def element(number: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "slurm" / "array.sbatch"), "runs.txt"],
            check=False,
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "SHARDGAN_CODE": str(tmp_path),
                "SLURM_ARRAY_TASK_ID": f"{number}",
            },
            capture_output=True,
            text=True,
        )

    assert element(1).stdout == "runs.txt, line 1: of mine\n"
    assert (tmp_path / "arguments").read_text() == f"<tiny.yaml><run.name=of mine><data.train={URL}>"
    written = (tmp_path / "runs.txt").read_bytes()
    (tmp_path / "runs.txt").write_bytes(b"tiny.yaml\r\n" + written)  # the first line by an editor on Windows
    element(1)
    assert (tmp_path / "arguments").read_text() == "<tiny.yaml>"
    (tmp_path / "runs.txt").write_bytes(written)
    assert (element(2).returncode, element(2).stderr) == (
        2,
        "error: runs.txt, line 2: a quote is not closed\n",
    )


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--procs", "4"], ["--procs 4 need a GPU each, but --gpus is 2."]),
        (["--cpus", "2"], ["warning: --cpus 2 for 2 processes with 3 loaders each", "all shards are read …"]),
        (["--check", "quick"], ["Checking everything first …"]),
    ],
)
def test_what_submit_says(said, arguments: list[str], texts: list[str]) -> None:
    line = ["tiny.yaml", "--nodes", "1", "--gpus", "2", "--dry-run", *arguments]
    result = CliRunner().invoke(submit, line)
    assert all(text in result.stderr + str(result.exception) for text in texts)


def test_nothing_that_the_check_sets_here_reaches_the_job(said, tmp_path, monkeypatch) -> None:
    """Such as the socket of this machine's W&B service, and a folder for compiled code."""
    (Path(os.environ["PATH"].split(":")[0]) / "sbatch").write_text(
        f"#!/bin/bash\nenv > {tmp_path}/env\necho 17\n"
    )
    line = ["tiny.yaml", "track.wandb=true", "--nodes", "1", "--gpus", "0", "--check", "quick", "--compile"]
    before = {*os.environ}
    CliRunner().invoke(submit, line, catch_exceptions=False)
    there = {name.partition("=")[0] for name in (tmp_path / "env").read_text().splitlines()}
    of_shells = {"_", "SHLVL", "PWD", "OLDPWD", "COLUMNS", "LINES"}
    assert "PATH" in there and there - before <= of_shells, there - before


def test_a_dry_run_of_images_that_are_not_prepared(said, tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    line = [str(folder), "--nodes", "1", "--gpus", "0", "--dry-run"]
    ended = CliRunner().invoke(submit, line, catch_exceptions=False)
    assert ended.exit_code == 0 and ended.stdout.startswith("#!/usr/bin/env bash")
    assert (
        "not checked, as the images are not prepared yet" in ended.stderr and not (tmp_path / "runs").exists()
    )


def test_the_user_may_forbid_requeues(said) -> None:
    batch = slurm.render("a", Path("runs"), ["train.sbatch"], slurm.Resources(), {"no-requeue": None})
    assert "--no-requeue" in batch.options and "--requeue" not in batch.options
    assert "#SBATCH --no-requeue" in batch.text and "#SBATCH --requeue" not in batch.text


def test_what_follows_two_dashes_goes_to_sbatch(said, monkeypatch) -> None:
    line = ["tiny.yaml", "--nodes", "1", "--gpus", "2", "--dry-run", "--check", "quick", "--"]
    line += ["--gpus-per-node=a100:2", "--mem", "64G", "-q", "high", "--exclusive", "--comment=a b"]
    monkeypatch.setattr("sys.argv", ["/home/me/shardgan", "submit", f"data.train={URL}", "a\nb"])
    text = CliRunner().invoke(submit, line, catch_exceptions=False).stdout
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    given = ["--gpus-per-node=a100:2", "--mem=64G", "--qos=high", "--exclusive", '--comment="a b"']
    assert [d for d in directives if d.startswith("--gpus")] == given[:1] and {*given} <= {*directives}
    made = text.splitlines()[1]
    assert re.fullmatch(r"# Made by shardgan \S+ for \S+: shardgan submit \S+ \S+", made), made
    assert "secret" not in text


@pytest.mark.parametrize(
    ("given", "left_out"),
    [("gres", "gpus-per-node"), ("gpus-per-task", "gpus-per-node"), ("cpus-per-gpu", "cpus-per-task")],
)
def test_what_slurm_takes_one_of_is_given_once(said, given: str, left_out: str) -> None:
    resources = slurm.Resources(gpus=2, cpus=4)
    plain = slurm.render("a", Path("runs"), ["train.sbatch"], resources)
    batch = slurm.render("a", Path("runs"), ["train.sbatch"], resources, {given: "x"})
    names = [option.partition("=")[0].removeprefix("--") for option in batch.options]
    assert given in names and left_out not in names and len(names) == len(plain.options)


def test_a_job_is_known_by_its_number_alone(said, monkeypatch) -> None:
    """Some sites greet in every answer, and a federation adds the cluster's name."""
    monkeypatch.setenv("REPLY_OF_SBATCH", "Welcome to the cluster 2!\n--> OK\n519605;east")
    (Path(os.environ["PATH"].split(":")[0]) / "sbatch").write_text(
        '#!/bin/bash\nprintf "$REPLY_OF_SBATCH\\n"\n'
    )
    batch = slurm.render("a", Path("runs"), ["train.sbatch"], slurm.Resources())
    assert slurm.submit(Path("runs"), batch) == "519605"


def test_a_users_filter_hides_no_job(said, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "COMPLETED")
    squeue = Path(os.environ["PATH"].split(":")[0]) / "squeue"
    squeue.write_text('#!/bin/bash\necho "${SQUEUE_STATES:-RUNNING}"\n')
    squeue.chmod(0o755)
    assert slurm.state("17") == "RUNNING"


def test_code_in_a_path_with_a_colon_is_refused(said) -> None:
    """Where PYTHONPATH has its next folder."""
    with pytest.raises(UserError, match="with a colon"):
        slurm.render("a", Path("runs/12:30"), ["train.sbatch"], slurm.Resources())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mem=64G"], r"'mem=64G', after --, is no option of sbatch"),
        (["--mem=64G", "too"], r"'too', after --, is no option"),
        (["--output=a.log"], "--output, after --, would break the job"),
        (["-N", "4"], "--nodes, after --, would break the job"),
        (["--out=a.log"], "--out, after --, would break the job"),
        (["--test-only"], "--test-only, after --, would break the job"),
        (["--quiet"], "--quiet, after --, would break the job"),
        (["-Z"], "write sbatch's long option"),
    ],
)
def test_what_sbatch_would_not_take(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        slurm.parse_options(words)


def test_gpus_that_were_not_asked_for_are_not_used(said) -> None:
    texts = [slurm.render("a", Path("f"), ["s"], slurm.Resources(gpus=gpus)).text for gpus in (0, 1)]
    assert ["ACCELERATE_USE_CPU" in text for text in texts] == [True, False]


# nodes


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    (tmp_path / "tiny.yaml").write_text(f"data: {{train: {FASHION}, size: 28, channels: 1, workers: 3}}\n")
    return config.load(tmp_path / "tiny.yaml", [f"run.out={tmp_path}/runs", "run.name=r"])


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {
        "SLURMD_NODENAME": "n1",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": "2",
        "SHARDGAN_PROCS": "2",
        "SHARDGAN_CPUS": "1",
    }
    for name, value in here.items():
        monkeypatch.setenv(name, value)


def test_few_cpus_give_a_warning(settings: Config, job: None, capsys: pytest.CaptureFixture[str]) -> None:
    _, description, *_ = nodes.plan(settings, 2)
    assert description.name == "nodes-7-2.json", "what a node still sees of the start before is not this"
    assert "warning: n1: 1 CPU for 2 processes with 3 loaders" in (warned := capsys.readouterr().err)
    assert "Ask for --cpus-per-task=8." in warned


def test_nodes_whose_names_in_slurm_are_no_host_names(
    settings: Config, job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "no-such-host.invalid")
    assert nodes.plan(settings, 2)[2] == socket.gethostname()
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    _, description, host, *_ = nodes.plan(settings, 2)
    assert host == "localhost"
    monkeypatch.setenv("SHARDGAN_HEAD", host)
    nodes.check(settings, description)
    monkeypatch.setenv("SHARDGAN_HEAD", "no-such-host.invalid")
    nodes.check(settings, description)  # one node has nobody to meet
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(UserError, match=r"^no address of no-such-host\.invalid is known here, the first"):
        nodes.check(settings, description)


def test_a_file_system_that_lags(settings: Config, job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first there is half of the description to be seen, and later nothing but that."""
    _, description, *_ = nodes.plan(settings, 2)
    whole = description.read_text()
    description.write_text(whole[:20])
    later = threading.Timer(0.5, lambda: description.write_text(whole))
    later.start()
    nodes.check(settings, description)
    later.join()
    description.write_text("")
    monkeypatch.setattr(nodes, "_SEEN_WITHIN", 0.3)
    with pytest.raises(UserError, match="is incomplete here"):
        nodes.check(settings, description)


def test_gpus_that_torch_cannot_use(settings: Config, job: None, gpus_here: Callable[[int], None]) -> None:
    _, description, *_ = nodes.plan(settings, 2)
    nodes.check(settings, description)  # on CPUs, as the environment of the tests asks for
    gpus_here(1)
    with pytest.raises(UserError, match=r"2 processes, but torch \S+ can use 1 GPU here\. Ask for as many"):
        nodes.check(settings, description)


# the index


def test_an_index_of_the_cache_goes_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of data that cannot be written: nothing of it lies beside them."""
    bare = tmp_path / "data"
    bare.mkdir()
    for shard in FASHION.glob("*.tar"):
        (bare / shard.name).symlink_to(shard)
    data = replace(Data(), train=str(bare))
    known = load_index(str(bare))
    login, node = tmp_path / "login", tmp_path / "node"
    monkeypatch.setenv("SHARDGAN_CACHE", str(login))
    index_copies.keep(data, tmp_path / "kept")
    assert not (tmp_path / "kept").exists(), "it lies beside the data"
    cached = places(bare)[1]
    cached.parent.mkdir(parents=True)
    cached.mkdir()
    for name in ("index.json", ".shardgan"):
        (bare / name).rename(cached / name)
    index_copies.keep(data, tmp_path / "kept")
    monkeypatch.setenv("SHARDGAN_CACHE", str(node))
    monkeypatch.setenv("SHARDGAN_INDEX", str(tmp_path / "kept"))
    index_copies.bring(data)
    said: list[str] = []
    assert load_index(str(bare), said.append).fingerprint == known.fingerprint and not said
    copy = places(bare)[1] / "index.json"
    copy.write_text("newer")
    index_copies.bring(data)
    assert copy.read_text() == "newer"
    os.utime(copy, (0, 0))
    index_copies.bring(data)
    assert copy.read_bytes() == (cached / "index.json").read_bytes()


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(UserError, match=r"/proc/nowhere cannot be written: .*\. Set run.out"):
        slurm.write(Path("/proc/nowhere/config.yaml"), "")


def test_ids_of_jobs_that_cannot_be_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    """The jobs are in the queue by then."""
    slurm.record(Path("/proc/nowhere/job"), ["17", "18"])
    said = capsys.readouterr().err
    assert said.startswith("warning: submitted as job 17, 18, but /proc/nowhere/job cannot be written: ")
    assert "Do not repeat the command" in said
