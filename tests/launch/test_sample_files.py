"""The files that `shardgan sample` writes, read back: pictures, animations and folders of images."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from launch import sample as command
from pipeline.config import UserError, load
from pipeline.gan.networks import build_G
from pipeline.run import export, image_files, layouts
from pipeline.run.sampling import Sampler
from pipeline.run.state import State

NAMES = ["boot", "shirt", "red, blue"]


@pytest.fixture(params=["grey", "colour"])
def trained(request, tmp_path, monkeypatch):
    """What `load_generator` gives: a G of three classes, never trained. Returns its Sampler."""
    channels = 1 if request.param == "grey" else 3
    text = f"data: {{train: data, size: 28, channels: {channels}}}\nG: {{width: 4, z_dim: 8}}"
    (tmp_path / "config.yaml").write_text(text)
    config, state = load(tmp_path / "config.yaml"), State(1500, label_frequencies=[0.6, 0.2, 0.2])
    state.class_names = NAMES
    torch.manual_seed(0)
    G = build_G(config, 3).requires_grad_(False).eval()
    for p in G.parameters():
        p += 0.2 * torch.randn_like(p)
    monkeypatch.setattr(layouts, "_FRAMES", 10)  # from latent to latent, for the sake of time
    monkeypatch.setattr(export, "load_generator", lambda run, checkpoint: (G, config, state))
    return Sampler(G, config, state.label_frequencies, NAMES)


in_colour = pytest.mark.parametrize("trained", ["colour"], indirect=True)
in_grey = pytest.mark.parametrize("trained", ["grey"], indirect=True)


def call(*arguments) -> str:
    result = CliRunner().invoke(command.sample, ["run", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def shown(path) -> list[np.ndarray]:
    """The frames of a GIF or WebP in RGB."""
    with Image.open(path) as picture:
        frames = []
        for number in range(picture.n_frames):
            picture.seek(number)
            frames.append(np.asarray(picture.convert("RGB"), np.int64))
    return frames


def one_step(frames, loss: float = 0.5) -> None:
    """The step from the last frame to the first is as small as the others, but for what compression loses."""
    steps = [np.abs(a - b).mean() for a, b in zip(frames, [*frames[1:], frames[0]], strict=True)]
    apart = np.abs(frames[0] - frames[len(frames) // 2]).mean()
    assert 0 < np.mean(steps) < apart / 3 and steps[-1] <= loss + 1.3 * max(steps[:-1])


@pytest.mark.parametrize("name", ["walk.gif", "walk.webp"])
def test_pillow_plays_a_loop(trained, tmp_path, name):
    assert "40 frames (1.6 s) of 3 images after 1.5 kimg" in call(
        "--out", tmp_path / name, "--count", 3, "--interpolate"
    )
    with Image.open(tmp_path / name) as picture:
        assert picture.info["loop"] == 0 and picture.size == (3 * 224 + 8, picture.height)
        picture.load()
        assert picture.info["duration"] == 40
    frames = shown(tmp_path / name)
    assert len(frames) == 40
    one_step(frames)


@in_grey
def test_a_grey_gif_has_the_pixels_of_the_images(trained, tmp_path):
    call("--out", tmp_path / "walk.gif", "--seeds", "3,4", "--classes", "boot")
    frames = shown(tmp_path / "walk.gif")
    first = frames[0][2:226:8, 2:226:8, 0]
    assert len(frames) == 20 and np.abs(first - trained.sample([3], 0)[0, 0].numpy()).max() <= 1


def test_a_video_is_one_that_browsers_play(trained, tmp_path):
    call("--out", tmp_path / "walk.mp4", "--seeds", "0-1", "--classes", "shirt,boot")
    with av.open(str(tmp_path / "walk.mp4")) as file:
        (stream,) = file.streams
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        assert len(frames) == 20 and file.duration == 20 * 40_000  # µs
    assert frames[0].shape[1] == 2 * 224 + 6 and frames[0].shape[0] % 2 == 0
    head = frames[0].shape[0] - 224 - 4
    expected = trained.sample([0, 0], ["shirt", "boot"]).permute(0, 2, 3, 1).int().numpy()
    for column, image in enumerate(expected):
        left = 2 + 226 * column
        tile = frames[0][head // 2 * 2 : head // 2 * 2 + 224, left : left + 224].astype(int)
        mean = tile.reshape(28, 8, 28, 8, 3).mean(axis=(1, 3))
        assert np.abs(mean - image).mean() < 12, "the colours are right, but for compression"
    one_step([frame.astype(int) for frame in frames], loss=4)


@in_colour
def test_without_the_extra_a_video_is_refused_before_anything(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'shardgan\[video\]'"):
        call("--out", tmp_path / "out" / "walk.mp4")
    assert not (tmp_path / "out").exists()


@in_grey
@pytest.mark.parametrize(
    ("name", "kind"), [("x.png", "PNG"), ("x.jpg", "JPEG"), ("x.JPEG", "JPEG"), ("x.webp", "WEBP")]
)
def test_a_pictures_format_is_that_of_its_name(trained, tmp_path, name, kind):
    assert "63 images after 1.5 kimg" in call("--out", tmp_path / name)  # whole rows of three classes
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind and getattr(picture, "n_frames", 1) == 1


@in_grey
def test_pictures_by_class_seed_and_interpolation(trained, tmp_path):
    call("--out", tmp_path / "two.png", "--count", 6, "--classes", "shirt,0")
    assert Image.open(tmp_path / "two.png").size == (2 * 58 + 2, 16 + 3 * 58 + 2)
    call("--out", tmp_path / "comma.png", "--seeds", "7,8", "--classes", "red, blue", "--classes", "boot")
    sheet = np.asarray(Image.open(tmp_path / "comma.png"))[16:]
    expected = trained.sample([7, 7, 8, 8], [2, 0, 2, 0])[:, 0].numpy().astype(int)
    for place, image in enumerate(expected):
        y, x = 2 + place // 2 * 58, 2 + place % 2 * 58
        assert np.abs(sheet[y : y + 56 : 2, x : x + 56 : 2].astype(int) - image).max() <= 1
    said = call("--out", tmp_path / "r.png", "--count", 100, "--classes", 1, "--interpolate")
    assert "96 (12 rows of 8) of 100 images after" in said
    rows = np.asarray(Image.open(tmp_path / "r.png"), np.float64)
    tiles = rows[2:, 2:].reshape(12, 58, 8, 58).swapaxes(1, 2)[:, :, :56, :56]
    steps = np.abs(np.diff(tiles, axis=1)).mean(axis=(2, 3))
    assert (steps < np.abs(tiles[:, 0] - tiles[:, -1]).mean(axis=(1, 2))[:, None]).all()
    assert "16 images" in call("--out", tmp_path / "s.png", "--seeds", "1-3", "--interpolate")
    rows = np.asarray(Image.open(tmp_path / "s.png"))
    assert np.array_equal(rows[2:58, 2 + 7 * 58 : 58 + 7 * 58], rows[60:116, 2:58]), "on from the same seed"


def test_separate_files_are_the_images_of_their_seeds_and_kept(trained, tmp_path):
    folder = tmp_path / "many"
    assert "70 images after 1.5 kimg" in call("--images", folder, "--seeds", "0-69")
    assert sorted(p.name for p in folder.glob("*.png")) == [f"seed{n:05d}.png" for n in range(70)]
    for seed in (0, 69):
        pixels = np.asarray(Image.open(folder / f"seed{seed:05d}.png")).astype(int)
        expected = trained.sample([seed])[0].permute(1, 2, 0).squeeze().numpy()
        assert np.abs(pixels - expected).max() <= 1
    whole = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    kept = b"kept as it is" + whole["seed00003.png"][-12:]
    (folder / "seed00003.png").write_bytes(kept)
    (folder / "seed00004.png").unlink()
    for seed, left in ((5, 0), (6, 8), (7, 100), (8, -1)):  # bytes that a kill or a full disk left
        (folder / f"seed{seed:05d}.png").write_bytes(whole[f"seed{seed:05d}.png"][:left])
    call("--images", folder, "--seeds", "0-70")
    assert len([*folder.iterdir()]) == 72  # 71 images and made_by.json
    there = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert there.pop("seed00003.png") == kept and there.pop("seed00070.png")
    del whole["seed00003.png"]
    assert there == whole
    assert "truncation" in json.loads((folder / "made_by.json").read_text())


@in_grey
def test_files_of_several_classes_and_folders_of_others(trained, tmp_path, monkeypatch):
    folder = tmp_path / "many"
    call("--images", folder, "--seeds", "5,6", "--classes", "1,boot")
    names = [f"seed0000{seed}-class{label}.png" for seed in (5, 6) for label in (0, 1)]
    assert sorted(p.name for p in folder.glob("*.png")) == names
    for arguments in (("--seeds", "5"), ("--seeds", "5", "--classes", 1)):
        with pytest.raises(
            UserError, match=r"other images, of config after 1.5 kimg \(classes \[0, 1\], not"
        ):
            call("--images", folder, *arguments)
    next(trained.G.parameters()).add_(0.1)
    with pytest.raises(UserError, match=r"\(G [0-9a-f]{16}, not [0-9a-f]{16}\)"):
        call("--images", folder, "--seeds", "5,6", "--classes", "1,boot")
    with pytest.raises(UserError, match="holds other files"):
        call("--images", tmp_path, "--seeds", "5")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_files, "_write", full)
    with pytest.raises(UserError, match=r"No space left on device. The same command resumes"):
        call("--images", tmp_path / "full", "--seeds", "0-200")


@in_grey
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--out FILE"),
        ("--out x.png --images d", "--out FILE"),
        ("--out x.txt", "not a known format"),
        ("--out folder", "not a known format"),
        ("--images d", "--images takes --seeds"),
        ("--images d --seeds 0-3 --interpolate", "no --interpolate"),
        ("--out x.png --seeds 0-3 --count 4", "leave out --seed and --count"),
        ("--out x.png --seeds 0-3 --seed 1", "leave out --seed and --count"),
        ("--out x.png --seeds 3-0", "--seeds 3-0: not numbers or ranges"),
        ("--out x.png --seeds 1..3", "not numbers or ranges"),
        ("--out x.gif --seeds 4 --classes 1", "two seeds or more"),
        ("--out x.gif --seeds 4,5", "stays in one class"),
        ("--out x.png --seeds 4,5 --interpolate --classes 0,1", "one class"),
        ("--out x.png --classes 3", "no class 3: classes are from 0 to 2"),
        ("--out x.png --classes shirts", "did you mean 'shirt'"),
        ("--out x.png --truncation 0.7", "latent w"),
        ("--out x.webp --seeds 0-290 --classes 0,1", "too large for .webp"),
    ],
)
def test_what_does_not_go_together_is_refused(trained, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(*arguments.split())
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@in_grey
def test_a_home_folder_is_understood_where_the_shell_leaves_it(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    call("--out=~/x.png", "--count", 4)
    assert (tmp_path / "x.png").exists()


@in_grey
@pytest.mark.parametrize("psi", ["nan", "inf"])
def test_a_truncation_that_is_not_finite_leaves_nothing(trained, tmp_path, psi):
    for where in (["--out", tmp_path / "a.png"], ["--images", tmp_path / "all"]):
        with pytest.raises(UserError, match="give a number from 0"):
            call(*where, "--seeds", "0-3", "--truncation", psi)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("0-4294967295", "4,294,967,296 seeds, more than"),
        ("99999999999999999999-99999999999999999999999999", "from 0 to 4294967295"),
        ("0,4294967296", "from 0 to 4294967295"),
        ("5-3", "not numbers or ranges"),
    ],
)
def test_seeds_are_checked_before_they_take_memory(seeds, message):
    with pytest.raises(UserError, match=message):
        command.seeds_of(seeds)


@in_grey
def test_more_images_than_a_picture_can_show_are_refused(trained, tmp_path):
    for many in (["--count", 10**12], ["--count", 10**12, "--interpolate"], ["--seeds", "0-200000"]):
        with pytest.raises(UserError, match=r"too many for one picture.*--images"):
            call("--out", tmp_path / "a.png", *many)


@in_grey
def test_an_interpolation_says_how_many_of_the_images_it_made(trained, tmp_path):
    wanted = ["--out", tmp_path / "a.png", "--interpolate", "--classes", "0, 1"]
    assert "16 (2 rows of 8) of 20 images" in call(*wanted, "--count", 20)
    assert call(*wanted, "--count", 16).startswith("16 images")
