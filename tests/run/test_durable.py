"""Files are written in the same way on file systems that lack something, and failures are reported."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import durable
from pipeline.durable import save_tensors, sync


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.json"
    with pytest.raises(OSError, match="full"), durable.whole(path) as partial:
        partial.write_text("half")
        raise OSError("full")
    assert not list(path.parent.iterdir())
    durable.write(path, "a é")
    with durable.whole(path) as mine, durable.whole(path) as anothers:
        mine.write_text("mine")
        anothers.write_text("another's")
        assert path.read_bytes() == "a é".encode()
    assert path.read_text() == "mine" and list(path.parent.iterdir()) == [path]


def fail(monkeypatch, error: int, folders_only: bool) -> None:
    real = os.fsync

    def fsync(file: int) -> None:
        if folders_only and not Path(f"/proc/self/fd/{file}").is_dir():
            return real(file)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES])
def test_folders_that_cannot_be_synced(tmp_path, monkeypatch, error):
    fail(monkeypatch, error, folders_only=True)
    (tmp_path / "file").touch()
    sync(tmp_path)
    sync(tmp_path / "file")


def test_a_file_system_without_fsync(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    fail(monkeypatch, errno.ENOSYS, folders_only=False)
    sync(tmp_path / "file")


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_heard(tmp_path, monkeypatch, error):
    (tmp_path / "file").touch()
    fail(monkeypatch, error, folders_only=False)
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OSError, match=os.strerror(error)):
            sync(path)


def test_a_file_system_without_modes(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "chmod", refuse)
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"b": "c"})
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]
