"""`python -m launch.slurm.gather`: a table of the runs in a list, whatever is in the list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.slurm import gather


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three runs of one config, scored; and the list of them."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text("data: {train: data}\n")
    for number, name in enumerate("abc", 1):
        folder = Path("runs", name)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            json.dumps({"cur_nimg": number * 1000, "Progress/kimg": number, "Metrics/kid": 0.5}) + "\n"
        )
        (folder / "reference.json").write_text(json.dumps({"heldout": {"images": 20, "features": "f"}}))
        (folder / "DONE").write_text("1000\n")
    Path("runs.txt").write_text("".join(f"tiny.yaml run.name={name}\n" for name in "abc"))
    return Path("runs.txt")


def test_a_bad_line_is_a_row_and_the_others_stand(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "\n\ntiny.yaml 'run.name=d\ntiny.yaml data.batch_sise=3\nnowhere.yaml\n   \n"
    listed.write_text(listed.read_text() + bad)
    assert gather.main(["runs.txt"]) == 1
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table[1:7]] == [
        "runs/a",
        "runs/b",
        "runs/c",
        "line 6",
        "line 7",
        "line 8",
    ]
    assert all("cannot be read" in line for line in table[4:7])
    assert "line 6: No closing quotation" in table and any("batch_size" in line for line in table[7:])


def test_scores_against_other_references_are_marked(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"heldout": {"images": 40, "features": "f"}, "train": {"images": 3}}
    Path("runs/b/reference.json").write_text(json.dumps(other))
    Path("runs/c/reference.json").write_text("{")  # cut short
    assert gather.main(["runs.txt"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith("runs/b *  done") and [line.count("*") for line in table] == [0, 0, 1, 0, 1]
    assert "runs/b is scored against other references than runs/a" in table[4]
    assert "heldout, images: 20 → 40" in table[4]


def test_a_list_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\n")
    for arguments in (["nowhere.txt"], [str(tmp_path / "empty.txt")], [str(tmp_path / "binary.txt")], []):
        assert gather.main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
