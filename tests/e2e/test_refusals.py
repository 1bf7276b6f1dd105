"""Bad input is refused before anything is started or written: one message that says what to do, status 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ADAM, BATCH, FASHION, ROOT, accelerate, run, shardgan

import launch.cli
from launch import processes


class Told:
    """What a refused command left: its status and the two streams."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Call `shardgan train` in this process, for speed; starting another one is an error."""

    def no_process(*arguments: object, **_: object) -> None:
        raise AssertionError(f"something was started: {arguments[0]}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execve", no_process)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    (tmp_path / "good.yaml").write_text(ADAM)

    def call(*arguments: str) -> Told:
        monkeypatch.setattr(sys, "argv", ["shardgan", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            launch.cli.main()
        return Told(ended.value.code, *capfd.readouterr())

    return call


def assert_refused(told: Told, tmp_path: Path, *words: str) -> None:
    assert told.status == 2
    assert told.err.count("error: ") == 1 and told.err.lower().startswith("error: ")
    for word in words:
        assert word in told.err, word
    assert "Traceback" not in told.out + told.err
    assert not (tmp_path / "runs").exists()


# What is wrong → its arguments, and what the message must name: the thing, and the way out.
SETTINGS = {
    "unknown key": (["G.widht=8"], ["G.widht", "did you mean `width`?"]),
    "unknown section": (["optimizer.lr=1"], ["optimizer", "did you mean `optim`?"]),
    "mistyped value": (["data.batch_size=many"], ["data.batch_size", "integer", "'many'"]),
    "two at once": (["G.widht=8", "run.seed=-1"], ["G.widht", "run.seed"]),
    "negative λ": (["penalty.G.l2=-1"], ["penalty.G.l2", "greater than or equal to 0"]),
    "not a setting": (["fast"], ["`fast`", "section.key=value"]),
    "odd batch": (["--procs", "2", "data.batch_size=13"], ["13", "2 processes", "12 or 14"]),
    "more ranks than images": (["--procs", "13"], ["13 processes", f"batch of {BATCH}", "processes in all"]),
    "single of two": (["--strategy", "single", "--procs", "2"], ["--strategy single", "one process"]),
    "no place": (["data.train=nowhere"], ["nowhere", "shardgan prepare"]),
    "image size": (["data.size=32"], ["28x28", "data.size=32", "--size 32"]),
    "no such size": (["data.size=48"], ["data.size=48", "28, 32, 64, 128"]),
    "no such family": (["G.kind=dcgna"], ["G.kind=dcgna", "did you mean `dcgan`?"]),
    "no such module": (["G.kind=not_there:Painter"], ["G.kind=not_there:Painter", "No module named"]),
    "no such class": (["D.kind=torch.nn:Critic"], ["D.kind=torch.nn:Critic", "cannot be imported"]),
    "not a network": (["D.kind=pathlib:Path"], ["pathlib:Path", "torch.nn.Module"]),
    "decay and penalty": (["optim.G.kind=adamw", "optim.G.decoupled_decay=0.1"], ["optim.G", "Set one"]),
    "one to score with": (["score.metrics=[kid]", "data.holdout=0.002"], ["1 image held", "Raise data.hold"]),
    "no such fold": (["data.folds=3", "data.fold=3"], ["data.fold", "0 to 2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be(refused, tmp_path, case):
    arguments, words = SETTINGS[case]
    told = refused("good.yaml", *(["--procs", "1"] if "--procs" not in arguments else []), *arguments)
    assert_refused(told, tmp_path, *words)


def test_processes_that_hsdp_cannot_divide(refused, tmp_path, monkeypatch):
    yaml = (processes.ACCELERATE_FILES / "hsdp.yaml").read_text()
    (tmp_path / "hsdp.yaml").write_text(yaml.replace("dp_shard_size: 1", "dp_shard_size: 2"))
    monkeypatch.setattr(processes, "ACCELERATE_FILES", tmp_path)
    told = refused("good.yaml", "--strategy", "hsdp", "--procs", "3")
    assert_refused(told, tmp_path, "3 processes", "parallelism_config_dp_shard_size: 2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["There is no config file"]),
        ("run: {name: [", ["cannot be read as YAML"]),
        ("- a\n- list\n", ["section: {key: value}"]),
        ("data: {size: 28}\n", ["data.train", "shardgan prepare"]),
        ("run: 3\ndata: {train: x}\n", ["run"]),
        ("\x00\x01\x02", ["cannot be read as YAML"]),
    ],
)
def test_config_files_that_are_none(refused, tmp_path, text, words):
    if text is not None:
        (tmp_path / "bad.yaml").write_text(text)
    assert_refused(
        refused("bad.yaml", "--procs", "1"),
        tmp_path,
        "bad.yaml" if text != "data: {size: 28}\n" else "",
        *words,
    )


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _no_tar(folder: Path) -> None:
    (folder / "index.json").unlink()
    (folder / "shard-000002.tar").write_bytes(b"\x89PNG" * 5000)


def _truncated(folder: Path) -> None:
    shard = folder / "shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:100_000])


def _truncated_without_index(folder: Path) -> None:
    _truncated(folder)
    (folder / "index.json").unlink()


def _lost(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()


def _no_labels(folder: Path) -> None:
    import tarfile

    (folder / "index.json").unlink()
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = [(m, tar.extractfile(m)) for m in tar if m.name.endswith(".png")]
            with tarfile.open(path.with_suffix(".new"), "w") as out:
                for member, file in files:
                    out.addfile(member, file)
        path.with_suffix(".new").replace(path)


DATA = {
    "no shards": (_empty, [], ["shardgan prepare"]),
    "not a tar": (_no_tar, [], ["shard-000002.tar"]),
    "truncated": (_truncated, [], ["shard-000003.tar", "Fetch it again"]),
    "truncated, no index": (_truncated_without_index, [], ["shard-000003.tar"]),
    "a shard is gone": (_lost, [], ["shard-000001.tar", "missing"]),
    "no labels": (_no_labels, ["data.conditional=true"], ["data.conditional=true", "no labels"]),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_trained_on(refused, tmp_path, case):
    spoil, settings, words = DATA[case]
    shutil.copytree(FASHION, tmp_path / "data", ignore=shutil.ignore_patterns(".shardgan"))
    spoil(tmp_path / "data")
    assert_refused(refused("good.yaml", "--procs", "1", "data.train=data", *settings), tmp_path, *words)


def test_other_settings_on_a_run_that_is_there(worlds, refused, capfd):
    """All that would make it another run is named; what may change (tracking, cadence) is not."""
    settings = [f"run.out={worlds.folder}", "run.name=adam-1", "--procs", "1"]
    changed = ["G.width=9", "penalty.D.l2=0.5", "run.snapshot_kimg=0.5", "track.wandb=true", "data.workers=0"]
    told = refused(worlds.folder / "adam.yaml", *settings, *changed)
    assert told.status == 2 and told.err.count("error: ") == 1
    assert "G.width: 8 → 9" in told.err and "penalty.D" in told.err and "run.resume=false" in told.err
    assert not any(key in told.err for key in ("snapshot_kimg", "track", "workers"))


def test_no_space_left(small_disk, refused, tmp_path, monkeypatch):
    told = refused("good.yaml", "--procs", "1", f"run.out={small_disk}/runs")
    monkeypatch.undo()
    assert_refused(told, tmp_path, "No space left", str(small_disk), "run.out")
    assert not (small_disk / "runs").exists()


# The same through real processes


def test_the_installed_command_refuses_likewise(tmp_path):
    (tmp_path / "good.yaml").write_text(ADAM)
    ended = run(shardgan("train", "good.yaml", "--procs", "2", "G.widht=8"), tmp_path)
    at_once, _, error = ended.output.partition("\n")
    assert at_once == "starting 2 processes (ddp) …"
    assert_refused(Told(ended.status, at_once, error), tmp_path, "did you mean `width`?")


def test_a_bare_launcher_refuses_with_one_message(tmp_path):
    """Two ranks meet the same mistake: one of them tells. (The launcher adds a report of its own.)"""
    (tmp_path / "good.yaml").write_text(ADAM)
    ended = run(accelerate(2, "good.yaml", "G.widht=8"), tmp_path)
    assert ended.status not in (0, None)
    assert ended.output.count("did you mean `width`?") == 1
    assert "SIGKILL" not in ended.output  # the other rank leaves when the launcher asks it to
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_dies_before_it_has_joined_ends_the_job(tmp_path):
    """The launcher asks the other one to leave, and need not kill it half a minute later."""
    (tmp_path / "good.yaml").write_text(ADAM)
    dies = "import os, signal\nif os.environ.get('RANK') == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
    (tmp_path / "sitecustomize.py").write_text(dies)
    ended = run(accelerate(2, "good.yaml"), tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.status not in (0, None)
    assert "Signal 9 (SIGKILL) received" in ended.output  # by rank 1
    assert "forcefully exiting" not in ended.output
    assert not (tmp_path / "runs").exists()


def test_a_file_for_one_process_is_refused_for_two(tmp_path):
    """Each would train alone, on the same images."""
    (tmp_path / "good.yaml").write_text(ADAM)
    ended = run(accelerate(2, "good.yaml", file="single.yaml"), tmp_path)
    assert ended.status not in (0, None)
    assert ended.output.count("error: ") == 1 and "ddp.yaml" in ended.output
    assert "SIGKILL" not in ended.output
    assert not (tmp_path / "runs").exists()
