"""What a wheel installs, where there is no checkout: the walk from images to a job for Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "data.train=data/photos data.size=28 data.channels=1 data.batch_size=16 data.holdout=0.25 G.width=8"
)
WALK = """
import sys
import shardgan
assert "torch" not in sys.modules

data = shardgan.prepare("photos", "data/photos", size=28, channels=1)
given = {"run.total_kimg": 0.032, "run.name": "photos", "score.images": 8, "track.wandb": False}
given |= dict(text.split("=") for text in SETTINGS.split())
run = shardgan.train("fashion-mnist", given)
assert (data.name, str(run)) == ("photos", "runs/photos"), (data, run)
assert shardgan.evaluate(run, images=8)["efflite0_fake_images"] == 8
images = shardgan.sample(shardgan.load(run), seeds=range(3))
assert images.shape == (3, 1, 28, 28)

from launch.cli import cli
cli.main(["sample", str(run), "--out", "photos.png", "--count", "4"], standalone_mode=False)
cli.main(["export", str(run), "--out", "exported"], standalone_mode=False)

import pipeline, launch
from launch.slurm import jobs
from pathlib import Path
jobs.keep(Path("job"), [])
print(*(module.__file__ for module in (shardgan, pipeline, launch)), sep="\\n")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel and this one's libraries, but without this one's editable install."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pipeline", "launch", "slurm", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run([*pip, *made], check=True)
    shutil.rmtree(folder / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("shardgan-*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth are not read
    return python


def test_from_images_to_a_job_for_slurm_without_a_checkout(python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    numbers = np.random.default_rng(0)
    for number in range(48):
        (tmp_path / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(numbers.integers(0, 256, (32, 40, 3), np.uint8))
        image.save(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png")

    def run(*command: str | Path) -> str:
        ended = subprocess.run(
            command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    out = run(python, "-c", f"SETTINGS = {SETTINGS!r}\n{WALK}")
    assert all(line.startswith(f"{python.parents[1]}/lib/") for line in out.splitlines()[-3:]), out
    assert Image.open(tmp_path / "photos.png").size[0] > 2 * 28
    assert (tmp_path / "exported" / "G_ema.safetensors").exists()
    kept = {path.relative_to(tmp_path / "job" / "code").as_posix() for path in tmp_path.glob("job/code/*/*")}
    wanted = (
        "slurm/train.sbatch",
        "slurm/node.sh",
        "launch/venv.sh",
        "launch/accelerate",
        "pipeline/train.py",
    )
    assert kept >= {*wanted}
    settings = [*SETTINGS.split(), "run.total_kimg=1", "run.name=photos"]
    submit = [python.parent / "shardgan", "submit", "fashion-mnist", *settings]
    batch = run(*submit, "score.images=8", "track.wandb=false", "--nodes", "1", "--gpus", "0", "--dry-run")
    assert batch.startswith("#!/usr/bin/env bash\n") and "slurm/train.sbatch" in batch
