"""What a kill may leave in a checkpoint folder, and what a run resumes from then."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.report import MainReport
from pipeline.run.state import State


def write(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "state.json").write_text(text)
    return folder


def test_a_checkpoint_that_is_replaced_is_there_before_and_after(tmp_path):
    """After a kill between the two renames the older one is restored; after both it is deleted."""
    old, new = write(tmp_path / "240", "old"), write(tmp_path / ".partial-240", "new")
    old.rename(checkpoint.replaced(old))
    checkpoint.recover(tmp_path)
    assert (tmp_path / "240" / "state.json").read_text() == "old" and not list(tmp_path.glob(".replaced*"))
    checkpoint.exchange(new, old)
    assert (tmp_path / "240" / "state.json").read_text() == "new" and checkpoint.replaced(old).is_dir()
    checkpoint.recover(tmp_path)
    assert (tmp_path / "240" / "state.json").read_text() == "new" and not list(tmp_path.glob(".replaced*"))


def test_an_exchange_that_fails_leaves_what_was_there(tmp_path):
    old = write(tmp_path / "240", "old")
    with pytest.raises(OSError, match="No such file"):
        checkpoint.exchange(tmp_path / "absent", old)
    assert (old / "state.json").read_text() == "old" and not checkpoint.replaced(old).exists()


def test_a_row_that_was_put_off_by_a_stop_is_written_once(tmp_path):
    """The checkpoint of a stop has rows up to 120; the job that resumed wrote row 240 and was killed."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"cur_nimg": {nimg}, "x": 1}}\n' for nimg in (0, 120, 240)))
    MainReport(tmp_path, [], 480, cur_nimg=240, reported=120).row(240, {"x": 2})
    assert metrics.read_text().count('"cur_nimg": 240') == 1 and '"x": 2' in metrics.read_text()
    assert '"cur_nimg": 0' in metrics.read_text()


def kept(folder: Path, nimg: int, best: tuple[float, int] | None = None) -> None:
    """An intact checkpoint of nothing but its state."""
    state = json.dumps(dataclasses.asdict(State(cur_nimg=nimg, best=best)))
    file = write(folder / str(nimg), state) / "state.json"
    manifest = {"format": checkpoint.FORMAT, "files": {"state.json": checkpoint.describe(file)}}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


def test_a_person_chooses_a_checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for nimg in (24_064, 150_016, 160_000, 160_512):
        kept(folder, nimg, best=(0.5, 24_064))
    for wanted, name in [
        ("newest", "160512"),
        ("best", "24064"),
        ("150", "150016"),
        (150.016, "150016"),
        ("160", "160000"),  # exactly, though 160.512 has that whole number too
        (160.512, "160512"),
    ]:
        assert checkpoint.chosen(folder, wanted).name == name
    with pytest.raises(UserError, match=r"checkpoint 7: none is kept.* 24\.064, 150\.016, 160, 160\.512\."):
        checkpoint.chosen(folder, "7")
    with pytest.raises(UserError, match="not `best`, nor a kimg"):
        checkpoint.chosen(folder, "newst")
    kept(folder, 160_768)
    with pytest.raises(UserError, match="has no score"):
        checkpoint.chosen(folder, "best")


def test_a_kimg_is_taken_as_it_is_printed(tmp_path):
    """Whole batches seldom end at a whole kimg, and long trainings have many digits."""
    nimgs = [999, 1_050_048, 1_050_112, 998_003_712, 1_000_000_000]
    for nimg in nimgs:
        kept(tmp_path, nimg)
    with pytest.raises(UserError, match=r"none is kept") as error:
        checkpoint.chosen(tmp_path, "7")
    printed = str(error.value).partition("keeps kimg ")[2].rstrip(".").split(", ")
    assert printed == ["0.999", "1050.048", "1050.112", "998003.712", "1000000"]
    assert [int(checkpoint.chosen(tmp_path, text).name) for text in printed] == nimgs


def test_a_disk_that_does_not_answer_damages_no_checkpoint(tmp_path, monkeypatch):
    for nimg in (1_024, 1_536):
        kept(tmp_path, nimg, best=(0.5, 512))
    read = checkpoint.describe

    def fails(path):
        if path.parent.name == "1536":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoint, "describe", fails)
    for use in (checkpoint.recover, checkpoint.newest_intact):
        with pytest.raises(UserError, match=r"1536 cannot be read: Input/output error\. Try again"):
            use(tmp_path)
    monkeypatch.undo()
    assert checkpoint.recover(tmp_path) == (tmp_path / "1536", [])


def test_a_chosen_checkpoint_is_there_whole_and_the_only_one(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="no intact checkpoint yet"):
        checkpoint.chosen(folder, "best")
    for nimg in (1_024, 1_536, 2_048):
        kept(folder, nimg, best=(0.5, 512))
    with pytest.raises(UserError, match=r"best: none is kept.* 1\.024, 1\.536"):
        checkpoint.chosen(folder, "best")
    with pytest.raises(UserError, match="several fit"):
        checkpoint.chosen(folder, "1")
    (folder / "1536" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="1536 is damaged"):
        checkpoint.chosen(folder, 1.536)
    assert checkpoint.chosen(folder, 1.024).name == "1024"


def test_an_older_checkpoint_is_used_with_a_warning_only(tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for nimg in (1_024, 1_536, 2_048):
        kept(folder, nimg)
    assert checkpoint.chosen(folder).name == "2048" and capsys.readouterr() == ("", "")
    for nimg in (2_048, 1_536):
        (folder / str(nimg) / "state.json").write_text("{}")
    assert checkpoint.chosen(folder).name == "1024"
    out, warnings = capsys.readouterr()
    assert out == "" and warnings.splitlines() == [
        f"warning: checkpoint {folder}/{nimg} is damaged (state.json is not what was written); "
        "the older one of kimg 1.024 is used instead."
        for nimg in (2_048, 1_536)
    ]
    assert checkpoint.chosen(folder, 1.024).name == "1024" and capsys.readouterr() == ("", "")
