"""What others need of a trained G who have no ShardGAN: a picture of its images, and G as a program."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from pipeline.config import Config, UserError
from pipeline.gan.draws import Draws
from pipeline.run import programs
from pipeline.run.grid import save_grid
from pipeline.run.sampling import Sampler
from pipeline.run.state import State

SAMPLES = "samples.png"
_WIDTH = 1100  # pixels of samples.png, if its images are no wider
_MOST = 64  # images in it


def write_portable(
    G: nn.Module, config: Config, state: State, out: Path, onnx: bool
) -> tuple[list[str], list[str]]:
    """Write samples.png, G_ema.pt2 and, if asked for, G_ema.onnx to `out`.

    Returns the files' names, and a line about each that could not be written: of a network or a decoder of
    the user's own. Raises UserError without the packages of `onnx`, OSError.
    """
    files, remarks = list[str](), list[str]()
    try:
        _write_samples(G, config, state, out / SAMPLES)
        files.append(SAMPLES)
    except UserError as error:
        remarks.append(f"{SAMPLES} is not written: {error}")
    draw = programs.inputs_of(config.G.z_dim, state.num_classes)
    try:
        program = programs.record(G, draw)
    except programs.UnfitError as error:
        return files, [*remarks, f"G_ema.pt2 is not written: {error}"]
    kinds = {"G_ema.pt2": programs.write_pt2} | ({"G_ema.onnx": programs.write_onnx} if onnx else {})
    for name, write in kinds.items():
        with tempfile.TemporaryDirectory(dir=out, prefix=".") as folder:  # until they are known to be right
            try:
                write(program, G, draw, Path(folder) / name)
            except programs.UnfitError as error:
                remarks.append(f"{name} is not written: {error}")
                continue
            for file in sorted(Path(folder).iterdir()):
                files.append(file.replace(out / file.name).name)
    return files, remarks


def _write_samples(G: nn.Module, config: Config, state: State, file: Path) -> None:
    """Images of the run's own sample grids, as many as fit in some 1,100 pixels across, and as many rows."""
    sampler = Sampler(G, config, state.label_frequencies)
    draws = Draws(config.run.seed, config.G.z_dim, state.label_frequencies)
    z, c = draws.grid(_MOST)
    try:
        columns = min(draws.grid_columns(_MOST), max(2, _WIDTH // config.data.size))
        count = min(_MOST, columns**2)
        images = torch.cat([*sampler.images(z[:count], None if c is None else c[:count])])
    finally:
        G.cpu()
    save_grid(images, file, columns)
