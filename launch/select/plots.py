"""The pictures of a selection: scores with what each G makes, and what became of the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from launch.select.table import Row, Table
from pipeline.data.index import load_index
from pipeline.data.plan import heldout_plan
from pipeline.data.stages import load_stages
from pipeline.data.stream import heldout_batches
from pipeline.gan.draws import Draws
from pipeline.gan.networks import build_D, build_G
from pipeline.run.evaluate import from_latents
from pipeline.run.export import load_generator, load_run
from pipeline.run.grid import tile
from pipeline.run.rows import rows
from pipeline.run.spectrum import spectra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS, _ROWS = 3, 5  # images under each candidate
_INK = "#222222"


def curve(found: Table, path: Path) -> None:
    """Score over candidates: means with standard errors, single trials, the choices; images underneath."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in found.rows if row.outcomes]
    figure = plt.figure(figsize=(max(7, 1.1 * (len(rows) + 1)), 5.8), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.45, 1], squeeze=False)[:, 0]
    axes = above.subplots()
    places, labels = _places(rows)
    _draw_scores(axes, found, rows, places)
    axes.set_xticks(list(dict.fromkeys(places)), labels, rotation=0 if len(max(labels, key=len)) < 9 else 20)
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_ylabel(f"{found.score}\non held-out images")
    axes.set_xlabel(_common_key(rows))
    strips = [(_plain(row.label), _images(row)) for row in rows] + [("real", _reals(rows[0]))]
    panels = below.subplots(1, len(strips), squeeze=False)[0]
    for panel, (title, image) in zip(panels, strips, strict=True):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        panel.set_title(title, fontsize=8, color=_INK, wrap=True)
        panel.axis("off")
        panel.set_anchor("N")
    figure.savefig(path)
    plt.close(figure)


def weights(found: Table, path: Path) -> None:
    """Per player: norms of kernels over training, the penalty's share of the gradient, and one spectrum."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in found.rows if row.outcomes]
    figure, panels = plt.subplots(2, 3, figsize=(12, 6.8), dpi=90, layout="constrained")
    for player, (norms, shares, spectrum) in zip("GD", panels, strict=True):
        for row, style in zip(rows, _styles(rows), strict=True):
            lines = _metrics(row)
            kimg = [line["cur_nimg"] / 1000 for line in lines]
            kernels = [name for name in lines[-1] if name.startswith(f"Weights/{player}/norm/")]
            for number, name in enumerate(kernels):
                label = _plain(row.label) if not number else None
                norm = [line.get(name, math.nan) for line in lines]
                norms.plot(kimg, norm, lw=1, label=label, **style)
            share = [line.get(f"Gradients/{player}/penalty_share", math.nan) for line in lines]
            shares.plot(kimg, share, **style)
            name, values = _largest_spectrum(row, player)
            spectrum.plot(range(1, len(values) + 1), values, **style)
        norms.set(title=f"{player}: norm of each kernel", xlabel="kimg", yscale="log")
        shares.set(title=f"{player}: penalty's share of the gradient", xlabel="kimg")
        spectrum.set(title=f"{player}: singular values of\n{name}", xlabel="number", yscale="log")
    one_each = panels[0][0].get_legend_handles_labels()
    figure.legend(*one_each, loc="outside lower center", ncols=min(len(rows), 8), fontsize=8, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def _draw_scores(axes: Axes, found: Table, rows: list[Row], places: list[float]) -> None:
    for row, x in zip(rows, places, strict=True):
        axes.plot(
            [x] * len(row.outcomes), [o.score for o in row.outcomes], "o", ms=4, color="#9bb7d4", zorder=1
        )
        error = None if math.isnan(row.error) else row.error
        axes.errorbar(x, row.mean, yerr=error, fmt="o", ms=6, capsize=4, color="#1f4e79", zorder=2)
    if _numbers(rows):
        axes.plot(places, [row.mean for row in rows], color="#1f4e79", lw=1, zorder=0)
        positive = [x for x in places if x > 0]
        axes.set_xscale("symlog", linthresh=min(positive, default=1.0), linscale=0.6)
        if 0 in places:
            axes.axvline(0, color="#bbbbbb", lw=0.8, ls=":")
    best, choice = found.minimum, found.choice
    if best is not None and choice is not None and not math.isnan(best.error):
        limit = best.mean + best.error
        axes.axhline(limit, color="#c05020", lw=0.8, ls="--", label="minimum + one standard error")
    if choice is not None:
        x = places[[row.arm for row in rows].index(choice.arm)]
        axes.plot(
            x, choice.mean, "o", ms=13, mfc="none", mec="#c05020", label=f"chosen: {_plain(choice.arm.name)}"
        )
    axes.legend(fontsize=8, frameon=False)
    means = [row.mean for row in rows]
    if min(means) > 0 and max(means) > 2 * min(means):  # or a hopeless one hides what the others differ by
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")


def _places(rows: list[Row]) -> tuple[list[float], list[str]]:
    """Where each candidate stands on the x axis, and the ticks: by value for one number, else in a row."""
    numbers = _numbers(rows)
    if numbers:
        return numbers, [f"{x:g}" for x in dict.fromkeys(numbers)]
    return [float(i) for i in range(len(rows))], [_plain(row.label) for row in rows]


def _plain(name: str) -> str:
    """Where two $ stand in a text, matplotlib reads a formula."""
    return name.replace("$", r"\$")


def _styles(rows: list[Row]) -> list[dict[str, Any]]:
    """How the lines of each candidate look: in order for the values of one number, else plainly different."""
    from matplotlib import pyplot as plt

    if _numbers(rows):
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(rows)))
        return [{"color": colour} for colour in colours]
    colour_map, many = ("tab10", 10) if len(rows) <= 10 else ("tab20", 20)
    dashes = ["-", "--", ":", "-."]
    return [
        {"color": plt.get_cmap(colour_map)(i % many), "ls": dashes[i // many % len(dashes)]}
        for i in range(len(rows))
    ]


def _numbers(rows: list[Row]) -> list[float]:
    """The values of a grid over one number; empty for anything else."""
    found = [row.arm.number(key) for row in rows for key in row.arm.values]
    one = all(len(row.arm.values) == 1 for row in rows)
    return [x for x in found if x is not None] if one and None not in found else []


def _common_key(rows: list[Row]) -> str:
    return next(iter(rows[0].arm.values)) if _numbers(rows) else ""


def _images(row: Row) -> NDArray[np.uint8]:
    """What G_ema of a candidate's first trial makes of the same latents."""
    folder = row.outcomes[0].trial.folder
    settings, checkpoint, state = load_run(folder)
    G = load_generator(settings, checkpoint, state)
    z, c = Draws(0, settings.G.z_dim, state.label_frequencies).grid(_COLUMNS * _ROWS)
    return tile(from_latents(G, z, c, torch.device("cpu"))(0, len(z)), _COLUMNS)


def _reals(row: Row) -> NDArray[np.uint8]:
    """Held-out images of the same trial."""
    settings = row.outcomes[0].trial.settings
    data, count = settings.data, _COLUMNS * _ROWS
    assert data.train is not None
    index = load_index(data.train)
    plan = heldout_plan(index.sizes, settings.run.seed, data.window, data.holdout, data.folds, data.fold)
    batch, _ = next(
        heldout_batches(
            index,
            plan,
            batch=count,
            rank=0,
            world=1,
            size=data.size,
            channels=data.channels,
            conditional=False,
            limit=count,
            stages=load_stages(data.stages),
        )
    )
    return tile(batch.images, _COLUMNS)


def _metrics(row: Row) -> list[dict[str, Any]]:
    found = rows(row.outcomes[0].trial.folder / "metrics.jsonl")
    return [line for line in found if line["cur_nimg"]]


def _largest_spectrum(row: Row, player: str) -> tuple[str, list[float]]:
    settings, checkpoint, state = load_run(row.outcomes[0].trial.folder)
    network = (build_G if player == "G" else build_D)(settings, state.num_classes)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    name, values = next(iter(spectra(checkpoint, player, shapes, largest=1).items()))
    return name, values.tolist()
