"""`shardgan project` on a tiny run, whose G knows little but grey."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from launch.project import project
from pipeline.config import UserError
from pipeline.gan.images import to_uint8
from pipeline.run import export
from pipeline.run.export import load_generator

RUN = Path(__file__).parents[1] / "assets" / "run-of-format-2" / "run"
MIDDLE = np.tile(np.arange(60, 200, 5, dtype=np.uint8), (28, 1))


class Grey(nn.Module):
    """Of one grey level for each class, which z changes a little."""

    def forward(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        level = torch.tensor([-0.8, 0.0, 0.8])[c] + 0.1 * z.mean(1).tanh()
        return level.view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


def call(*arguments: object) -> str:
    result = CliRunner().invoke(project, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def grey(path: Path, level: int, size: tuple[int, int] = (28, 28), mode: str = "L") -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("L", size, level).convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(RUN, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide JPEG in colour, white at the sides, and a small transparent PNG."""
    folder = tmp_path_factory.mktemp("photos")
    wide = np.full((28, 48), 255, np.uint8)
    wide[:, 10:38] = MIDDLE
    Image.fromarray(wide).convert("RGB").save(folder / "wide.jpg", quality=100, subsampling=0)
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(folder / "glass.png")
    return folder


def pixels_of(images: torch.Tensor) -> np.ndarray:
    return to_uint8(images)[0, 0].numpy()


@pytest.fixture(scope="module")
def written(run: Path, photos: Path) -> str:
    return call(run, photos / "wide.jpg", photos / "glass.png")


def test_latents_make_the_images_that_the_pictures_end_with(run: Path, photos: Path, written: str) -> None:
    out = run / "projected"
    names = ["glass", "wide"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["projected.png", *(f"{n}-projected.png" for n in names), *(f"{n}.safetensors" for n in names)]
    )
    G, config, _ = load_generator(run)
    tiles = []
    for name in ("wide", "glass"):
        with Image.open(out / f"{name}-projected.png") as strip:
            assert strip.size == (6 * 58 + 2, 58 + 2)
            tiles.append(np.asarray(strip))
        found = load_file(out / f"{name}.safetensors")
        assert found.keys() == {"z"} and found["z"].shape == (1, config.G.z_dim)
        shown = tiles[-1][2:58:2, -58:-2:2]
        assert np.abs(shown.astype(int) - pixels_of(G(found["z"]))).max() <= 1
    with Image.open(out / "projected.png") as both:
        assert np.array_equal(np.asarray(both)[:60], tiles[0]) and both.height == 2 * 58 + 2
    assert np.abs(tiles[0][2:58:2, 2:58:2].astype(int) - MIDDLE).max() <= 3  # cut to a square
    assert np.all(tiles[1][2:58, 2:58] == 255)  # transparency is laid on white


def test_the_table_has_the_distances_of_the_pictures(run: Path, photos: Path, written: str) -> None:
    head, first, second, last = written.splitlines()
    assert head.split() == ["first", "last", "times", "closer"] and last.endswith(f"{run / 'projected'}")
    assert first.split()[0] == "wide.jpg" and second.split()[0] == "glass.png"
    for line, name in ((first, "wide"), (second, "glass")):
        with Image.open(run / "projected" / f"{name}-projected.png") as strip:
            tiles = np.asarray(strip, float)[2:58:2] / 255
        target, start, end = (tiles[:, 2 + 58 * n : 58 + 58 * n : 2] for n in (0, 1, 5))
        shown = [float(text) for text in line.split()[1:4]]
        errors = [((made - target) ** 2).mean() for made in (start, end)]
        assert shown[:2] == pytest.approx(errors, abs=6e-5)
        assert shown[2] == pytest.approx(errors[0] / errors[1], abs=0.06)


def test_the_same_command_finds_the_same(run: Path, photos: Path, written: str, tmp_path: Path) -> None:
    before, out = run / "projected", tmp_path / "new" / "folder"
    shown = call(run, photos / "wide.jpg", "--out", out)
    assert shown.splitlines()[1].split() == written.splitlines()[1].split()
    assert torch.equal(load_file(out / "wide.safetensors")["z"], load_file(before / "wide.safetensors")["z"])
    assert (out / "wide-projected.png").read_bytes() == (before / "wide-projected.png").read_bytes()
    assert len([*out.iterdir()]) == 2  # of one image there is one picture


@pytest.fixture
def conditional(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config, state = load_generator(run)
    state.label_frequencies, state.class_names = [0.5, 0.25, 0.25], ["coal", "stone", "snow"]
    monkeypatch.setattr(export, "load_generator", lambda *_: (Grey(), config, state))


@pytest.mark.usefixtures("conditional")
def test_classes_are_tried_or_given(run: Path, tmp_path: Path) -> None:
    image = grey(tmp_path / "x.png", 230)
    assert call(run, image, "--out", tmp_path).splitlines()[1].endswith("  snow")
    assert load_file(tmp_path / "x.safetensors")["c"].tolist() == [2]
    assert call(run, image, "--out", tmp_path, "--class", "stone").splitlines()[1].endswith("  stone")
    assert load_file(tmp_path / "x.safetensors")["c"].tolist() == [1]
    with pytest.raises(UserError, match="did you mean 'snow'"):
        call(run, image, "--out", tmp_path, "--class", "snwo")


def test_bad_input_is_one_message_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    good, out = grey(tmp_path / "good.png", 9), tmp_path / "out"
    text = tmp_path / "text.png"
    text.write_text("no image")
    np.save(tmp_path / "latent.npy", np.zeros((4, 8, 8), np.float32))
    in_the_way = grey(tmp_path / "photo-projected.png", 9)
    for arguments, message in [
        ((tmp_path, good), "not a run folder"),
        ((run, tmp_path / "none.png"), r"none.png cannot be read: No such file"),
        ((run, tmp_path), "cannot be read: Is a directory"),
        ((run, good, text), "text.png cannot be used: not a PNG"),
        ((run, tmp_path / "latent.npy"), "is a latent, not an image"),
        ((run, good, "--class", "3"), "unconditional"),
        ((run, good, "--checkpoint", "77"), "77"),
        ((run, good, grey(tmp_path / "other" / "good.jpg", 9)), "the same name"),
        ((run, in_the_way, grey(tmp_path / "photo.png", 9), "--out", tmp_path), "would be overwritten"),
    ]:
        with pytest.raises(UserError, match=message):
            call(*arguments, *(() if "--out" in arguments else ("--out", out)))
    assert not out.exists()
    with pytest.raises(UserError, match=r"could not be written: .*Give another folder with --out"):
        call(run, good, "--out", text)


def test_results_of_another_image_of_the_same_name_are_kept(run: Path, tmp_path: Path) -> None:
    image, out = grey(tmp_path / "x.png", 9), tmp_path / "out"
    for _ in range(2):
        call(run, image, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"x\.safetensors is of another image than .*x\.png"):
        call(run, grey(tmp_path / "other" / "x.png", 200), "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_on_latents_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    G, config, state = load_generator(run)
    config = replace(config, data=replace(config.data, channels=4))
    monkeypatch.setattr(export, "load_generator", lambda *_: (G, config, state))
    with pytest.raises(UserError, match="was trained on latents"):
        call(run, grey(tmp_path / "x.png", 9))
