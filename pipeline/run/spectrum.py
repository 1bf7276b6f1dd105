"""Singular values of the players' largest kernels, from a checkpoint of any strategy, on one process.

What a weight penalty does shows here: L2 shrinks all directions in proportion, and those that the loss does
not hold up vanish.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.run.checkpoint import Pieces, find
from pipeline.run.rows import append, rows

Shapes = Mapping[str, torch.Size]  # parameter → shape of the whole

_log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()


def spectra(checkpoint: Path, player: str, shapes: Shapes, largest: int = 3) -> dict[str, Tensor]:
    """{kernel: its singular values, the greatest first} of the `largest` kernels by elements, as matrices of
    their first axis by all others."""
    pieces = Pieces(checkpoint, player)
    kernels = [name for name in pieces.names() if len(shapes[name]) > 1]
    found = {}
    for name in sorted(kernels, key=lambda name: (-shapes[name].numel(), name))[:largest]:
        kernel = pieces("weights", name, 0, shapes[name].numel()).view(shapes[name])
        found[name] = torch.linalg.svdvals(kernel.flatten(1))
    return found


def record(
    folder: Path, players: Mapping[str, Shapes], still_ours: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Add a line on a run's newest checkpoint to spectrum.jsonl, once; returns what of it fits a chart.

    For the rank that writes, in a thread beside training: it reads what has been written, and talks to no
    other rank. A checkpoint that gives way to a newer one meanwhile is passed over.
    """
    with _one_at_a_time:
        newest = next(iter(find(folder / "checkpoints")), None)
        if newest is None:
            return {}
        checkpoint, file = folder / "checkpoints" / str(newest), folder / "spectrum.jsonl"
        try:
            found = {
                f"{player}/{name}": values
                for player, shapes in players.items()
                for name, values in spectra(checkpoint, player, shapes).items()
            }
            if newest not in [row["cur_nimg"] for row in rows(file)]:
                values = {name: [float(f"{s:.6g}") for s in v.tolist()] for name, v in found.items()}
                still_ours()
                append(file, {"cur_nimg": newest, **values})
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            _log.warning("no spectrum of checkpoint %s: %s", newest, error)
            return {}
    largest = {f"Spectrum/{name}/largest": float(values[0]) for name, values in found.items()}
    ranks = {f"Spectrum/{name}/stable_rank": _stable_rank(values) for name, values in found.items()}
    return largest | ranks


def draw(folder: Path) -> Path | None:
    """A picture of spectrum.jsonl: a panel per kernel, a line per checkpoint, the later the darker.

    None if there is nothing to draw. Raises OSError when it cannot be written.
    """
    from matplotlib.figure import Figure  # here, as it takes a second to import

    lines = rows(folder / "spectrum.jsonl")
    names = [name for name in (lines[-1] if lines else ()) if name != "cur_nimg"]
    if not names:
        return None
    across = -(-len(names) // 2)
    figure = Figure(figsize=(4 * across, 6), layout="constrained")
    panels = figure.subplots(-(-len(names) // across), across, squeeze=False).flat
    for panel, name in zip(panels, names, strict=False):
        for number, row in enumerate(lines, start=1):
            label = f"{row['cur_nimg'] / 1000:g} kimg" if number in (1, len(lines)) else None
            values, shade = row.get(name, []), str(0.8 * (1 - number / len(lines)))
            panel.plot(range(1, len(values) + 1), values, color=shade, label=label, marker=".", markersize=3)
        panel.set(title=name, xlabel="number", ylabel="singular value", yscale="log")
        panel.legend(frameon=False)
    path, last = folder / "samples" / "spectra.png", str(lines[-1]["cur_nimg"])
    partial = path.with_name(f".{path.name}")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(partial, format="png", dpi=100, metadata={"chart": "Weights/spectra", "cur_nimg": last})
    partial.replace(path)
    return path


def _stable_rank(values: Tensor) -> float:
    """Σ σ² / max σ²: how many directions carry the kernel; 0 of one that has vanished."""
    squares = values.double().square()
    return float(squares.sum() / squares[0]) if squares[0] else 0.0
