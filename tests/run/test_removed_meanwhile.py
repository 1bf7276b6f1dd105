"""A run is read (sample, evaluate, export, shardgan.load) while its training removes older checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.run import checkpoint, export, saving

OF_FORMAT_2 = Path(__file__).parents[1] / "assets" / "run-of-format-2" / "run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose checkpoint is of two ranks, with other BatchNorm statistics."""
    run = shutil.copytree(OF_FORMAT_2, tmp_path / "run")
    of_first = run / "checkpoints" / "120" / "buffers-00000.safetensors"
    of_second = of_first.with_name("buffers-00001.safetensors")
    save_file({k: t + 1 if t.is_floating_point() else t for k, t in load_file(of_first).items()}, of_second)
    manifest = json.loads((of_first.parent / "manifest.json").read_text())
    manifest["files"][of_second.name] = checkpoint.describe(of_second)
    (of_first.parent / "manifest.json").write_text(json.dumps(manifest | {"world": 2}))
    return run


@pytest.fixture
def then_saved(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str], None]:
    """Just before the first call of a function, training completes checkpoint 240 and removes 120."""
    folder = run / "checkpoints"

    def once() -> None:
        if not (folder / "240").exists():
            shutil.copytree(folder / "120", folder / ".partial-240").rename(folder / "240")
            state = json.loads((folder / "240" / "state.json").read_text())
            (folder / "240" / "state.json").write_text(json.dumps(state | {"cur_nimg": 240}))
            manifest = json.loads((folder / "240" / "manifest.json").read_text())
            manifest["files"]["state.json"] = checkpoint.describe(folder / "240" / "state.json")
            (folder / "240" / "manifest.json").write_text(json.dumps(manifest))
            saving._remove(folder / "120")

    def before(module: object, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (once(), function(*args))[1])

    return before


@pytest.mark.parametrize("read", ["load_generator", "export"])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (checkpoint, "_problem"),
        (export, "read_state"),
        (export, "Pieces"),
        (export, "read_buffers"),
        (export, "pooled"),
    ],
)
def test_the_newer_one_is_read(run, tmp_path, then_saved, capsys, module, name, read):
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    expected = export.load_generator(run)[0](z)
    then_saved(module, name)
    if read == "export":
        export.export(run, tmp_path / "out")
        G, _, facts = export.load_exported(tmp_path / "out")
        assert facts.cur_nimg == 240
    else:
        G, _, state = export.load_generator(run)
        assert state.cur_nimg == 240
    assert torch.equal(G(z), expected)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["240"]
    assert capsys.readouterr() == ("", "")


def test_one_that_a_person_asked_for_and_is_gone_is_named(run, then_saved):
    then_saved(export, "Pieces")
    with pytest.raises(export.UserError, match=r"checkpoint 0.12: none is kept.* keeps kimg 0.24"):
        export.load_generator(run, 0.12)


def test_of_one_that_is_being_removed_nothing_is_found(run, monkeypatch):
    """Removing many files takes long; a job that is killed then leaves them to the next."""
    monkeypatch.setattr(saving.shutil, "rmtree", lambda *_, **__: None)
    saving._remove(run / "checkpoints" / "120")
    assert checkpoint.find(run / "checkpoints") == []
    assert [p.name for p in (run / "checkpoints").iterdir()] == [".removed-120"]


def test_one_that_was_never_whole_is_refused(run):
    """By whoever made it: its manifest lists no state. And one that is a link to a disk that is gone."""
    folder = run / "checkpoints" / "120"
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["state.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "state.json").unlink()
    with pytest.raises(export.UserError, match=r"state\.json is not there: the checkpoint is no whole one"):
        export.load_generator(run)
    shutil.rmtree(folder)
    folder.symlink_to("/purged/120")
    with pytest.raises(export.UserError, match=r"holds no intact checkpoint yet\.\n.*120 is damaged"):
        export.load_generator(run)
