"""Damage to the newest checkpoint is noticed, named, and costs no more than going back to the one before."""

from __future__ import annotations

import random
import shutil

import pytest
from launching import AFTER_20, BATCH, largest_difference, train
from launching import accelerate as launch

import pipeline.train
from pipeline.run.checkpoint import Pieces, newest_intact, read_buffers
from pipeline.run.rows import rows

FILES = [
    "D-00000.safetensors",
    "G-00000.safetensors",
    "buffers-00000.safetensors",
    "buffers-00001.safetensors",
]
DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(_flipped(path.read_bytes())),
}


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.fixture
def checkpoints(worlds, tmp_path):
    """The last two checkpoints of two ranks."""
    for nimg in (AFTER_20 - BATCH, AFTER_20):
        shutil.copytree(worlds.sgd[2].path / "checkpoints" / str(nimg), tmp_path / str(nimg))
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "state.json", "manifest.json"])
def test_any_damage_to_any_file_is_named_and_the_older_one_is_taken(checkpoints, name, damage):
    if (damage, name) == ("flipped", "manifest.json"):
        pytest.skip("see test_a_flipped_bit_of_the_manifest")
    DAMAGES[damage](checkpoints / str(AFTER_20) / name)
    found, (complaint,) = newest_intact(checkpoints)
    assert found == checkpoints / str(AFTER_20 - BATCH)
    assert str(checkpoints / str(AFTER_20)) in complaint
    assert name in complaint or name == "manifest.json"


def test_a_flipped_bit_of_the_manifest_cannot_hide_damage(checkpoints):
    """Wherever a bit flips in the manifest: either it is noticed, or what is loaded is what was written."""
    manifest = checkpoints / str(AFTER_20) / "manifest.json"
    data = manifest.read_bytes()
    files = data.index(b'"files"')
    for place in range(files, len(data), 7):
        manifest.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        found, complaints = newest_intact(checkpoints)
        assert found is not None and (found.name == str(AFTER_20)) == (not complaints)
        assert not complaints or found.name == str(AFTER_20 - BATCH)


def test_every_file_is_in_the_manifest(checkpoints):
    """Else the table above would miss one."""
    names = {p.name for p in (checkpoints / str(AFTER_20)).iterdir()}
    assert names == {*FILES, "state.json", "manifest.json"}
    assert newest_intact(checkpoints) == (checkpoints / str(AFTER_20), [])


def test_a_file_that_the_manifest_does_not_list_is_not_read(checkpoints):
    """Such as one of more ranks, copied over it."""
    newest, older = checkpoints / str(AFTER_20), checkpoints / str(AFTER_20 - BATCH)
    weights = Pieces(newest, "G")
    shutil.copy(older / "G-00000.safetensors", newest / "G-00001.safetensors")
    shutil.copy(older / "buffers-00000.safetensors", newest / "buffers-00002.safetensors")
    assert newest_intact(checkpoints) == (newest, []) and len(read_buffers(newest, "G")) == 2
    assert Pieces(newest, "G")._pieces.keys() == weights._pieces.keys()
    assert all(len(found) == 1 for found in Pieces(newest, "G")._pieces.values())


@pytest.mark.parametrize("manifest", ["null", '"x"', "[" * 5000, '{"format": 2, "files": []}', "{}"])
def test_a_manifest_of_another_form_is_damaged(checkpoints, manifest):
    (checkpoints / str(AFTER_20) / "manifest.json").write_text(manifest)
    found, complaints = newest_intact(checkpoints)
    assert found == checkpoints / str(AFTER_20 - BATCH) and len(complaints) == 1


def test_nothing_is_taken_if_nothing_is_sound(checkpoints):
    for nimg in (AFTER_20, AFTER_20 - BATCH):
        DAMAGES["flipped"](checkpoints / str(nimg) / "G-00000.safetensors")
    found, complaints = newest_intact(checkpoints)
    assert found is None and len(complaints) == 2


def test_a_run_falls_back_says_so_and_ends_at_the_same_weights(worlds, tmp_path, signals_kept, capfd):
    """One process, from the older checkpoint of its own: the ten updates done again are those done before."""
    half = AFTER_20 // 2
    copy = worlds.sgd[1].rewound(half, tmp_path)
    shutil.copytree(
        worlds.sgd[1].path / "checkpoints" / str(half + BATCH), copy.path / "checkpoints" / str(half + BATCH)
    )
    DAMAGES["flipped"](copy.path / "checkpoints" / str(half + BATCH) / "D-00000.safetensors")
    shutil.copytree(copy.path / "checkpoints" / str(half + BATCH), copy.path / "checkpoints" / "9999")
    settings = [f"run.name={copy.path.name}", f"run.out={tmp_path}", "run.keep=1"]
    assert pipeline.train.main([str(worlds.folder / "sgd.yaml"), *settings]) == 0
    output = capfd.readouterr().out
    fallen = [line for line in output.splitlines() if line.startswith("warning:") and "falling back" in line]
    assert len(fallen) == 2 and all("D-00000.safetensors" in line for line in fallen)
    kept = [row["text"] for row in rows(copy.path / "events.jsonl") if row["event"] == "warning"]
    assert [f"warning: {text}" for text in kept] == fallen
    assert largest_difference(copy.exported(), worlds.sgd[1].exported()) <= 1e-6
    assert [r["cur_nimg"] for r in copy.rows] == [r["cur_nimg"] for r in worlds.sgd[1].rows]
    # The damaged ones have not been taken for the newest, of which so many are kept.
    left = {p.name for p in (copy.path / "checkpoints").iterdir()}
    assert left == {str(AFTER_20), f".damaged-{half + BATCH}", ".damaged-9999"}


ELASTIC = {
    "1 rank": (1, None, []),
    "3 ranks, sharded, in rounds, no workers": (3, "fsdp2.yaml", ["data.batch_gpu=2", "data.workers=0"]),
}


@pytest.mark.parametrize("elsewhere", ELASTIC)
def test_two_ranks_checkpoint_continues_elsewhere(worlds, tmp_path, elsewhere, signals_kept):
    """One update by two ranks under DDP and 19 elsewhere are twenty by two, to rounding: the same samples,
    latents, penalties and averages."""
    world, file, settings = ELASTIC[elsewhere]
    copy = worlds.sgd[2].rewound(BATCH, tmp_path)
    line = [str(worlds.folder / "sgd.yaml"), f"run.name={copy.path.name}", f"run.out={tmp_path}", *settings]
    if world == 1:
        assert pipeline.train.main(line) == 0
    else:
        train(launch(world, *line, file=file), copy.path)
    assert largest_difference(copy.exported(), worlds.sgd[2].exported()) <= 1e-6
    for mine, theirs in zip(copy.rows, worlds.sgd[2].rows, strict=True):
        assert mine["Loss/D/loss"] == pytest.approx(theirs["Loss/D/loss"], rel=1e-4)


def test_two_hundred_flipped_bits_are_all_noticed(checkpoints):
    """Anywhere in any file that is listed."""
    chance = random.Random(0)
    newest = checkpoints / str(AFTER_20)
    for _ in range(200):
        path = newest / chance.choice([*FILES, "state.json"])
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        sound = path.read_bytes()
        path.write_bytes(data)
        found, (complaint,) = newest_intact(checkpoints)
        path.write_bytes(sound)
        assert found == checkpoints / str(AFTER_20 - BATCH) and path.name in complaint


def test_a_run_without_a_sound_checkpoint_is_not_begun_anew(worlds, tmp_path, signals_kept, capfd):
    """That would overwrite what may be mended."""
    copy = worlds.sgd[1].rewound(AFTER_20 // 2, tmp_path)
    path = copy.path / "checkpoints" / str(AFTER_20 // 2) / "G-00000.safetensors"
    path.write_bytes(_flipped(path.read_bytes()))
    rows = copy.rows
    settings = [f"run.name={copy.path.name}", f"run.out={tmp_path}"]
    assert pipeline.train.main([str(worlds.folder / "sgd.yaml"), *settings]) == 2
    error = capfd.readouterr().err
    assert path.name in error and "run.resume=false" in error
    assert copy.rows == rows
