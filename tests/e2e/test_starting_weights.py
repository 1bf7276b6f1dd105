"""run.init: a run starts from another run, an export or files; what fits is used, and the rest named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from launching import FASHION, RunFolder
from safetensors.torch import load_file, save_file

import launch.train
import pipeline.train
from pipeline.config import UserError, load
from pipeline.run.source import check_init, fill, open_source

CONFIG = f"""
data: {{train: {FASHION}, size: 28, channels: 1, batch_size: 12, workers: 0}}
G: {{width: 4, z_dim: 8}}
D: {{width: 4}}
run: {{total_kimg: 0.036, tick_kimg: 0.012, checkpoint_kimg: 0.012}}
ema: {{kimg: 0.05}}
score: {{metrics: []}}
track: {{wandb: false}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a finished run of three updates, `source`, whose networks have batch norms."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "source.yaml").write_text(CONFIG)
    assert train(folder, "source") == 0
    return folder


def train(folder: Path, name: str, *settings: str) -> int:
    given = [f"run.name={name}", f"run.out={folder / 'runs'}", *settings]
    return pipeline.train.main([str(folder / "source.yaml"), *given])


def configured(folder: Path, *settings: str):
    return load(folder / "source.yaml", [f"run.out={folder / 'runs'}", *settings])


def exported(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / "source" / "export" / f"{name}.safetensors")


def test_it_starts_where_the_other_ended_and_resumes_without_it(place, signals_kept, capfd):
    """G from G, G_ema from G_ema, D from D. At tiny learning rates nothing else moves, but for the statistics
    of batch norms, which D's frozen layers go on collecting."""
    lost = place / "runs" / "lost"
    shutil.copytree(place / "runs" / "source", lost)
    still = ["optim.G.lr=1e-30", "optim.D.lr=1e-30", f"run.init={lost}", "D.freeze=1", "run.seed=5"]
    assert train(place, "started", "run.total_kimg=0.012", *still) == 0
    said = capfd.readouterr().out
    assert "was trained on images that are held out here, so scores flatter this run" in said, "another seed"
    assert f"G starts with 13 of its 13 tensors from {lost} at kimg 0.036\n" in said, said
    assert f"D starts with 8 of its 8 tensors from {lost} at kimg 0.036\n" in said, said
    run = RunFolder(place / "runs" / "started")
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["run"]["init"] == str(lost) and config["ema"]["rampup"] == 0.0
    found = run.exported()
    for name, tensors in found.items():
        for key, tensor in tensors.items():
            there = exported(place, name)[key]
            assert ("running" in key or "tracked" in key) != torch.allclose(
                tensor, there, rtol=0, atol=1e-7
            ), key
    assert torch.equal(found["D"]["blocks.0.conv.weight"], exported(place, "D")["blocks.0.conv.weight"])
    assert not torch.equal(found["G"]["project.weight"], found["G_ema"]["project.weight"])

    shutil.rmtree(lost)
    assert train(place, "started", "run.total_kimg=0.024", *still) == 0
    said = capfd.readouterr().out
    assert "Resuming from kimg 0.012" in said and "starts with" not in said
    for key in ("blocks.0.conv.weight", "blocks.1.conv.weight"):
        assert torch.equal(run.exported()["D"][key], found["D"][key])
    assert train(place, "started", "run.total_kimg=0.036", *still[:2], *still[3:]) == 2
    assert f"run.init: '{lost}' → None" in capfd.readouterr().err


def test_moments_come_along_if_asked_for(place, signals_kept):
    """Then a run continues where the other stopped, but for its place in data and draws."""
    init = f"run.init={place / 'runs' / 'source'}"
    steps = {}
    for name, with_moments in (("with", "true"), ("without", "false")):
        assert train(place, name, init, "run.total_kimg=0.012", f"run.init_optimizer={with_moments}") == 0
        file = place / "runs" / name / "checkpoints" / "12" / "D-00000.safetensors"
        steps[name] = load_file(file)["step/blocks.0.conv.weight"].item()
    assert steps == {"with": 4.0, "without": 1.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["run.init={}/none"], "no run, no export and no file of these names: G_ema.safetensors"),
        (["run.init={}/source.yaml"], "no run, no export and no file"),
        (["run.init={}/empty"], "holds no intact checkpoint yet"),
        (["run.init={}/runs/source", "G.width=2", "G.z_dim=7", "D.width=2"], "no weights there have"),
        (["run.init={}/runs/source/export", "run.init_optimizer=true"], "holds no moments, only weights"),
        (["run.init={}/runs/source", "run.init_optimizer=true", "optim.D.kind=sgd"], "optim.D.kind is sgd"),
        (
            ["run.init={}/runs/source", "run.init_optimizer=true", "D.width=2"],
            "no moments of this D's blocks.0.conv.weight",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_started_from_is_refused(place, settings, said, capfd):
    (place / "empty" / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copy(place / "source.yaml", place / "empty" / "config.yaml")
    given = [text.format(place) for text in settings]
    with pytest.raises(UserError, match=said):
        check_init(configured(place, "run.name=new", *given), place / "runs" / "new", 0)
    assert train(place, "new", *given) == 2
    assert said in capfd.readouterr().err and not (place / "runs" / "new" / "config.yaml").exists()


def test_the_command_refuses_before_it_starts_a_process(place, monkeypatch):
    monkeypatch.setattr(launch.train, "launch_from_here", lambda *_: pytest.fail("processes were started"))
    line = [str(place / "source.yaml"), "run.name=new", f"run.out={place / 'runs'}", "--procs", "2"]
    for setting, said in (
        (f"run.init={place}/none", "no run, no export"),
        ("D.freeze=2", "at most 1 can be"),
    ):
        result = CliRunner().invoke(launch.train.train, [*line, setting])
        assert isinstance(result.exception, UserError) and said in str(result.exception)


def test_a_source_of_the_same_split_has_seen_nothing_that_is_held_out(place, capfd):
    assert train(place, "same", "run.total_kimg=0.012", f"run.init={place / 'runs' / 'source'}") == 0
    assert "warning" not in capfd.readouterr().out


def test_moments_need_a_run_to_start_from(place):
    with pytest.raises(UserError, match=r"run\.init_optimizer: of which run"):
        configured(place, "run.init_optimizer=true")


def fills(place: Path, init: Path, player: str, *settings: str) -> tuple[str, dict[str, torch.Tensor]]:
    """What a network that is filled says and holds."""
    from pipeline.gan.networks import build_D, build_G

    config = configured(place, f"run.init={init}", "run.seed=9", *settings)
    network = (build_G if player == "G" else build_D)(config, 0)
    return fill(config, open_source(str(init)), player, network), network.state_dict()


def test_g_and_g_ema_stand_in_for_each_other_and_what_is_lacking_is_named(place, tmp_path):
    average = tmp_path / "G_ema.safetensors"
    save_file(exported(place, "G_ema"), average)
    for init in (tmp_path, average):
        source = open_source(str(init))
        assert source.tensors("D") == {}
        said, found = fills(place, init, "G")
        assert said == f"G starts with 13 of its 13 tensors from {init}"
        for tensors in (found, source.tensors("G_ema")):
            assert all(torch.equal(t, tensors[key]) for key, t in exported(place, "G_ema").items())
        said, _ = fills(place, init, "D")
        assert said.startswith(
            f"D starts with 0 of its 8 tensors from {init}; as new: blocks.0.conv.weight, "
        )

    said, found = fills(place, place / "runs" / "source", "G", "data.channels=3", "G.norm=none")
    assert "as new: project.bias, " in said and "blocks.1.conv.weight" in said
    assert torch.equal(found["project.weight"], exported(place, "G")["project.weight"])
    assert found["blocks.1.conv.weight"].shape[1] == 3
    said, _ = fills(
        place, place / "runs" / "source", "D", "data.size=128", "D.width=64", "D.spectral_norm=true"
    )
    assert said.endswith(" more") and said.count(", ") == 11


def test_a_layer_that_its_class_does_not_train_stays_as_the_class_makes_it(place):
    kind = "launch.selfcheck.networks:FrozenDiscriminator"
    said, found = fills(place, place / "runs" / "source", "D", f"D.kind={kind}", "D.options={width: 4}")
    assert said.startswith("D starts with 7 of its 7 tensors")
    there = exported(place, "D")
    assert not torch.equal(found["blocks.0.conv.weight"], there["blocks.0.conv.weight"])
    assert torch.equal(found["blocks.1.conv.weight"], there["blocks.1.conv.weight"])
