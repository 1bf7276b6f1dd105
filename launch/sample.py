"""`shardgan sample`: a grid of images from a run's G_ema."""

from __future__ import annotations

import math
from pathlib import Path

import click
import torch
from torch import Tensor

from launch.checkpoint import checkpoint_option
from launch.paths import UserPath
from pipeline.config import UserError
from pipeline.gan.draws import Draws
from pipeline.run.evaluate import from_latents
from pipeline.run.export import load_generator
from pipeline.run.grid import FORMATS, save_grid
from pipeline.run.images import images_of
from pipeline.run.state import State

_STEPS = 8  # images from one end of an interpolation to the other


@click.command()
@click.argument("run", type=UserPath())
@click.option("--out", type=UserPath(), required=True, help="The picture to write: .png, .jpg or .webp.")
@click.option("--count", type=click.IntRange(min=1), default=64, show_default=True, help="How many images.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the latents.")
@click.option(
    "--interpolate",
    is_flag=True,
    help=f"Rows of {_STEPS} images, each from one latent to another; the last row is filled up.",
)
@click.option("--classes", metavar="0,3,…", help="Only these classes, a column each; default: all.")
@checkpoint_option
def sample(
    run: Path, out: Path, count: int, seed: int, interpolate: bool, classes: str | None, checkpoint: str
) -> None:
    """Write images from the moving average of G in the run folder RUN as one picture."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out}: not a known picture format ({', '.join(FORMATS)}).")
    G, config, state = load_generator(run, checkpoint)
    draws = Draws(seed, config.G.z_dim, _frequencies(state, classes))
    z, c, columns = (
        _interpolation(draws, count) if interpolate else (*draws.grid(count), draws.grid_columns(count))
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generate = from_latents(G.to(device), z, c, device, images_of(config.data, device))
    parts = [generate(start, min(64, len(z) - start)).cpu() for start in range(0, len(z), 64)]
    try:
        save_grid(torch.cat(parts), out, columns)
    except OSError as error:
        raise UserError(f"{out} could not be written: {error}") from None
    click.echo(f"{len(z)} images after {state.cur_nimg / 1000:g} kimg: {out}")


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation (White 2016): a, b [n, d] and t [k] → [n, k, d], from a at t = 0 to b at t = 1.

    A straight line between normal latents passes closer to 0 than the latents that G was trained on.
    """
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle = cosine.acos()[:, None, None]
    a, b, t = a[:, None], b[:, None], t[None, :, None]
    arc = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return torch.where(angle.sin() > 1e-4, arc, (1 - t) * a + t * b)  # (anti)parallel: no unique arc


def _interpolation(draws: Draws, count: int) -> tuple[Tensor, Tensor | None, int]:
    """Latents and labels of rows from one latent to another within a class, and the number of columns."""
    columns = max(2, min(_STEPS, count))
    rows = math.ceil(count / columns)
    ends = draws.latents("interpolate", 0, 2 * rows).z
    z = slerp(ends[0::2], ends[1::2], torch.linspace(0, 1, columns)).flatten(0, 1)
    _, c = draws.grid(rows)
    return z, None if c is None else c.repeat_interleave(columns), columns


def _frequencies(state: State, classes: str | None) -> list[float] | None:
    """Frequencies to draw labels by: the training set's, or equal ones of the wanted classes; None if
    unconditional."""
    if classes is None:
        return state.label_frequencies
    if state.label_frequencies is None:
        raise UserError(
            "--classes: this run is unconditional (data.conditional=false), so its G has no classes."
        )
    try:
        wanted = {int(text) for text in classes.split(",")}
    except ValueError:
        raise UserError(f"--classes {classes}: not numbers separated by commas, as in 0,3,7.") from None
    if unknown := sorted(wanted - set(range(state.num_classes))):
        raise UserError(f"--classes: no class {unknown[0]}; this run has 0 to {state.num_classes - 1}.")
    return [float(label in wanted) for label in range(state.num_classes)]
