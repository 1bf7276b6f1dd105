"""`shardgan train FOLDER`: what an argument is, which preset its images get, and which run is theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from launch import own_images, presets
from launch.argument import training_of
from launch.contents import look_at
from launch.installed import config_path, configs
from launch.train import train
from launch.training import Training, of_run
from pipeline.config import Config, UserError, dump, load
from pipeline.config_layers import as_override
from pipeline.data.index import load_index
from pipeline.data.prepare.files import open_source
from pipeline.data.prepare.writer import Options
from pipeline.data.prepare.writer import prepare as write_shards
from pipeline.gan.compatible import check_objective
from pipeline.gan.networks import check_networks
from pipeline.parallel.batch import batch_shape


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(folder: str, *shapes: tuple[int, ...], classes: tuple[str, ...] = ("",), first: int = 0) -> None:
    """Noise, an image of each shape in each class. shapes: height and width, and 3 for colour."""
    numbers = np.random.default_rng(first)
    for name in classes:
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        for number, shape in enumerate(shapes, first):
            pixels = numbers.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(Path(folder) / name / f"{number}.png")


def config_of(training: Training) -> Config:
    return load(training.config, training.settings)


def refusal(argument: str, *settings: str) -> str:
    with pytest.raises(UserError) as refused:
        training_of(argument, settings, gpu=False)
    return str(refused.value)


def begin(training: Training, cur_nimg: int = 0) -> Path:
    """The run folder as the start of a training leaves it."""
    config = config_of(training)
    folder = Path(config.run.out) / str(config.run.name)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))
    (folder / "metrics.jsonl").write_text("")
    state = folder / "checkpoints" / str(cur_nimg) / "state.json"
    state.parent.mkdir(parents=True)
    if config.data.train and Path(config.data.train).exists():
        state.write_text(json.dumps({"data": load_index(config.data.train).fingerprint}))
    return folder


def test_configs_and_runs(here):
    Path("mine.yaml").write_text("data: {train: x}")
    assert training_of("mine.yaml", ["run.seed=1"], gpu=True) == Training("mine.yaml", ("run.seed=1",))
    assert training_of("missing.yaml", [], gpu=True) == Training("missing.yaml")  # refused when it is read
    assert training_of("lambda", [], gpu=False).config == str(configs() / "lambda.yaml")
    Path("elsewhere").mkdir()
    run = begin(Training("mine.yaml", ("run.name=a", "run.new_data=true", "penalty.l2=1e-3")))
    moved = run.rename("elsewhere/b")
    config = config_of(training_of("elsewhere/b", ["run.total_kimg=7"], gpu=True))
    assert (config.run.out, config.run.name, config.run.total_kimg) == ("elsewhere", "b", 7)
    assert config.penalty.G.l2 == 1e-3 and not config.run.new_data
    assert config_of(training_of(f"{moved}/", [], gpu=False)).run.name == "b"


@pytest.mark.parametrize("name", ["'q'", '"q"', " q", "q ", "null", "~", "it's", "'", "a=b"])
def test_a_run_and_shards_keep_whatever_name_they_have(here, name):
    run = Path("out ", name)
    config = load(None, [*of_run(run, []).settings, as_override("data.train", f"data/{name}")])
    assert (config.run.out, config.run.name, config.data.train) == ("out ", name, f"data/{name}")
    if name != "~":  # which is home
        assert load(None, [as_override("data.train", name)]).data.train == name


@pytest.mark.parametrize("folder", ["runs", "runs/trials"])
def test_a_folder_of_runs_is_no_folder_of_images(here, folder):
    pictures(f"{folder}/a/samples", (32, 32))
    Path(folder, "a/checkpoints").mkdir()
    Path(folder, "a/config.yaml").write_text("")
    assert refusal("runs") == f"runs holds runs, not images. To resume one: shardgan train {folder}/a"


@pytest.mark.parametrize("folder", ["samples", "samples/of a viewer", "checkpoints"])
def test_a_folder_in_a_run_is_no_folder_of_images(here, folder):
    pictures(f"runs/a/{folder}", (32, 32))
    for name in ("config.yaml", "metrics.jsonl"):
        Path("runs/a", name).write_text("")
    said = refusal(f"runs/a/{folder}")
    assert said.startswith(f"runs/a/{folder} is in the folder of a run")
    assert said.endswith(f"shardgan train {here}/runs/a")
    Path("runs/a/metrics.jsonl").unlink()  # a person's project may have a config.yaml too
    assert training_of(f"runs/a/{folder}", [], gpu=False).preparation


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("fashion-mnst", "fashion-mnist"),  # a published config
        ("potos/", "photos"),
        ("runs/fotos", "runs/photos"),
        ("mine/fashion", "mine/fashion.yaml"),
    ],
)
def test_what_is_misspelt(here, given, near):
    for path in ("photos", "runs/photos", "mine/fashion.yaml"):
        Path(path).mkdir(parents=True)
    assert refusal(given) == f"There is no config, folder, zip or run called {given}. Did you mean {near}?"


def test_a_run_is_not_put_into_its_own_images(here, monkeypatch):
    pictures("my photos", *[(9, 9)] * 3)
    monkeypatch.chdir("my photos")
    for given in (".", str(Path.cwd())):
        assert "Call it from outside (cd " in refusal(given) and "train 'my photos')" in refusal(given)
    training = training_of(".", [f"run.out={here}/runs"], gpu=False)
    assert training.preparation is not None
    assert Path(training.preparation.out).parent == here


def test_configs_of_other_commands_are_found_by_name_too():
    assert config_path("lambda") == str(configs() / "lambda.yaml")
    assert config_path("lamda.yaml") == "lamda.yaml"  # the reader of files refuses it
    with pytest.raises(UserError, match=r"There is no config called lamda\. Did you mean lambda\?"):
        config_path("lamda")


def test_what_is_none_of_it(here):
    assert refusal("nothing") == "There is no config, folder, zip or run called nothing."
    pictures("A$AP", (9, 9))
    assert refusal("A$AP").startswith("A$AP: in settings $ begins the name of a variable.")
    assert refusal("/").startswith("/ is a whole file system.")
    assert "u:p" not in (said := refusal("s3://u:p@bucket/faces")) and "data.train=URL" in said
    Path("a.tar.gz").write_bytes(b"")
    assert refusal("a.tar.gz").startswith("a.tar.gz is neither a config nor a zip.")
    for name in ("empty", "texts", "latents", "broken", "export", "both"):
        Path(name).mkdir()
    assert refusal("empty").startswith("There are no images (.avif, ")
    Path("texts/a.txt").write_text("x")
    assert refusal("texts").endswith("It has: .txt 1.")
    np.save("latents/a.npy", np.zeros((5, 4, 4), np.float32))
    assert refusal("latents").startswith("latents holds latents (.npy), and there is no preset")
    Path("broken/a.png").write_bytes(b"x")
    assert refusal("broken").startswith("None of the images in broken that were looked at can be read: ")
    Path("export/config.yaml").write_text("data: {train: x}")
    Path("export/G_ema.safetensors").write_bytes(b"")
    assert "run.init=export" in refusal("export")
    Path("both/a.tar").write_bytes(b"")
    pictures("both/images", (8, 8))
    assert refusal("both").startswith("both holds both shards (a.tar) and images (images/0.png). Put ")
    pictures("photos", (8, 8))
    assert refusal("photos", "data.train=x").startswith("data.train: the data are photos already")
    pictures("photos/cats", (8, 8))
    assert refusal("photos").endswith("shardgan prepare photos OUT, after which: shardgan train OUT")
    assert sorted(p.name for p in here.iterdir() if "px" in p.name) == []


def test_shards_that_were_cut_short_are_told_apart_from_images_that_need_an_option():
    pictures("photos", *[(32, 32)] * 3)
    training_of("photos", [], gpu=False).prepare()
    shard = next(Path("photos-32px").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:2000])
    assert refusal("photos-32px").endswith("run `shardgan prepare --index-only` on the folder.")


def test_size_channels_and_classes_follow_from_the_images():
    pictures("photos", *[(40, 90, 3)] * 3, (500, 70), *[(300, 200, 3)] * 3, classes=("cats", "dogs"))
    training = training_of("photos", [], gpu=True)
    config, made = config_of(training), training.preparation
    assert (config.run.name, config.data.train) == ("photos", "photos-64px")
    assert (config.data.size, config.data.channels) == (64, 3)  # the median side is 70
    assert not config.data.conditional and "so few images each" in training.notes[2]
    assert made and (made.source, made.out, made.options) == ("photos", "photos-64px", Options(size=64))
    assert training.notes[0].startswith(
        "photos: 14 images of 2 classes, in colour, of shorter sides 40 to 200 (median 70); their shards"
    )
    shutil.make_archive("pile", "zip", "photos")
    zipped = training_of("pile.zip", ["data.size=32", "data.conditional=true", "run.name=x"], gpu=False)
    config = config_of(zipped)
    assert (config.run.name, config.data.train, config.G.width) == ("x", "pile-32px", 64)
    assert config.data.conditional and zipped.preparation.source == "pile.zip"
    pictures("cifar10", (32, 32))
    training_of("cifar10", [], gpu=False).prepare()
    assert load_index("cifar10-32px").num_samples == 1, "not the data set of that name"
    pictures("digits", *[(28, 28)] * 60, classes=tuple("0123"))
    config = config_of(training_of("digits", [], gpu=True))
    assert (config.data.size, config.data.channels, config.data.conditional) == (28, 1, True)
    small = training_of("digits", [], gpu=False)
    assert not config_of(small).data.conditional and "one image for each): data.cond" in small.notes[2]
    assert len(training_of("digits", ["data.conditional=false"], gpu=False).notes) == 3


@pytest.mark.parametrize(
    ("side", "on_cpu", "on_gpu"), [(8, 28, 28), (31, 28, 28), (63, 32, 32), (200, 32, 128), (4000, 32, 256)]
)
def test_the_size_is_what_the_images_fill(side, on_cpu, on_gpu):
    assert (presets.CPU.size_for(side), presets.GPU.size_for(side)) == (on_cpu, on_gpu)


@pytest.mark.parametrize("preset", [presets.CPU, presets.GPU], ids=["cpu", "gpu"])
def test_every_preset_has_networks_at_each_of_its_sizes(preset):
    for size in preset.sizes:
        for settings in ((), preset.few):
            lines = [*preset.at(size), *settings, f"data.size={size}", "data.conditional=true"]
            config = load(configs() / preset.config, lines)
            check_networks(config, num_classes=3)
            for world in (1, 2, 4):
                check_objective(config, batch_shape(config.data, world).images, "bf16")
        assert config.augment.ops, "few images are augmented"
    as_written = load(configs() / preset.config)
    assert load(configs() / preset.config, preset.at(as_written.data.size)) == as_written


def test_whether_images_are_augmented_is_said(monkeypatch):
    """Few always are; many with the preset for GPUs alone."""
    pictures("photos", *[(32, 32, 3)] * 4)
    few = training_of("photos", [], gpu=False)
    assert config_of(few).augment.target == 0.6 and "augmentation is on" in few.notes[-1]
    monkeypatch.setattr(presets, "FEW", 4)
    many = training_of("photos", [], gpu=False)
    assert config_of(many).augment.target is None and "augmentation" not in many.notes[-1]
    assert training_of("photos", [], gpu=True).notes[-1] == "augmentation is on (up to p = 0.3)"
    gpu = config_of(training_of("photos", ["G.width=64"], gpu=True))
    assert (gpu.G.kind, gpu.G.width, gpu.D.width) == ("r3gan", 64, 384)


def test_shards_of_images_at_home_are_found_again(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    pictures("photos", *[(40, 40, 3)] * 3)
    first = training_of("~/photos", [], gpu=False)
    assert not first.prepared and first.preparation.out == str(here / "photos-32px")
    first.prepare()
    again = training_of("~/photos", [], gpu=False)
    assert again.prepared and "their shards, at 32x32, are in" in again.notes[0]
    assert config_of(again) == config_of(first)


def test_shards_are_trained_on_as_they_are():
    pictures("photos", *[(48, 48)] * 3)
    write_shards("photos", "odd", Options(), workers=1)
    said = refusal("odd")
    assert "are 48x48" in said and "shardgan prepare odd odd-32px --size 32, then" in said
    write_shards("photos", "even", Options(size=32), workers=1)
    training = training_of("even/", [], gpu=False)
    config = config_of(training)
    assert (config.run.name, config.data.train) == ("even", "even/")
    assert (config.data.size, config.data.channels, training.preparation) == (32, 1, None)
    assert config_of(training_of("even/shard-000000.tar", [], gpu=False)).run.name == "shard-000000"


def test_what_was_chosen_first_stays():
    """On another machine, with other settings than at the start."""
    pictures("photos", *[(40, 40, 3)] * 3)
    first = training_of("photos", ["penalty.l2=1e-3", "data.size=32"], gpu=True)
    first.prepare()
    begin(first)
    again = training_of("photos", [], gpu=False)
    assert config_of(again) == config_of(first)
    assert again.notes == ("photos: resuming runs/photos, with the settings in its config.yaml",)
    assert again.preparation == first.preparation
    shutil.rmtree("photos-32px")
    again.prepare()
    assert load_index("photos-32px").num_samples == 3
    fresh = training_of("photos", ["run.resume=false"], gpu=False)
    assert config_of(fresh).G.kind == "dcgan" and config_of(fresh).data.size == 32


def test_a_run_of_other_data_is_not_resumed():
    for name, first in (("a/photos", 0), ("b/photos", 10)):
        pictures(name, *[(32, 32)] * 3, first=first)
    start = training_of("a/photos", [], gpu=False)
    start.prepare()
    run = begin(start)
    said = refusal("b/photos")
    assert said.startswith(
        "runs/photos was trained on other data (a/photos-32px). To train on b/photos, give "
    )
    assert config_of(training_of("b/photos", ["run.name=c"], gpu=False)).run.name == "c"
    moved = training_of("b/photos", ["run.new_data=true"], gpu=False)
    assert config_of(moved).data.train == "b/photos-32px" and moved.config == str(run / "config.yaml")
    pictures("b/large/photos", *[(64, 64)] * 3)
    large = training_of("b/large/photos", ["run.new_data=true"], gpu=False)
    assert large.preparation.options.size == config_of(large).data.size == 32  # the run's
    Path("a/photos").rename("a/pictures")
    assert config_of(training_of("a/pictures", [], gpu=False)).run.name == "pictures"
    assert (
        training_of("a/pictures", ["run.name=photos"], gpu=False).notes[0].startswith("a/pictures: resuming")
    )
    write_shards("b/photos", "b/shards", Options(), workers=1)
    assert "was trained on other data" in refusal("b/shards", "run.name=photos")
    Path("a/photos-32px").rename("c")
    assert config_of(training_of("c", ["run.name=photos"], gpu=False)).data.train == "c"


def test_changed_images_are_refused():
    pictures("photos", *[(32, 32)] * 3)
    training_of("photos", [], gpu=False).prepare()
    training_of("photos", [], gpu=False).prepare()
    pictures("photos", *[(32, 32)] * 2, first=10)
    with pytest.raises(UserError) as refused:
        training_of("photos", [], gpu=False).prepare()
    said = str(refused.value)
    assert said.startswith("photos has 2 images more than when photos-32px was made of it. To train on ")
    assert said.endswith("shardgan train photos-32px, or runs/NAME to resume a run.")


def test_a_folder_and_a_zip_of_one_name_with_other_images():
    """Their shards would have one name too."""
    pictures("photos", *[(32, 32)] * 3)
    training_of("photos", [], gpu=False).prepare()
    pictures("photos", *[(32, 32)] * 2, first=10)
    shutil.make_archive("photos", "zip", "photos")
    with pytest.raises(UserError) as refused:
        training_of("photos.zip", ["run.name=zipped"], gpu=False).prepare()
    assert str(refused.value) == (
        "photos-32px was made of other images, or in another way. To train on photos.zip, give its shards "
        "another folder: shardgan prepare photos.zip OUT --size 32, then shardgan train OUT. To train on "
        "what is there: shardgan train photos-32px."
    )


def test_a_dry_run_prepares_nothing(here):
    pictures("photos", *[(40, 40, 3)] * 3)
    shown = CliRunner().invoke(train, ["photos", "--dry-run", "--procs", "1"], catch_exceptions=False)
    line, _, text = shown.stdout.partition("\n\n# the resolved config\n")
    assert line.split(" -m ")[1].startswith(f"pipeline.train {configs() / 'own-cpu.yaml'} run.name=photos ")
    (here / "printed.yaml").write_text(text)
    assert load("printed.yaml") == config_of(training_of("photos", [], gpu=False))
    assert "augmentation is on" in shown.stderr
    assert sorted(p.name for p in here.iterdir()) == ["photos", "printed.yaml"]


def test_a_size_that_no_network_has_is_refused_before_anything_is_made(here):
    pictures("photos", (40, 40, 3))
    with pytest.raises(UserError, match="28, 32, 64"):
        CliRunner().invoke(train, ["photos", "data.size=48", "--procs", "1"], catch_exceptions=False)
    assert sorted(p.name for p in here.iterdir()) == ["photos"]


def test_a_look_reads_what_prepare_would_read():
    """Sizes and colours by the header alone, of a grey JPEG, one with transparency, and of a damaged rest."""
    pictures("in", (20, 30, 3), (40, 10))
    image = Image.open("in/0.png")
    image.convert("L").save("in/grey.jpg")
    image.convert("RGBA").save("in/clear.webp", lossless=True)
    Path("in/cut.png").write_bytes(Path("in/0.png").read_bytes()[:200])
    seen = look_at(open_source("in", "top", lambda _: None), "in")
    assert (seen.sides, seen.size, seen.channels, seen.images) == ((10, 20, 20, 20, 20), None, 3, 5)


def test_score_settings_that_the_data_need_are_heeded(tmp_path):
    """Images of four channels cannot be scored: the refusal of them says score.metrics=[]."""
    with pytest.raises(UserError, match=r"score\.metrics"):
        own_images._wanted(tmp_path, ["data.channels=4"])
    assert own_images._wanted(tmp_path, ["data.channels=4", "score.metrics=[]"])[1].channels == 4
