"""One line on a folder of images: a run, and the same line again continues it."""

from __future__ import annotations

from pathlib import Path

from launching import RunFolder, fashion_images
from PIL import Image

import pipeline.train
from launch.argument import training_of
from pipeline.config import load

SHORT = ("data.batch_size=8", "run.total_kimg=0.032", "run.checkpoint_kimg=0.016", "score.images=8")
NARROW = ("G.width=8", "D.width=8", "data.workers=0", "track.wandb=false")


def test_a_folder_is_trained_on_and_resumed(tmp_path, monkeypatch, signals_kept, capsys):
    monkeypatch.chdir(tmp_path)
    for name, label in (("boots", 9), ("shirts", 6)):
        Path("garments", name).mkdir(parents=True)
        for number, image in enumerate(fashion_images(label)[:40]):
            shape = (30 + number, 40)
            Image.fromarray(image).resize(shape).save(Path("garments", name, f"{number}.png"))
    for settings in ((*SHORT, *NARROW), ("run.total_kimg=0.064",)):
        training = training_of("garments", ["data.conditional=true", *settings], gpu=False)
        training.prepare()
        assert pipeline.train.main([training.config, *training.settings]) == 0
    run = RunFolder(tmp_path / "runs" / "garments")
    config = load(run.path / "config.yaml")
    assert run.rows[-1]["cur_nimg"] == 64 and run.done
    assert (config.data.size, config.data.channels, config.G.width, config.augment.target) == (32, 1, 8, 0.6)
    assert len(run.exported()["G_ema"]["embed.weight"]) == 2, "an embedding for each class"
    assert "Resuming from kimg 0.032 (runs/garments/checkpoints/32)" in capsys.readouterr().out
