"""A class-conditional run in colour with most of the options on, and the commands that use its result."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from launching import ROOT, RunFolder, fashion_images, shardgan, train
from PIL import Image
from safetensors.torch import load_file
from test_identities import assert_losses_are_the_sum_of_their_parts

import pipeline.train
from launch.evaluate import evaluate
from launch.export import export
from launch.prepare import prepare
from launch.sample import sample
from pipeline import config
from pipeline.data.index import load_index
from pipeline.gan.draws import Draws
from pipeline.gan.images import to_uint8
from pipeline.gan.networks import build_D, build_G
from pipeline.run.grid import tile
from tests.published import ARMS, PUBLISHED

CONFIG = """
data: {train: data, size: 32, channels: 3, conditional: true, batch_size: 24, batch_gpu: 6, holdout: 0.2}
G: {width: 8, dropout: 0.1, z_dim: 16}
D: {width: 8, dropout: 0.1, norm: instance}
loss: {kind: hinge, D_steps: 2}
penalty: {l2: 1.0e-4, G: {l1: 1.0e-6}, r1: {gamma: 0.5, interval: 2}}
ema: {kimg: 0.1}
run: {total_kimg: 0.288, tick_kimg: 0.096, snapshot_kimg: 0.144, checkpoint_kimg: 0.144, eval_kimg: 0.288}
score: {images: 24}
track: {wandb: false}
"""
CLASSES = {"boot": 9, "shirt": 6, "trouser": 1}  # → the label in Fashion-MNIST
COLOURS = {"boot": (255, 120, 0), "shirt": (80, 255, 80), "trouser": (60, 60, 255)}


def call(command, *arguments) -> str:
    """One of our commands, in this process."""
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> RunFolder:
    """Real garments dyed by class, in shards by `shardgan prepare`, trained on by two ranks in bf16."""
    folder = tmp_path_factory.mktemp("conditional")
    for name, label in CLASSES.items():
        (folder / "images" / name).mkdir(parents=True)
        for number, image in enumerate(fashion_images(label)):
            dyed = (image[:, :, None] * (np.array(COLOURS[name]) / 255)).astype(np.uint8)
            Image.fromarray(dyed).save(folder / "images" / name / f"{number:03d}.png")
    call(prepare, folder / "images", folder / "data", "--size", 32, "--per-shard", 40, "--workers", 1)
    (folder / "dyed.yaml").write_text(CONFIG)
    command = shardgan("train", "dyed.yaml", "--procs", "2", "--mixed_precision", "bf16")
    return train(command, folder / "runs" / "dyed", folder)


@pytest.fixture
def there(conditional, monkeypatch):
    """In the folder from which the run was started, which its config is relative to."""
    monkeypatch.chdir(conditional.path.parents[1])
    return conditional


def test_the_shards_are_the_folders(conditional):
    index = load_index(str(conditional.path.parents[1] / "data"))
    assert index.classes == tuple(CLASSES) and index.num_samples > 100 and len(index.shards) > 2


def test_every_part_of_the_losses_is_charted(conditional):
    rows = conditional.rows
    assert [row["cur_nimg"] for row in rows] == [0, 96, 192, 288]
    assert_losses_are_the_sum_of_their_parts(rows)
    for row in rows[1:]:
        assert row["Loss/D/r1_penalty"] > 0 and row["Loss/G/l1_penalty"] > 0 and row["Loss/D/l2_penalty"] > 0
        assert "Loss/D/l1_penalty" not in row and "Loss/G/r1_penalty" not in row
        assert all(math.isfinite(value) for value in row.values())
    for row in (rows[0], rows[-1]):
        assert row["Metrics/efflite0_fake_images"] == 24


def test_the_networks_are_whole_and_make_the_last_sheet_of_samples(there, tmp_path):
    """What the files give a stranger is what the run has shown: same latents, same classes, same pixels."""
    call(export, there.path, "--out", tmp_path / "out")
    settings = config.load(tmp_path / "out" / "config.yaml")
    G, D = build_G(settings, len(CLASSES)), build_D(settings, len(CLASSES))
    D.load_state_dict(load_file(tmp_path / "out" / "D.safetensors"), strict=True)
    G.load_state_dict(load_file(tmp_path / "out" / "G_ema.safetensors"), strict=True)
    frequencies = json.loads((there.path / "checkpoints" / "288" / "state.json").read_text())
    draws = Draws(settings.run.seed, settings.G.z_dim, frequencies["label_frequencies"])
    z, c = draws.grid(64)
    with torch.no_grad():
        images = to_uint8(G.eval()(z, c))
    sheet = tile(images[:63], draws.grid_columns(64), tuple(CLASSES))  # whole rows
    shown = np.asarray(Image.open(sorted(there.path.glob("samples/fakes*.png"))[-1]))
    assert shown.shape == sheet.shape and shown.shape[2] == 3
    assert np.abs(shown.astype(int) - sheet.astype(int)).max() <= 1
    assert shown.std() > 1
    with torch.no_grad():  # and the labels matter
        assert not torch.equal(G(z, c), G(z, (c + 1) % len(CLASSES)))


def test_the_commands_work_on_it(there, tmp_path):
    assert "9 images after 0.288 kimg" in call(
        sample, there.path, "--out", tmp_path / "sheet.png", "--count", 9
    )
    assert np.asarray(Image.open(tmp_path / "sheet.png")).shape[2] == 3
    call(evaluate, there.path)
    (entry,) = json.loads((there.path / "scores.json").read_text())
    name = "Metrics/kid_efflite0"
    assert entry[name] == pytest.approx(there.rows[-1][name], abs=1e-5)


NARROW = {"r3gan": ("width=4", "max_width=8", "depth=1"), "vit": ("width=8", "depth=4", "heads=1")}


@pytest.mark.parametrize("file", ARMS)
def test_every_alternative_is_a_config(file):
    base = ROOT / "configs" / f"{ARMS[file]}.yaml"
    for settings in yaml.safe_load((ROOT / "configs" / f"{file}.yaml").read_text()).values():
        assert (config.load(base, settings) != config.load(base)) == bool(settings)


def latents(folder, channels: int, size: int):
    """As many random arrays of each class as there are images."""
    numbers = np.random.default_rng(0)
    for picture in Path("images").rglob("*.png"):
        array = folder / picture.parent.name / f"{picture.stem}.npy"
        array.parent.mkdir(parents=True, exist_ok=True)
        np.save(array, numbers.standard_normal((channels, size, size), dtype=np.float32))
    return folder


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_every_published_config_trains(there, tmp_path, file, signals_kept):
    """Two updates of narrow networks by each file in configs/, on stand-ins for its images or latents."""
    published = config.load(file)
    data, size = published.data, min(published.data.size, 32)
    if data.latents:
        call(prepare, latents(tmp_path / "latents", data.channels, size), tmp_path / "shards", "--workers", 1)
    else:
        options = ["--size", size, "--channels", data.channels, "--workers", 1]
        call(prepare, "images", tmp_path / "shards", *options)
    small = [f"data.size={size}", "data.batch_size=8", "data.batch_gpu=8", "data.workers=0", "score.images=8"]
    narrow = NARROW.get(published.G.kind, ("width=8",))
    small += [f"{player}.{key}" for player in "GD" for key in narrow]
    small += [f"data.train={tmp_path}/shards", "run.total_kimg=0.016", f"run.out={tmp_path}"]
    assert pipeline.train.main([str(file), *small, "track.wandb=false"]) == 0
    run = RunFolder(tmp_path / file.stem)
    assert run.done and run.rows[-1]["cur_nimg"] == 16
    assert run.exported().keys() == {"G", "D", "G_ema"}
