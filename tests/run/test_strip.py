"""What runs make, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from launch.compare import compare as command
from pipeline.errors import UserError
from pipeline.run import strip
from pipeline.run.grid import save_grid
from pipeline.run.history import read_histories

KID = "Metrics/kid_efflite0"
SIZE = 28
COLUMNS = 8


def images(first: int) -> torch.Tensor:
    """64 even images, of which no two in a row or column are equal."""
    levels = (first + torch.arange(64)).to(torch.uint8)
    return levels.view(64, 1, 1, 1).repeat(1, 1, SIZE, SIZE)


def a_run(folder: Path, l2: float, kid: float, first: int, heldout: str = "a", titles: bool = False) -> Path:
    """Its last grid has images of the levels first, first + 1, …; an earlier one is white; reals begin at
    128."""
    (folder / "samples").mkdir(parents=True)
    rows = [{"cur_nimg": 1000 * n, KID: value} for n, value in enumerate((9.0, kid), 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    penalty = f"penalty: {{G: {{l2: {l2}}}, D: {{l2: {l2}}}}}"
    (folder / "config.yaml").write_text(f"data: {{train: x, size: {SIZE}}}\n{penalty}\n")
    (folder / "reference.json").write_text(json.dumps({"heldout": {"index": heldout}}))
    named = [str(column) for column in range(COLUMNS)] if titles else ()
    for kimg, shown in ((1, torch.full((64, 1, SIZE, SIZE), 255, dtype=torch.uint8)), (2, images(first))):
        path = folder / "samples" / f"fakes{kimg:06d}.png"
        save_grid(shown, path, COLUMNS, named, {"cur_nimg": str(1000 * kimg)})
    save_grid(images(128), folder / "samples" / "reals.png", COLUMNS, named)
    return folder


def panels(figure) -> dict[str, tuple[str, np.ndarray]]:
    """Title → the text below, and the levels of the images that are drawn."""
    found = {}
    for axes in figure.axes:
        if axes.images:
            pixels = np.asarray(axes.images[0].get_array())[:, :, 0]
            middles = [pixels[2 + 58 * row + 28, 2 + 28 :: 58] for row in range(6)]
            found[axes.get_title()] = (axes.texts[0].get_text(), np.stack(middles))
    return found


@pytest.mark.parametrize("titles", [False, True])
def test_the_first_images_of_reals_and_of_each_runs_last_grid_with_what_sets_it_apart(tmp_path, titles):
    runs = [
        a_run(tmp_path / "a", 0, 1.25, 3, titles=titles),
        a_run(tmp_path / "b", 1e-3, 0.5, 40, titles=titles),
    ]
    drawn = panels(strip.draw(read_histories(runs)))
    expected = np.arange(6)[:, None] * COLUMNS + np.arange(6)
    assert list(drawn) == ["real images", "penalty.l2 = 0", "penalty.l2 = 0.001"]
    assert [below for below, _ in drawn.values()] == ["", "KID 1.25", "KID 0.5"]
    for (_, levels), first in zip(drawn.values(), (128, 3, 40), strict=True):
        np.testing.assert_array_equal(levels, first + expected)


def test_reals_and_scores_are_left_out_where_runs_hold_out_others_and_names_stand_where_nothing_differs(
    tmp_path,
):
    runs = [a_run(tmp_path / "a", 0, 1, 0), a_run(tmp_path / "b", 0, 1, 9, heldout="b")]
    drawn = panels(strip.draw(read_histories(runs)))
    assert {title: below for title, (below, _) in drawn.items()} == {"a": "", "b": ""}


def test_a_grid_of_decoded_images_is_cut_between_its_own_images(tmp_path):
    run = a_run(tmp_path / "a", 0, 1, 3)
    (run / "config.yaml").write_text("data: {train: x, size: 7}\n")  # that of latents
    (_, levels), (_, again) = panels(strip.draw(read_histories([run]))).values()
    assert levels[5, 5] == 128 + 5 * COLUMNS + 5 and again[0, 1] == 4 and again[1, 0] == 3 + COLUMNS


def test_a_run_without_a_grid_has_an_empty_panel_and_none_at_all_is_refused(tmp_path):
    runs = [a_run(tmp_path / "a", 0, 1, 0), a_run(tmp_path / "b", 1, 1, 9)]
    for grid in (runs[1] / "samples").glob("fakes*.png"):
        grid.unlink()
    figure = strip.draw(read_histories(runs))
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["", "KID 1", "no sample grid"]
    with pytest.raises(UserError, match="no sample grids yet"):
        strip.draw(read_histories(runs[1:]))
    many = [a_run(tmp_path / "many" / str(n), 0, 1, 0) for n in range(strip.MOST + 1)]
    with pytest.raises(UserError, match="At most 12 runs"):
        strip.draw(read_histories(many))


def test_the_command_draws_beside_the_table_and_checks_the_name_first(tmp_path):
    runs = [str(a_run(tmp_path / "a", 0, 1, 0)), str(a_run(tmp_path / "b", 1, 1, 9))]
    refused = CliRunner().invoke(command, [*runs, "--out", str(tmp_path / "x.doc")])
    assert refused.exit_code == 2 and "has to end in .png" in refused.output and "|" not in refused.output
    done = CliRunner().invoke(command, [*runs, "--out", str(tmp_path / "x.png")], catch_exceptions=False)
    assert done.exit_code == 0 and "| b | 2 |" in done.output
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width == 900
