"""`shardgan export` of a run that was trained: its files, its model card, and what neither may say."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from markdown_it import MarkdownIt
from PIL import Image

from launch.export import export as command
from pipeline import config
from pipeline.config import UserError
from pipeline.credentials import public
from pipeline.run import export as export_module
from pipeline.run import programs
from pipeline.run.card import card
from pipeline.run.export import export, load_exported, load_generator
from pipeline.run.exported import Exported, read
from pipeline.wording import one_line

ROOT = Path(__file__).parents[2]
FASHION = ROOT / "tests" / "assets" / "fashion-mnist-500"
FILES = [
    "G_ema.safetensors", "G.safetensors", "D.safetensors", "samples.png", "G_ema.pt2", "config.yaml",
    "README.md", "export.json",
]  # fmt: skip
SCORES = {
    "Metrics/kid_efflite0": 0.25,
    "Metrics/kid_efflite0_train": 0.2,
    "Metrics/efflite0_real_images": 50,
    "Metrics/efflite0_fake_images": 40,
    "Metrics/efflite0_train_images": 450,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 120 images shown, scored at the end; its data at an absolute place, with a licence."""
    folder = tmp_path_factory.mktemp("runs") / "format-2"
    data = shutil.copytree(FASHION, folder.parent / FASHION.name)
    index = json.loads((data / "index.json").read_text()) | {"license": "CC BY 4.0"}
    (data / "index.json").write_text(json.dumps(index))
    shutil.copytree(ROOT / "tests" / "assets" / "run-of-format-2" / "run", folder)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["data"]["train"], settings["run"]["out"] = str(data), str(folder.parent)
    settings["score"]["features"] = f"inception:{folder}/inception.pt"
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with (folder / "metrics.jsonl").open("a") as rows:
        rows.write(json.dumps({"cur_nimg": 120, **SCORES}) + "\n")
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "my-gan"
    result = CliRunner().invoke(command, [str(run), "--out", str(out)], catch_exceptions=False)
    *files, last = result.output.splitlines()
    assert [line.split()[0] for line in files] == [str(out / name) for name in FILES]
    assert last == f"G_ema, G and D after 0.12 kimg: {out}/"
    return out


def test_an_export_says_what_it_is_and_loads(run, exported):
    facts = read(exported)
    assert sorted(facts.files) == sorted(FILES) == sorted(p.name for p in exported.iterdir())
    assert (facts.cur_nimg, facts.num_classes) == (120, 0)
    assert (facts.training_images, facts.heldout_images) == (450, 50)  # of 500, a tenth held out
    assert facts.scores == SCORES
    G, settings, _ = load_exported(exported)
    z = torch.randn(3, settings.G.z_dim)
    assert torch.equal(G(z), load_generator(run)[0](z))
    with Image.open(exported / "samples.png") as picture:
        assert picture.size == (8 * 58 + 2, 8 * 58 + 2)


def test_nothing_in_an_export_names_a_folder_of_this_machine(run, exported):
    for file in exported.iterdir():
        content = file.read_bytes()
        assert not any(str(place).encode() in content for place in (ROOT, run.parent, Path.home())), file
    settings = config.load(exported / "config.yaml")
    assert settings.data.train == FASHION.name and settings.run.out == run.parent.name
    assert settings.score.features == "inception:inception.pt"


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("/home/me/photos", "photos"),
        ("/home/me/photos/{0..9}.tar", "{0..9}.tar"),
        ("~/photos", "photos"),
        ("../photos", "photos"),
        ("data/photos", "data/photos"),
        ("inception:/home/me/a.pt", "inception:a.pt"),
        ("mynets:G", "mynets:G"),
        ("file:///home/me/photos", "file:photos"),
        ("https://me:secret@host/photos?token=x", "https://host/photos"),
        ("s3://bucket/photos", "s3://bucket/photos"),
    ],
)
def test_a_public_setting_has_no_folders_and_no_credentials(setting, shown):
    assert public(setting) == shown


def test_the_cards_lines_run_with_torch_alone(exported):
    text = (exported / "README.md").read_text()
    code = text.partition("## Use\n")[2].partition("```python")[2].partition("```")[0]
    code = f"import sys; sys.path.append({sysconfig.get_paths()['purelib']!r})\n{code}"
    code += "\nassert images.shape == (16, 1, 28, 28) and -1 <= images.min() <= images.max() <= 1"
    code += "\nassert not images.requires_grad and pixels.dtype == torch.uint8 and pixels.max() > 0"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=exported, check=True)


def test_the_cards_lines_run_with_shardgan(exported, monkeypatch):
    text = (exported / "README.md").read_text()
    names: dict[str, torch.Tensor] = {}
    monkeypatch.chdir(exported)
    exec(text.partition("## Use with ShardGAN\n")[2].partition("```python")[2].partition("```")[0], names)
    assert names["images"].shape == (16, 1, 28, 28) and names["images"].dtype == torch.uint8


def test_the_card_is_true(exported):
    text = (exported / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    tags = yaml.safe_load(front)
    assert tags["pipeline_tag"] == "unconditional-image-generation" and "dcgan" in tags["tags"]
    words = " ".join(body.split())
    assert "450 images of `fashion-mnist-500` (50 more were held out). D was shown 120 of them" in words
    assert "kernel distance (KID), lower is better | 0.25 | 40 generated, 50 held-out images |" in words
    assert "| 0.2 | 40 generated, 40 training images |" in words
    assert "training images' licence, according to their index: CC BY 4.0." in words
    for name in re.findall(r"^\| `(\S+\.\w+)` \|", body, re.M):
        assert (exported / name).is_file(), name
    assert "(samples.png)" in body and "G_ema.onnx" not in body


FACTS = Exported("x", 1000, [0.5, 0.5], ["cat", "a|b"], files=("G_ema.pt2", "G_ema.onnx"))


def test_a_card_of_classes_own_networks_and_latents():
    settings = config.load(None, ["data.train=d", "data.channels=4", "data.decoder=vae:VAE", "G.kind=mine:G"])
    text = card(settings, FACTS)
    assert "| 0 | cat |\n| 1 | a\\|b |" in text and "classes=0, or a name" in text
    assert "licence of the training images is not known here" in text
    assert "latents = G(z, c)  # float32 [16, 4, 32, 32]" in text and "clamp" not in text
    assert "`mine:G` must be importable too" in text
    assert "what makes images of them is not among the files: `vae:VAE`" in text
    assert "samples.png" not in text and "onnx" in text.split("---")[1]
    many = replace(FACTS, classes=[f"name {n}" for n in range(1000)], label_frequencies=[1.0] * 1000)
    assert "names of the 1,000 classes are in `export.json`" in card(settings, many)


def test_names_in_a_card_are_words_and_nothing_else():
    settings = config.load(None, ["data.train=/home/me/my photos/a`b"])
    names = [
        "<img src=x onerror=alert(1)>",
        "![t](https://h/x.png) [click](javascript:alert(1)) `c` _d_ *e*\n",
    ]
    text = card(
        settings, replace(FACTS, name=names[1], classes=names, license="MIT\n\n[login](https://h) <b>")
    )
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("---", 2)[2])
    for name in names:
        assert f"<td>{html.escape(one_line(name))}</td>" in shown
    assert f"<h1>{html.escape(one_line(names[1]))}</h1>" in shown
    assert f"index: MIT\\n\\n[login](https://h) {html.escape('<b>')}." in shown
    assert "of `` a`b ``" in text and "my photos" not in text


def test_a_card_of_weights_that_have_seen_other_images():
    """Of other data, or of another split of these."""
    scored = replace(FACTS, training_images=60, license="CC0", scores={"Metrics/kid_efflite0": 0.25})
    scored = replace(scored, against={"heldout": "abc"})
    plain, init = (
        config.load(None, ["data.train=d", f"run.init={source}"]) for source in ("null", "/me/runs/old")
    )
    words = {name: " ".join(card(*given).split()) for name, given in {
        "plain": (plain, scored), "init": (init, scored), "moved": (plain, replace(scored, data_since=400)),
    }.items()}  # fmt: skip
    assert "the same data and were never trained on. Scores" in words["plain"]
    for name in ("init", "moved"):
        assert "the same data. Scores" in words[name] and "never trained on" not in words[name]
        assert "CC0. That of images that it was trained on before these is not part" in words[name]
    assert "shown 1,000 of them, counting repeats. It began with the weights of `old`." in words["init"]
    assert "shown 600 of them, counting repeats, after 400 of other data." in words["moved"]


def test_a_card_tells_of_settings_that_changed_in_mid_run():
    change = {"cur_nimg": 400, "key": "penalty.G.l2", "old": 0.0, "new": 0.001}
    plain = config.load(None, ["data.train=d", "penalty.G.l2=0.001"])
    files = replace(FACTS, files=("config.yaml",))
    always, changed = (" ".join(card(plain, f).split()) for f in (files, replace(files, changes=(change,))))
    assert "Some were others before: - penalty.G.l2: 0.0 → 0.001 after 400 images" in changed
    assert "| the settings at its end, which were not the same in all of the training |" in changed
    assert "others before" not in always and "| the settings it was trained with;" in always


def test_a_later_export_replaces_an_earlier_one_whole(run, tmp_path, monkeypatch):
    """Without what it does not write itself; nor anything else that lies there."""
    out = tmp_path / "out"
    monkeypatch.setattr(programs, "write_pt2", lambda program, G, draw, file: file.write_text("a program"))
    export(run, out, complete=True)
    (out / "notes.txt").write_text("mine")
    export(run, out)
    assert sorted(p.name for p in out.iterdir()) == sorted([*FILES[:3], *FILES[5:], "notes.txt"])
    assert "G_ema.pt2" not in (out / "README.md").read_text() and "samples.png" not in read(out).files


def test_what_someone_wrote_into_a_card_is_not_lost(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "write_portable", lambda *_: ([], []))
    out, card_there = tmp_path / "out", tmp_path / "out" / "README.md"
    for _ in range(2):
        export(run, out, complete=True)
    ours = card_there.read_text()
    card_there.write_text(f"{ours}\nMIT, by me.\n")
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"README\.md has been edited\. Move it away"):
        export(run, out, complete=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    export(run, out)  # a run's own, at its end
    assert card_there.read_text() == ours
    card_there.unlink()
    export(run, out, complete=True)


def test_an_export_of_another_run_is_not_replaced(run, tmp_path):
    export(run, tmp_path / "out")
    other = shutil.copytree(run, tmp_path / "other")
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["run"]["name"] = "other"
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="is an export of another run, format-2"):
        export(other, tmp_path / "out", complete=True)


def test_a_network_that_cannot_be_a_program_is_exported_without(run, tmp_path, monkeypatch):
    def refuse(G, draw):
        raise programs.UnfitError("of its nature")

    monkeypatch.setattr(programs, "record", refuse)
    result = CliRunner().invoke(command, [str(run), "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert (
        result.exit_code == 0 and result.output.splitlines()[-1] == "G_ema.pt2 is not written: of its nature"
    )
    assert "pt2" not in (tmp_path / "out" / "README.md").read_text()
    assert read(tmp_path / "out").files


def test_without_the_packages_of_onnx_nothing_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"--onnx needs onnxscript: pip install 'shardgan\[onnx\]'"):
        export(run, tmp_path / "out", complete=True, onnx=True)
    assert not [*tmp_path.iterdir()]


def test_what_a_card_lacks_without_the_data_is_a_remark(run, tmp_path, monkeypatch):
    assert export(run, tmp_path / "whole").remarks == []
    moved = shutil.copytree(run, tmp_path / "moved")
    settings = yaml.safe_load((moved / "config.yaml").read_text())
    settings["data"]["train"] = "data/photos"
    (moved / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(export_module, "write_portable", lambda *_: ([], ["G_ema.pt2 is not written"]))
    remarks = export(moved, tmp_path / "out", complete=True).remarks
    assert remarks == [
        "The run's data are not at data/photos, seen from here, or are others now, so the card lacks their "
        "number and licence; export again from where they are.",
        "G_ema.pt2 is not written",
    ]


def test_files_of_someone_else_are_left_alone(run, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that are no export, such as README\.md"):
        export(run, out)
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("README.md", "mine")]
    with pytest.raises(UserError, match=r"README\.md is a file"):
        export(run, out / "README.md")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"export.json": '{"theirs": 1}'}, r"export\.json was not written by"),
        ({"export.json": "{"}, r"export\.json was not written by"),
        ({}, r"README\.md is not the card of an export"),
        (
            {"README.md": "---\nlibrary_name: diffusers\n---\nlibrary_name: shardgan\n"},
            r"README\.md is not the",
        ),
    ],
)
def test_a_file_of_the_same_name_makes_no_export(run, tmp_path, files, named):
    files = {"G_ema.safetensors": "theirs", "README.md": "theirs", "config.yaml": "theirs"} | files
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{named} .*ShardGAN\. Give .* another --out\.$"):
        export(run, tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == files


def test_an_export_that_was_killed_is_written_again_also_into_a_repository(run, tmp_path):
    (tmp_path / ".gitattributes").write_text("")
    export(run, tmp_path)
    (tmp_path / "export.json").unlink()
    export(run, tmp_path)
    for name in ("export.json", "README.md"):
        (tmp_path / name).unlink()
    export(run, tmp_path)
    assert read(tmp_path).files[0] == "G_ema.safetensors"  # the last to be removed


def test_why_a_file_could_not_be_written_is_told_once(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file/x could not be written: Not a directory$"):
        export(run, tmp_path / "file" / "x")


def test_what_is_no_export_or_no_place_for_one_is_refused(run, exported, tmp_path):
    with pytest.raises(UserError, match="is a run folder"):
        export(run, run)
    assert config.load(run / "config.yaml").data.train == str(run.parent / FASHION.name)
    with pytest.raises(UserError, match="is an export, not a run folder"):
        export(exported, tmp_path / "again")
    with pytest.raises(UserError, match=r"no readable export\.json"):
        load_exported(run)
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    (broken / "G_ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"G_ema\.safetensors does not fit"):
        load_exported(broken)
