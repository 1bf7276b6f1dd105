"""Where `shardgan prepare` writes, and what nobody may look at."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from launch.argument import training_of
from launch.prepare import prepare as command
from pipeline.config import UserError
from pipeline.data.index import load_index
from pipeline.data.prepare.writer import Options, prepare


def test_a_link_stands_for_where_it_leads(pictures: Path, tmp_path: Path) -> None:
    """On whatever disk that is; all is written there."""
    (tmp_path / "disk" / "there").mkdir(parents=True)
    for name, target in (("link", "disk/there"), ("dangling", "disk/new")):
        (tmp_path / name).symlink_to(target)
        for _ in range(2):
            prepare(str(pictures), str(tmp_path / name), Options(size=8), workers=1)
        assert (tmp_path / name).is_symlink() and (tmp_path / target / "index.json").is_file()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["new", "there"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/proc", "^/proc is where a disk is mounted; give a folder in it: /proc/NAME.$"),
        ("x" * 300, "too long"),
    ],
)
def test_what_cannot_be_written_to(pictures: Path, tmp_path: Path, out: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(str(pictures), str(tmp_path / out), Options(size=8), workers=1)


def test_what_the_system_does_not_let_us_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a colleague's folder; whatever is called with it."""

    def stat(path: Path, **_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", stat)
    where = str(tmp_path / "locked" / "x")
    calls = (
        lambda: prepare(where, str(tmp_path / "out"), Options()),
        lambda: load_index(where),
        lambda: training_of(where, [], gpu=False),
    )
    for call in calls:
        with pytest.raises(UserError, match=r"^\S+ cannot be read: Permission denied\.$"):
            call()


def test_a_home_folder_that_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = "~nobody-of-that-name/x"
    for call in (
        lambda: prepare(nowhere, "out", Options()),
        lambda: prepare("pictures", nowhere, Options()),
        lambda: load_index(nowhere),
        lambda: training_of(nowhere, [], gpu=False),
    ):
        with pytest.raises(UserError, match=r"^~nobody-of-that-name/x: there is no such home folder; write"):
            call()


def test_a_folder_whose_name_begins_as_a_home_folder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures.rename("~pictures")
    prepare("./~pictures", "./~out", Options(size=8), workers=1)
    assert (tmp_path / "~out" / "index.json").is_file() and load_index("./~out").shards


def test_an_empty_argument_is_not_the_current_folder() -> None:
    for call in (
        lambda: command.main(["", "x"], standalone_mode=False),
        lambda: command.main(["x", ""], standalone_mode=False),
        lambda: training_of("", [], gpu=False),
    ):
        with pytest.raises(UserError, match=r"is empty\. \(Is a shell variable unset\?\)"):
            call()  # not the current folder
