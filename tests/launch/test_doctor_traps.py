"""doctor's checks of networks and of what is trained, on real mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doctored import GOOD, VIT, job
from safetensors.torch import save_file
from torch import nn

from launch.doctor import data as doctor_data
from launch.doctor import networks as doctor_networks
from launch.doctor.finding import Finding, Job
from pipeline import config
from pipeline.data.index import load_index
from pipeline.gan.networks import build_G
from tests.published import PUBLISHED

LATENT = ["G.kind=launch.selfcheck.networks:LatentGenerator", "G.options={width: 8, norm: none}"]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)


def networks(asked: Job) -> dict[str, Finding]:
    _, _, found = doctor_networks.examine(asked, None)
    return {finding.check: finding for finding in found}


class Tied(nn.Module):
    """D with one kernel under two names."""

    def __init__(self, size: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.a = nn.Linear(channels * size * size, 1)
        self.b = nn.Linear(channels * size * size, 1)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        return (self.a(x.flatten(1)) + self.b(x.flatten(1))).flatten()


def test_tied_weights_fail_under_fsdp2_only() -> None:
    kind = f"D.kind={__name__}:Tied"
    for strategy in ("fsdp2", "hsdp"):
        assert networks(job(kind, strategy=strategy))["sharding"].verdict == "would fail"
    assert "sharding" not in networks(job(kind, strategy="zero2"))


@pytest.mark.parametrize(
    ("settings", "strategy", "check", "words"),
    [
        (["G.norm=batch", "D.norm=batch"], "ddp", "BatchNorm", ["G and D", "over the 10 images"]),
        (["D.norm=batch", "penalty.r1.gamma=1"], "single", "R1", ["depends on the others"]),
        (["penalty.G.l2=1e-4"], "ddp", "weight penalty", ["λ_G on weights", "2 of 3 kernels"]),
        (["D.spectral_norm=true", "penalty.D.l1=1e-4"], "ddp", "weight penalty", ["λ_D on", "3 of 3"]),
        (["run.checkpoint_kimg=500"], "ddp", "checkpoints", ["every 500 of 1000 kimg"]),
        (["run.tick_kimg=0.04"], "ddp", "ticks", ["25,000 ticks of 0.04 kimg"]),
    ],
)  # fmt: skip
def test_traps(settings: list[str], strategy: str, check: str, words: list[str]) -> None:
    found = networks(job(*settings, strategy=strategy, procs=1 if strategy == "single" else 2))[check]
    assert found.verdict == "warning" and found.remedy
    assert all(word in found.text for word in words), found.text


@pytest.mark.parametrize(
    ("settings", "precision", "word"),
    [
        (["penalty.r2.gamma=1"], "fp16", "fp16"),
        (["penalty.r1.gamma=1", "penalty.r1.fraction=1/4"], "no", "4"),
    ],
)
def test_an_objective_that_training_refuses(settings: list[str], precision: str, word: str) -> None:
    found = networks(job(*settings, precision=precision))["objective"]
    assert found.verdict == "would fail" and word in found.text


def test_a_batch_that_cannot_be_divided_hides_nothing_of_the_objective() -> None:
    """That it cannot is for the check of the batch to say."""
    odd = ["data.batch_size=13", "penalty.r1.gamma=1", "penalty.r1.fraction=1/4"]
    assert "objective" not in networks(job(*odd))
    refused = networks(job(*odd, "penalty.r2.gamma=1", precision="fp16"))["objective"]
    assert refused.verdict == "would fail" and "penalty.r2 under fp16" in refused.text
    assert "interval=16" in networks(job(*odd, "loss.kind=relativistic"))["objective"].text


def test_what_a_run_remarks_on_is_a_warning() -> None:
    found = networks(job("penalty.r1.gamma=1", "loss.kind=relativistic"))["objective"]
    assert found.verdict == "warning" and "interval=16" in found.text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            ["penalty.r1.gamma=[1,0]", "penalty.r2.gamma=1", "run.burn_in_kimg=1"],
            "r1 and r2: each rank gathers all of D",
        ),
        (["penalty.wgan_gp.weight=1"], "wgan_gp: each rank gathers all of D"),
        ([*LATENT, "penalty.path.weight=1"], "path length: each rank gathers all of G"),
        (["penalty.r1.gamma=1", "penalty.r1.sigma=0.1"], None),
        ([], None),
    ],
)  # fmt: skip
def test_what_is_differentiated_twice_is_gathered_under_zero3(settings: list[str], text: str | None) -> None:
    name = "gradient penalty"
    assert name not in networks(job(*settings, strategy="zero2"))
    found = networks(job(*settings, strategy="zero3"))
    assert (name in found) == (text is not None)
    assert text is None or found[name].text.startswith(text)


def test_norms_over_all_ranks_are_no_trap() -> None:
    found = networks(job("G.norm=sync_batch", "D.norm=sync_batch", procs=2))["BatchNorm"]
    assert found.verdict == "ok" and "over the 20 images of a round" in found.text


@pytest.mark.parametrize(("lr", "said"), [("1.6e-3", False), ("[1.6e-3,1e-4]", False), ("2e-4", True)])
def test_a_transformer_s_learning_rate_falls_with_its_width(lr: str, said: bool) -> None:
    widths = ["G.width=96", "D.width=96"]
    found = networks(
        job(*VIT, *widths, f"optim.D.lr={lr}", "optim.G.lr=1.6e-3", "run.burn_in_kimg=1", procs=1)
    )
    assert found["networks"].verdict == "ok" and ("learning rate" in found) == said
    if said:
        assert "optim.D.lr=0.0002" in found["learning rate"].text
        assert "optim.D.lr=0.0016" in str(found["learning rate"].remedy)


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ([], ", data.xflip, or"),
        (["data.xflip=true"], ", augment.ops, or"),
        (["data.channels=4", "G.kind=r3gan", "score.metrics=[]"], ", augment.ops, or"),  # latents
        (["data.xflip=true", "augment.ops=[shift]", "augment.p=0.1"], "images, or"),
    ],
)
def test_what_makes_more_of_few_images_is_something_that_can_be_set(settings: list[str], way: str) -> None:
    asked = job("data.batch_size=64", *settings)
    found = next(doctor_data.split(asked, load_index(str(asked.config.data.train))))
    assert found.verdict == "warning" and f"{way} a larger λ_D" in found.remedy


def test_no_trap_without_cause() -> None:
    found = networks(job("penalty.D.l2=1e-4"))
    assert set(found) == {"networks", "weight penalty"} and found["weight penalty"].verdict == "ok"
    assert "through all of its kernels" in found["weight penalty"].text
    assert set(networks(job())) == {"networks"}
    assert "BatchNorm" not in networks(job("G.norm=batch", procs=1))


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_configs_report_as_often_as_is_sensible(file: Path) -> None:
    asked = Job(config.load(file, ["data.train=x"]), 1, 8, "ddp", "bf16")
    nothing = nn.Identity()
    found = [finding.check for finding in doctor_networks.cadence(asked, nothing, nothing)]
    assert "ticks" not in found


def test_what_a_run_is_to_start_from_is_looked_for(tmp_path: Path) -> None:
    found = networks(job(f"run.init={tmp_path}", f"run.out={tmp_path}"))["run.init"]
    assert found.verdict == "would fail" and "no run, no export" in found.text
    save_file(build_G(job().config, 0).state_dict(), tmp_path / "G_ema.safetensors")
    found = networks(job(f"run.init={tmp_path}", f"run.out={tmp_path}"))["run.init"]
    assert found.verdict == "ok" and found.text == f"starts from {tmp_path}"
