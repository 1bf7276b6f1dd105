"""The command as a whole: how it ends when a person does not want to wait for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image

from launch import cli

SHARDGAN = Path(sys.executable).parent / "shardgan"


def _of_numpy() -> MemoryError:
    with pytest.raises(MemoryError) as refused:
        np.empty(2**60, np.uint8)
    return refused.value


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped\n"),
        (click.Abort(), 130, "stopped\n"),
        (
            PermissionError(13, "Permission denied", "/home/other/runs/x"),
            2,
            "error: /home/other/runs/x cannot be read or written: Permission denied.\n",
        ),
        *(
            (error, 2, f"error: Memory is full: {error}. Ask for less at a time, or free some.\n")
            for error in (
                _of_numpy(),
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
                RuntimeError("could not create a primitive"),
            )
        ),
    ],
)
def test_what_ends_any_command_is_said_in_a_line(monkeypatch, capfd, raised, status, said):
    """Ctrl-C, a folder that is closed to this user, and memory that is full."""

    def ending(**_: object) -> None:
        raise raised

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli.cli, "main", ending)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    signal.signal(signal.SIGINT, handler)
    assert ended.value.code == status
    assert capfd.readouterr().err == said


def test_ctrl_c_before_any_command_is_there():
    """While Python is still importing what the command needs."""
    script = f"""
import os, signal, sys
sys.argv[0] = {str(SHARDGAN)!r}
sys.modules["click"] = None  # the first import that takes long
import launch
os.kill(os.getpid(), signal.SIGINT)
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT and ended.stderr == ""


@pytest.mark.parametrize(("stdout", "status"), [("/dev/full", 1), ("/dev/null", 0)])
def test_results_that_a_full_disk_does_not_take_are_no_success(stdout, status):
    with Path(stdout).open("w") as file:
        ended = subprocess.run(
            [SHARDGAN, "--version"], check=False, stdout=file, stderr=subprocess.PIPE, text=True
        )
    said = "error: Standard output did not take everything: No space left on device.\n"
    assert (ended.returncode, ended.stderr) == (status, said if status else "")


def test_a_reader_that_has_had_enough_is_no_failure():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        ended = subprocess.run([SHARDGAN, "--version"], check=False, stdout=closed, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_ctrl_c_in_the_middle_of_a_fork(tmp_path):
    """Python prints what is raised just then, and goes on: `prepare` forks workers."""
    script = """
import os, signal, sys
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
sys.argv[0] = "shardgan"
from launch.cli import main
main()
"""
    for number in range(4):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    command = [sys.executable, "-c", script, "prepare", tmp_path, tmp_path / "out", "--per-shard", "2"]
    command += ["--workers", "2"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr.splitlines()[-1:]) == (130, ["stopped"])
    assert "Traceback" not in ended.stderr and not (tmp_path / "out" / "index.json").exists()


def test_a_current_folder_that_was_removed_is_said(tmp_path):
    """Not what torch's libraries say of it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; exec {SHARDGAN} compare {tmp_path}"
    ended = subprocess.run(
        ["bash", "-c", command], check=False, cwd=gone, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: The current folder is not there any more (No such file")
