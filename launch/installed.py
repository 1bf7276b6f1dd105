"""Files of the project that are no modules: in a checkout, or in what a wheel installs."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]  # the checkout, or site-packages


def slurm_scripts() -> Path:
    """The folder of train.sbatch and node.sh."""
    return _folder("slurm", "train.sbatch")


def configs() -> Path:
    """The folder of the published configs."""
    return _folder("configs", "fashion-mnist.yaml")


def config_path(given: str | Path) -> str | Path:
    """The file of a published config that is given by its name alone; anything else as it is."""
    named = configs() / f"{given}.yaml"
    return named if Path(given).name == str(given) and not Path(given).exists() and named.is_file() else given


def _folder(name: str, file: str) -> Path:
    """Beside this package in a checkout; a wheel has it in `shardgan`, which is a name that is only ours."""
    checkout = ROOT / name
    return checkout if (checkout / file).is_file() else ROOT / "shardgan" / f"_{name}"
