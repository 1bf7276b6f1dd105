"""`shardgan sample` and `shardgan evaluate` on a class-conditional run that was really trained, briefly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from launching import fashion_images
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file

import pipeline.train
from launch.evaluate import _progress as scoring_bar
from launch.evaluate import _show as show_scores
from launch.evaluate import evaluate
from launch.export import export as export_command
from launch.sample import sample
from pipeline.config import Score, UserError
from pipeline.run import spectrum
from pipeline.run.evaluate import FULL

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "tests" / "assets" / "fashion-mnist-500"
SETTINGS = (
    "run.total_kimg=0.064 run.tick_kimg=0.032 run.eval_kimg=0.064 data.size=28 data.channels=1 "
    "data.workers=0 data.batch_size=32 data.conditional=true G.width=8 D.width=8 score.images=20 "
    "ema.kimg=0.02 track.wandb=false run.name=brief run.seed=7"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "config.yaml"
    config.write_text(f"run: {{out: {folder}}}\ndata: {{train: {SHARDS}}}\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SHARDGAN_CACHE", str(folder / "cache"))
        assert pipeline.train.main([str(config), *SETTINGS.split()]) == 0
    return folder / "brief"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "cache"))


def call(command, *arguments) -> str:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_evaluate_gives_the_number_of_training_and_keeps_it(run):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    shown = call(evaluate, run)
    assert "brief after 0.064 kimg" in shown and "kid_efflite0" in shown
    call(evaluate, run, "--images", 10, "--metrics", "kid,nn", "--train-images", 12)
    first, second = json.loads((run / "scores.json").read_text())[-2:]
    assert first["cur_nimg"] == last["cur_nimg"] == 64
    assert first["Metrics/kid_efflite0"] == pytest.approx(last["Metrics/kid_efflite0"], abs=1e-5)
    assert second["Metrics/efflite0_real_images"] == second["Metrics/efflite0_fake_images"] == 10
    assert second["Metrics/efflite0_train_images"] == 12 and second["Metrics/nn_ratio_efflite0"] > 0
    assert "Metrics/kid_efflite0_train" in second
    assert first["against"]["heldout"] != second["against"]["heldout"]  # 20 images and 10 do not compare
    assert json.loads((run / "reference.json").read_text())["heldout"]["images"] == 20


def test_a_name_is_no_markup(capsys):
    show_scores("[bold]a[old] after 2 kimg", {"Metrics/kid": 0.5})
    assert "[bold]a[old] after 2 kimg" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_is_named_and_those_there_are_listed(run, tmp_path):
    """All three commands use one; this run's only one has its best score."""
    out = ("--out", tmp_path / "x.png", "--count", 4)
    assert "after 0.064 kimg" in call(sample, run, *out, "--checkpoint", "best")
    assert "brief after 0.064 kimg" in call(evaluate, run, "--checkpoint", "0.064")
    assert "G_ema" in call(export_command, run, "--out", tmp_path / "e", "--checkpoint", "0")
    for command, where in ((sample, out), (evaluate, ()), (export_command, ("--out", tmp_path / "none"))):
        with pytest.raises(UserError, match=r"checkpoint 7: none is kept.* keeps kimg 0\.064"):
            call(command, run, *where, "--checkpoint", 7)
    assert not (tmp_path / "none").exists()


def test_evaluate_refuses_other_data_unknown_metrics_and_features(run, tmp_path):
    for shard in sorted(SHARDS.glob("*.tar"))[1:]:
        (tmp_path / shard.name).symlink_to(shard)
    for wrong, message in [
        (("--data", tmp_path), "--data"),
        (("--metrics", "kid,fid"), "'fid'. Known: kid"),
        (("--features", "inception"), "Known: efflite0"),
    ]:
        with pytest.raises(UserError, match=message):
            call(evaluate, run, *wrong)
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(SHARDS), "/gone"))
    with pytest.raises(
        UserError, match=r"no shards at /gone.* were moved, say where they are: --data SHARDS"
    ):
        call(evaluate, moved)
    with pytest.raises(UserError, match="no shards at /nor-here") as refused:
        call(evaluate, moved, "--data", "/nor-here")
    assert "were moved" not in str(refused.value)
    assert "kid" in call(evaluate, moved, "--data", SHARDS)


def test_sample_writes_the_same_sheet_for_the_same_seed(run, tmp_path):
    sheets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        call(sample, run, "--out", tmp_path / f"{name}.png", "--count", 20, "--seed", seed)
        sheets.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert sheets[0].shape == (16 + 2 * 58 + 2, 10 * 58 + 2)  # a column for each of the ten classes
    assert np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])


def test_without_a_seed_the_latents_are_those_of_the_runs_own_grids(run, tmp_path):
    call(sample, run, "--out", tmp_path / "own.png")
    call(sample, run, "--out", tmp_path / "zero.png", "--seed", 0)
    own, zero, latest = (
        np.asarray(Image.open(path)).astype(int)
        for path in (tmp_path / "own.png", tmp_path / "zero.png", run / "samples" / "latest.png")
    )
    assert own.shape == latest.shape and np.abs(own - latest).max() <= 1  # rounding
    assert np.abs(zero - latest).max() > 1


def test_a_runs_own_grids_have_a_class_in_each_column(run):
    """Of held-out images, found again among the real ones; white where a class has too few."""
    samples = run / "samples"
    assert len([*samples.glob("fakes*")]) == 2
    latest = np.asarray(Image.open(samples / "latest.png"))
    assert np.array_equal(latest, np.asarray(Image.open(samples / "fakes000000_064.png")))
    sheet = np.asarray(Image.open(samples / "reals.png"))
    assert sheet.shape == latest.shape == (16 + 6 * 58 + 2, 10 * 58 + 2)  # whole rows of 64 images
    tiles = sheet[18:, 2:].reshape(6, 58, 10, 58).swapaxes(1, 2)[:, :, :56:2, :56:2]
    found = 0
    for label in range(10):
        known = {image.tobytes() for image in fashion_images(label)}
        shown = [image.tobytes() for image in tiles[:, label] if not (image == 255).all()]
        assert set(shown) <= known and len(set(shown)) == len(shown)
        found += len(shown)
    assert found > 10


def test_what_is_not_a_run_is_refused(tmp_path):
    for command, arguments in ((sample, ("--out", tmp_path / "x.png")), (evaluate, ())):
        with pytest.raises(UserError, match="not a run folder"):
            call(command, tmp_path, *arguments)
    (tmp_path / "chosen" / "trials").mkdir(parents=True)
    with pytest.raises(UserError, match=r"chosen is a selection, not a run folder\. Its trials are runs: "):
        call(evaluate, tmp_path / "chosen")


def test_an_export_that_does_not_fit_is_one_message(run, tmp_path):
    line = f"ulimit -f 8; exec {sys.executable} -m launch.cli export {run} --out {tmp_path / 'out'}"  # 8 KiB
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert "could not be written" in ended.stderr and not list((tmp_path / "out").glob("*.safetensors"))


@pytest.fixture
def read_only(run, tmp_path):
    """The run as another person's, or on a disk that is mounted so."""
    place = tmp_path / "theirs"
    place.mkdir()
    for options in (["--bind", str(run)], ["-o", "remount,bind,ro"]):
        made = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_run_that_cannot_be_written_is_scored_all_the_same(read_only):
    before = sorted(read_only.iterdir())
    result = CliRunner().invoke(evaluate, [str(read_only)], catch_exceptions=False)
    assert result.exit_code == 0 and "kid_efflite0" in result.stdout
    why = f"{read_only}/.scores cannot be written to: Read-only file system."
    assert result.stderr.splitlines()[-1] == f"warning: these scores are not kept: {why}"
    assert sorted(read_only.iterdir()) == before


def test_a_place_that_cannot_be_written_is_one_message(read_only, run):
    for command, out in ((sample, read_only / "sheet.png"), (export_command, read_only / "out")):
        with pytest.raises(UserError, match=rf"{out} could not be written: .*Read-only file system"):
            call(command, run, "--out", out)


def test_spectra_of_kept_checkpoints_are_recorded_once_and_drawn(run):
    """numpy's singular values of the exported kernels; the run's end has recorded them already."""
    file = run / "spectrum.jsonl"
    before = file.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [row.pop("cur_nimg") for row in rows] == sorted(
        int(p.name) for p in run.glob("checkpoints/[0-9]*")
    )
    assert len(rows[-1]) == 6
    for name, found in rows[-1].items():
        player, _, kernel = name.partition("/")
        whole = load_file(run / "export" / f"{player}.safetensors")[kernel].flatten(1).numpy()
        expected = np.linalg.svd(whole, compute_uv=False)
        assert found == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5 * float(expected[0]))
    summary = spectrum.record(run)
    assert file.read_text() == before and len(summary) == 12
    for name, found in rows[-1].items():
        assert summary[f"Spectrum/{name}/largest"] == found[0]
        assert 1 <= summary[f"Spectrum/{name}/stable_rank"] <= len(found)
    with Image.open(spectrum.draw(run)) as picture:
        assert picture.info["chart"] == "Weights/spectra" and picture.info["cur_nimg"] == "64"


def test_the_bar_has_room_for_the_fid_of_papers(monkeypatch):
    bars = []

    class Kept(Progress):
        def __init__(self, *columns, **options):
            super().__init__(*columns, **options)
            bars.append(self)

    monkeypatch.setattr("launch.evaluate.Progress", Kept)
    extractor = torch.nn.Identity()
    with scoring_bar(extractor, Score(images=4, metrics=("fd",), train_images=8)):
        extractor(torch.zeros(16, 1))
        assert (bars[0].tasks[0].completed, bars[0].tasks[0].total) == (16, 16)
        extractor(torch.zeros(5, 1))
        assert (bars[0].tasks[0].completed, bars[0].tasks[0].total) == (21, 16 + FULL)
