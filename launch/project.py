"""`shardgan project`: the latents of real images, with a picture of the way to each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.checkpoint import checkpoint_option
from launch.paths import UserPath

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from pipeline.config import Data
    from pipeline.run.projection import Projection, Projector


@click.command()
@click.argument("run", type=UserPath())
@click.argument("images", metavar="IMAGE...", type=UserPath(), nargs=-1, required=True)
@click.option("--out", type=UserPath(), help="The folder to write to. Default: RUN/projected.")
@click.option("--class", "label", metavar="CLASS", help="By number or name. Default: all are tried.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the search.")
@checkpoint_option
def project(
    run: Path, images: tuple[Path, ...], out: Path | None, label: str | None, seed: int, checkpoint: str
) -> None:
    """Find latents from which the moving average of G in the run folder RUN makes the given images.

    Each IMAGE, of any size and format that `prepare` reads, is cut to a square and scaled. For x.jpg, OUT
    gets x.safetensors with the latent, z or (for a G that has one) w, float32 [1, d], and the class c, int64
    [1], if there are classes; and x-projected.png: the image, what G makes at the start of the search, three
    times on the way, and at its end. Of several images projected.png shows all. The table gives the mean
    squared error of the pixels (0 is black, 1 is white) at start and end.
    """
    import torch

    from pipeline.config import UserError
    from pipeline.run.export import load_generator
    from pipeline.run.projection import Projector
    from pipeline.run.sampling import Sampler

    out = run / "projected" if out is None else out
    _check_names(images, out)
    G, config, state = load_generator(run, checkpoint)
    if config.data.latents:
        raise UserError(f"{run} was trained on latents: its G makes no images that could be compared.")
    sampler = Sampler(G, config, state.label_frequencies, state.classes)
    wanted = None if label is None else sampler.classes([label])[0]
    targets = torch.stack([_read(path, config.data) for path in images])
    for path, target in zip(images, targets, strict=True):
        _refuse_others(_files(out, path)[0], path, _digest(target))
    _make(out)
    projector = Projector(
        G, config.G.z_dim, sampler.device, num_classes=state.num_classes, label=wanted, seed=seed
    )
    notes = {"run": str(config.run.name), "cur_nimg": str(state.cur_nimg), "seed": str(seed)}
    _project(projector, images, targets, out, sampler.names, notes)


def _check_names(images: Sequence[Path], out: Path) -> None:
    """Before anything is read or written: no file twice, and no image of the user's overwritten."""
    from pipeline.config import UserError

    seen: dict[str, Path] = {}
    given = {path.resolve() for path in images}
    for path in images:
        if path.stem in seen:
            raise UserError(
                f"{seen[path.stem]} and {path} have the same name, and so would their results. Project them "
                "one at a time, each with its own --out."
            )
        seen[path.stem] = path
        if clash := given & {file.resolve() for file in _files(out, path)}:
            raise UserError(f"{clash.pop()} would be overwritten: give another folder with --out.")


def _files(out: Path, image: Path) -> tuple[Path, Path, Path]:
    """Latent, picture, and the picture of all."""
    return out / f"{image.stem}.safetensors", out / f"{image.stem}-projected.png", out / "projected.png"


def _read(path: Path, data: Data) -> Tensor:
    """uint8 [C, H, W], as `prepare --fit crop` makes it."""
    import numpy as np
    import torch

    from pipeline.config import UserError
    from pipeline.data.prepare.pictures import LeftOutError, Picture, fitted, open_picture

    try:
        picture = open_picture(path.read_bytes())
        if not isinstance(picture, Picture):
            raise UserError(f"{path} is a latent, not an image.")
        found = fitted(picture, data.size, "crop", data.channels, None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except LeftOutError as error:
        raise UserError(f"{path} cannot be used: {error}.") from None
    assert found is not None
    pixels = np.array(found.image).reshape(data.size, data.size, data.channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _digest(target: Tensor) -> str:
    """SHA-256 of an image's pixels, as they are compared."""
    return sha256(target.numpy().tobytes()).hexdigest()


def _refuse_others(latent: Path, image: Path, digest: str) -> None:
    """Raises UserError if the file holds the latent of another image of the same name."""
    from safetensors import SafetensorError, safe_open

    from pipeline.config import UserError

    try:
        with safe_open(latent, "pt") as file:
            before = (file.metadata() or {}).get("image", digest)
    except (OSError, SafetensorError):  # none is there, or a damaged one
        return
    if before != digest:
        raise UserError(f"{latent} is of another image than {image}. Give another folder with --out.")


def _make(out: Path) -> None:
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)


def _project(
    projector: Projector,
    images: Sequence[Path],
    targets: Tensor,
    out: Path,
    names: Sequence[str],
    notes: dict[str, str],
) -> None:
    """One image after the other, written as soon as it is found."""
    import torch

    from pipeline.run.grid import save_grid

    widest = max(len(_shown(path)) for path in images)
    click.echo(f"{'':{widest}}   first    last  times closer")
    strips = []
    with _bar(len(images) * projector.steps) as bar:
        found = projector.project(targets, lambda: bar.advance(bar.task_ids[0]))
        for path, target, one in zip(images, targets, found, strict=True):
            latent, picture, of_all = _files(out, path)
            strips.append(torch.cat([target[None], one.way]))
            with _writing(out):
                _save(latent, one, notes | {"image": _digest(target)})
                save_grid(strips[-1], picture, len(strips[-1]))
            bar.stop()
            closer = f"{one.first / max(one.last, 1e-12):12.1f}"
            label = "" if one.label is None else f"  {names[one.label]}"
            click.echo(f"{_shown(path):{widest}}  {one.first:.4f}  {one.last:.4f}  {closer}{label}")
            bar.start()
    if len(strips) > 1:
        with _writing(out):
            save_grid(torch.cat(strips), of_all, len(strips[0]))
    click.echo(f"latents and pictures: {out}")


def _save(file: Path, one: Projection, notes: dict[str, str]) -> None:
    import torch

    from pipeline.durable import save_tensors, whole

    tensors: dict[str, Tensor] = {one.kind: one.latent[None]}
    if one.label is not None:
        tensors["c"] = torch.tensor([one.label])
    with whole(file) as partial:
        save_tensors(tensors, partial, notes | {"first": f"{one.first:g}", "last": f"{one.last:g}"})


def _bar(total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        "projecting",
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        disable=not console.is_terminal,
    )
    bar.add_task("", total=total)
    return bar


def _shown(path: Path) -> str:
    from pipeline.wording import one_line

    return one_line(path.name)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    from pipeline.config import UserError
    from pipeline.wording import why

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out} could not be written: {why(error)}. Give another folder with --out."
        ) from None
