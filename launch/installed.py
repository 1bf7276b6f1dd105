"""Files of the project that are no modules: in a checkout, or in what a wheel installs."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import UserError
from pipeline.wording import did_you_mean

ROOT = Path(__file__).parents[1]  # the checkout, or site-packages
YAML = (".yaml", ".yml")


def slurm_scripts() -> Path:
    """The folder of train.sbatch and node.sh."""
    return _folder("slurm", "train.sbatch")


def configs() -> Path:
    """The folder of the published configs."""
    return _folder("configs", "fashion-mnist.yaml")


def config_path(given: str, what: str = "config") -> str:
    """The file of a published config that is given by its name alone, or the file that is given.

    Raises UserError, which says that there is no `what`, unless it exists or is called as a YAML file is.
    """
    path, published = Path(given), {file.stem: file for file in configs().glob("*.yaml")}
    if path.exists() or path.suffix.lower() in YAML:
        return given
    if given in published:
        return str(published[given])
    raise UserError(f"There is no {what} called {given}.{did_you_mean(path, published)}")


def _folder(name: str, file: str) -> Path:
    """Beside this package in a checkout; a wheel has it in `shardgan`, which is a name that is only ours."""
    checkout = ROOT / name
    return checkout if (checkout / file).is_file() else ROOT / "shardgan" / f"_{name}"
