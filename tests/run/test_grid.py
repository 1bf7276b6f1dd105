"""Grids of images, read back from the file."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import UserError
from pipeline.gan.draws import Draws
from pipeline.gan.images import to_uint8
from pipeline.run import sample_grids
from pipeline.run.grid import column_titles, save_grid, tile, whole_rows
from pipeline.run.report import MainReport, Report
from pipeline.run.sample_grids import SampleGrids
from pipeline.run.saved_grids import first_images, grids_of, opened, shown_at


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_found_at_its_place(tmp_path, channels):
    images = torch.randint(0, 256, (5, channels, 28, 28), dtype=torch.uint8)
    save_grid(images, tmp_path / "deep" / "grid.png", columns=3, notes={"chart": "Samples/λ"})
    picture = Image.open(tmp_path / "deep" / "grid.png")
    assert picture.info["chart"] == "Samples/λ"
    sheet = np.asarray(picture)
    if channels == 1:
        sheet = sheet[..., None]
    assert sheet.shape == (2 * 58 + 2, 3 * 58 + 2, channels)  # 28 px are doubled
    for place, image in enumerate(images):
        y, x = 2 + place // 3 * 58, 2 + place % 3 * 58
        found = sheet[y : y + 56 : 2, x : x + 56 : 2].transpose(2, 0, 1)
        assert np.array_equal(found, image.numpy())
    assert (sheet[:2] == 255).all() and (sheet[60:, 2 * 58 + 2 :] == 255).all()  # gaps, the empty place
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_large_images_and_a_given_scale_are_taken_as_they_are():
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert tile(images, columns=8).shape == (68, 68, 3)


def test_what_is_not_uint8_images_is_refused():
    for wrong in (torch.zeros(4, 3, 8, 8), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            tile(wrong, columns=2)


def test_quantisation_rounds_clamps_and_inverts_the_reading_of_stored_images():
    stored = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(stored.float() / 127.5 - 1), stored)
    outside = torch.tensor([-2.0, 2.0, torch.nan, torch.inf, -torch.inf])
    assert to_uint8(outside).tolist() == [0, 255, 0, 255, 0]


def test_what_no_format_is_named_by_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png"):
        save_grid(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), tmp_path / "x.gif", columns=2)


@pytest.mark.parametrize(("suffix", "fit"), [("webp", 282), ("jpg", 1129), ("JPEG", 1129)])
def test_a_picture_too_large_for_its_format_is_refused(tmp_path, suffix, fit):
    path, images = tmp_path / "tall" / f"x.{suffix}", torch.zeros(fit + 1, 1, 28, 28, dtype=torch.uint8)
    with pytest.raises(UserError, match=rf"is too large for \.{suffix}, .* Use \.png, fewer seeds, or"):
        save_grid(images, path, columns=1)
    assert not path.parent.exists()
    save_grid(images[:fit], path, columns=1)
    save_grid(images, path.with_suffix(".png"), columns=1)


def test_sheets_of_one_kimg_stand_side_by_side(tmp_path):
    """In the order of training, and under the same name when a resumed run writes one again."""
    sheets = SampleGrids(tmp_path, OneRank(), Report())
    moments = [0, 512, 1024, 1536, 1984, 50_048]
    for time in range(2):
        for shade, cur_nimg in enumerate(moments):
            make = lambda s=shade: torch.full((64, 1, 8, 8), s, dtype=torch.uint8)  # noqa: E731
            sheets.fakes(make, Draws(0, 4, None), cur_nimg)
            assert shown_at(tmp_path / "samples" / "latest.png") == cur_nimg
        found = sorted((tmp_path / "samples").glob("fakes*"))
        assert [shown_at(path) for path in found] == moments, time
    names = [path.name for path in found]
    assert names[:3] == ["fakes000000.png", "fakes000000_512.png", "fakes000001.png"]
    assert names[-1] == "fakes000050.png"


def test_titles_stand_above_their_columns():
    """Cut where they are longer; the images lie below as without them."""
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    plain, titled = tile(images, 3), tile(images, 3, ("boot", "", "a name much longer than its column"))
    head = titled[: len(titled) - len(plain)]
    assert np.array_equal(titled[len(head) :], plain) and 14 <= len(head) <= 20
    ink = [(head[:, 2 + 66 * column : 66 * (column + 1)] < 128).any(axis=(0, 2)) for column in range(3)]
    assert ink[0].any() and not ink[1].any() and ink[2].sum() > ink[0].sum()
    assert abs(np.flatnonzero(ink[0]).mean() - 32) < 2, "in the middle"
    grey = tile(images[:, :1], 3, ("boot", "", "x"))
    assert grey.shape == titled.shape[:2]


def test_titles_have_the_letters_of_european_languages():
    """Not the box of a letter that is missing: the private one U+E000 is in no font."""
    images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8)
    head = tile(images, 8, ("ж", "я", "λ", "Ω", "ß", "ő", "t", "\ue000"))[:16].reshape(16, -1)[:, 2:]
    letters = [head[:, 58 * column : 58 * column + 56] for column in range(8)]
    for place, letter in enumerate(letters):
        assert (letter < 128).any(), place
        assert not any(np.array_equal(letter, other) for other in letters[place + 1 :]), place


def test_titles_are_of_columns_that_hold_one_class_each():
    names = ("a", "b", "c")
    assert column_titles(torch.tensor([2, 0, 2, 0]), 2, names) == ("c", "a")
    for c, columns in [(None, 2), (torch.tensor([2, 0, 1, 0]), 2), (torch.tensor([1, 1, 1, 1]), 2)]:
        assert column_titles(c, columns, names) == ()
    assert [whole_rows(*pair) for pair in [(64, 10), (64, 8), (4, 10), (10, 10)]] == [60, 64, 4, 10]


@pytest.mark.parametrize(
    ("classes", "fit", "columns", "rows"),
    [
        (0, 64, 8, 8),
        (0, 63, 8, 7),
        (0, 20, 8, 2),
        (0, 5, 5, 1),
        (3, 20, 3, 6),
        (16, 20, 16, 1),
        (16, 5, 5, 1),
    ],
)
def test_a_grid_of_large_images_has_as_many_as_can_be_read_again(
    tmp_path, monkeypatch, classes, fit, columns, rows
):
    """Whole rows of them, else one shorter row; a column still is a class, under its name."""
    assert Image.MAX_IMAGE_PIXELS is not None and sample_grids.MOST_PIXELS < Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(sample_grids, "MOST_PIXELS", fit * 64**2)
    sheets = SampleGrids(tmp_path, OneRank(), Report(), [str(n) for n in range(classes)])
    levels = torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1).expand(-1, 1, 64, 64)
    made = sheets.fakes(lambda: levels, Draws(0, 4, [1.0] * classes if classes else None), 1000)
    assert made is levels, "all are compared with held-out ones"
    path = tmp_path / "samples" / "latest.png"
    head = 16 if classes else 0
    assert Image.open(path).size == (columns * 66 + 2, rows * 66 + 2 + head)
    shown = first_images(path, 64, rows, columns)
    assert shown is not None
    found = np.asarray(shown)[2 + 32 :: 66, 2 + 32 :: 66, 0]
    assert found.flatten().tolist() == list(range(rows * columns))


def test_a_grid_that_is_too_large_to_read_keeps_no_run_from_starting(tmp_path, monkeypatch):
    """As an earlier version wrote it."""
    path = tmp_path / "samples" / "fakes000001.png"
    notes = {"chart": "Samples/fakes", "cur_nimg": "1000"}
    save_grid(torch.zeros(64, 1, 64, 64, dtype=torch.uint8), path, 8, notes=notes)
    assert [cur_nimg for cur_nimg, _ in grids_of(tmp_path)] == [1000]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64**2)
    MainReport(tmp_path, [], 8000, 1000).close()
    assert grids_of(tmp_path) == [] and opened(path) is None and first_images(path, 64, 2) is None


class OneRank:
    """The part of Ranks that sample grids use."""

    main = True
    raise_together = staticmethod(nullcontext)
