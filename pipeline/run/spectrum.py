"""Singular values of the players' largest kernels in a run's checkpoints.

They show what a weight penalty does: L2 shrinks all directions in proportion, and those that the loss does
not hold up vanish.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pipeline.config import Config
from pipeline.durable import whole
from pipeline.gan.networks import build_D, build_G
from pipeline.run.checkpoint import Pieces, find, read_state
from pipeline.run.folder import begun
from pipeline.run.panels import label_log
from pipeline.run.rows import append, rows
from pipeline.wording import in_kimg

_LARGEST = 3  # kernels of each player, by elements

_log = logging.getLogger(__name__)


def record(folder: Path) -> dict[str, float]:
    """Add a row to spectrum.jsonl for each checkpoint that it lacks; returns the last row's summary."""
    file, checkpoints = folder / "spectrum.jsonl", folder / "checkpoints"
    try:
        config, known = begun(folder), {row["cur_nimg"] for row in rows(file)}
        for nimg in sorted(set(find(checkpoints)) - known):
            append(file, {"cur_nimg": nimg, **dict(_spectra(config, checkpoints / str(nimg)))})
        last = {name: values for row in rows(file)[-1:] for name, values in row.items() if name != "cur_nimg"}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        _log.warning("spectrum.jsonl is not complete: %s", error)
        return {}
    largest = {f"Spectrum/{name}/largest": values[0] for name, values in last.items()}
    return largest | {f"Spectrum/{name}/stable_rank": _stable_rank(values) for name, values in last.items()}


def draw(folder: Path) -> Path | None:
    """A picture of spectrum.jsonl: a panel per kernel, G's above D's, and a line per checkpoint,
    the later the darker.

    None if there is nothing to draw. Raises OSError when it cannot be written.
    """
    from matplotlib.figure import Figure  # here, as it takes a second to import

    lines = rows(folder / "spectrum.jsonl")
    names = [name for name in (lines[-1] if lines else ()) if name != "cur_nimg"]
    if not names:
        return None
    by_player = [[name for name in names if name.startswith(player)] for player in ("G/", "D/")]
    across = max(len(kernels) for kernels in by_player)
    figure = Figure(figsize=(4 * across, 6), layout="constrained")
    for panels, kernels in zip(figure.subplots(2, across, squeeze=False), by_player, strict=True):
        for panel, name in zip(panels, kernels, strict=False):
            _draw_kernel(panel, name, lines)
        for panel in panels[len(kernels) :]:
            panel.set_axis_off()
    path = folder / "samples" / "spectra.png"
    notes = {"chart": "Weights/spectra", "cur_nimg": str(lines[-1]["cur_nimg"])}
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=100, metadata=notes)
    return path


def _draw_kernel(panel: Any, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, row in enumerate(lines, start=1):
        label = f"{in_kimg(row['cur_nimg'] / 1000)} kimg" if number in (1, len(lines)) else None
        values, shade = row.get(name, []), str(0.8 * (1 - number / len(lines)))
        panel.plot(range(1, len(values) + 1), values, color=shade, label=label, marker=".", markersize=3)
    panel.set(title=name, xlabel="number", ylabel="singular value", yscale="log")
    label_log(panel)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(frameon=False)


def _spectra(config: Config, checkpoint: Path) -> Iterator[tuple[str, list[float]]]:
    """(player/kernel, singular values, descending) of each player's largest kernels, the largest first, as
    matrices of their first axis by all others. A single row or column has no spectrum.

    Raises OSError, SafetensorError, KeyError or ValueError if they cannot be read.
    """
    classes = read_state(checkpoint).num_classes
    for player, network in ("G", build_G(config, classes)), ("D", build_D(config, classes)):
        pieces = Pieces(checkpoint, player)
        trained = {name: p.shape for name, p in network.named_parameters() if p.requires_grad and p.ndim > 1}
        shapes = {name: shape for name, shape in trained.items() if min(shape[0], shape[1:].numel()) > 1}
        for name in sorted(shapes, key=lambda name: (-shapes[name].numel(), name))[:_LARGEST]:
            kernel = pieces("weights", name, 0, shapes[name].numel()).view(shapes[name])
            values = torch.linalg.svdvals(kernel.flatten(1))
            yield f"{player}/{name}", [float(f"{value:.6g}") for value in values.tolist()]


def _stable_rank(values: Sequence[float]) -> float:
    """Σ σ² / max σ²: how many directions carry the kernel; 0 of one that has vanished."""
    return sum(s * s for s in values) / values[0] ** 2 if values[0] else 0.0
