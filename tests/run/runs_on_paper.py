"""Run folders that look as if they had been trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline import config
from pipeline.run.events import EVENTS
from pipeline.run.grid import save_grid

SETTINGS = ("data.train=data/x", "data.size=28", "data.channels=1", "data.batch_size=100", "run.total_kimg=4")


def write_run(
    folder: Path, *settings: str, scores: Sequence[float] = (3.0, 1.0, 2.0), grids: int = 3
) -> Path:
    """A finished run of 4 kimg: a row per kimg from 0 on, a score in as many rows, and sample grids."""
    folder.mkdir(parents=True)
    read = config.load(None, [*SETTINGS, f"run.name={folder.name}", f"run.out={folder.parent}", *settings])
    (folder / "config.yaml").write_text(config.dump(read))
    (folder / "reference.json").write_text('{"heldout": {"images": 50, "features": ["efflite0", "1"]}}')
    rows = [{"cur_nimg": 1000 * at, "time": 1e9 + at} for at in range(5)]
    for row, score in zip(rows, scores, strict=False):
        row |= {"Metrics/kid_efflite0": score, "Metrics/efflite0_fake_images": 50}
    for row in rows[1:]:
        row |= {"Loss/D/adversarial": 1.25, "Loss/G/adversarial": float("nan"), "Timing/img_per_sec": 100.0}
        row |= {"Gradients/D/skipped": 0.0, "Progress/bad_images": 0, "Progress/epoch": 0.5}
    rows[2]["Gradients/D/skipped"] = 0.3  # of the ten updates of a kimg
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chance = torch.Generator().manual_seed(0)
    for at in range(grids):
        images = torch.randint(256, (64, 1, 28, 28), generator=chance).to(torch.uint8)
        notes = {"chart": "Samples/fakes", "cur_nimg": str(40 * at)}
        save_grid(images, folder / "samples" / f"fakes{at:06d}.png", 8, notes=notes)
    save_grid(images, folder / "samples" / "reals.png", 8)
    (folder / "DONE").write_text("4000\n")
    return folder


def write_events(folder: Path, *events: dict[str, object]) -> None:
    (folder / EVENTS).write_text("".join(json.dumps({"cur_nimg": 0, **e}) + "\n" for e in events))
