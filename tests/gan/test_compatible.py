"""Which objectives are refused, and which are remarked on: by the network that is built, not by its keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.config import UserError, load
from pipeline.gan.compatible import check_layers, check_objective, check_path, remarks
from pipeline.gan.networks import check_networks
from pipeline.gan.sync_batch_norm import SyncBatchNorm2d

PLAIN = nn.Sequential(nn.Conv2d(1, 1, 3))
NORMED = [nn.Sequential(nn.Conv2d(1, 1, 3), norm(1)) for norm in (nn.BatchNorm2d, SyncBatchNorm2d)]
NOISY = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Dropout(0.1))
R1, R2, PATH = "penalty.r1.gamma=1", "penalty.r2.gamma=1", "penalty.path.weight=2"
OBJECTIVES = {
    "loss.kind=relativistic": ("loss.kind=relativistic",),
    "penalty.r2": (R2,),
    "penalty.wgan_gp": ("penalty.wgan_gp.weight=10",),
    "penalty.r1.fraction": (R1, "penalty.r1.fraction=1/4"),
    "penalty.r1.sigma": (R1, "penalty.r1.sigma=0.1"),
}


def config(*settings: str):
    return load(None, ["data.train=none", "run.burn_in_kimg=1", *settings])


@pytest.mark.parametrize("what", OBJECTIVES)
@pytest.mark.parametrize("normed", NORMED)
def test_batch_norm_in_D_is_refused_where_an_images_logit_must_be_its_own(what, normed):
    given = config(*OBJECTIVES[what])
    check_layers(given, PLAIN)
    with pytest.raises(UserError, match=f"{what} together with batch normalisation in D"):
        check_layers(given, normed)


def test_R1_goes_with_batch_norm():
    for normed in NORMED:
        check_layers(config(R1), normed)


def test_a_schedule_that_ends_at_0_is_used():
    with pytest.raises(UserError, match=r"penalty\.r2"):
        check_layers(config("penalty.r2.gamma=[1,0]"), NORMED[0])
    check_layers(config("penalty.r2.fraction=1/4", "penalty.r2.sigma=0.1"), NORMED[0])  # γ is 0


def test_dropout_in_D_is_refused_for_a_finite_difference_only():
    check_layers(config(R1, R2), NOISY)
    check_layers(config(R1, "penalty.r1.sigma=0.1"), nn.Sequential(nn.Dropout(0.0)))
    with pytest.raises(UserError, match=r"D\.dropout=0"):
        check_layers(config(R1, "penalty.r1.sigma=0.1"), NOISY)


def test_the_networks_of_a_config_are_looked_at_before_any_process_starts():
    with pytest.raises(UserError, match=r"D\.norm to none"):
        check_networks(config("loss.kind=relativistic", "data.size=32"), 0)  # dcgan's default is batch norm
    check_networks(config("loss.kind=relativistic", "data.size=32", "D.norm=group"), 0)


class Offering(nn.Module):
    """x = A w of w = B z, of which it offers what it is told to."""

    def __init__(self, offered):
        super().__init__()
        self.mapping, self.out, self.offered = nn.Linear(3, 4), nn.Linear(4, 9), offered

    def forward(self, z):
        w = self.mapping(z)
        if (offered := self.offered(z, w)) is not None:
            self.latent = offered
        return self.out(w).view(-1, 1, 3, 3)


@pytest.mark.parametrize(
    ("offered", "words"),
    [
        (lambda z, w: None, r"sets self\.latent .* G\.kind=a\.b:C has none"),
        (lambda z, w: "w", "has str"),
        (lambda z, w: w[:1], r"has \[1, 4\]"),
        (lambda z, w: w[:, None, None], r"has \[2, 1, 1, 4\]"),
        (lambda z, w: z, "not computed from the very tensor"),
        (lambda z, w: w.detach(), "not computed from the very tensor"),
        (lambda z, w: w[:, None].repeat(1, 2, 1), "not computed from the very tensor"),
    ],
)
def test_path_length_is_refused_for_a_G_whose_images_do_not_come_from_the_latent_it_offers(offered, words):
    given, G = config(PATH, "G.kind=a.b:C"), Offering(offered)
    with pytest.raises(UserError, match=words):
        check_path(given, G, G(torch.zeros(2, 3)))


def test_path_length_is_taken_of_a_G_that_offers_its_latent():
    G = Offering(lambda z, w: w)
    check_path(config(PATH), G, G(torch.zeros(2, 3)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, SyncBatchNorm2d])
def test_path_length_is_refused_with_batch_norm_in_G(norm):
    G = Offering(lambda z, w: w)
    G.normed = norm(1)
    with pytest.raises(UserError, match=r"batch normalisation in G.*G\.norm to none"):
        check_path(config(PATH), G, G(torch.zeros(2, 3)))


def test_path_length_is_decided_before_any_process_starts():
    with pytest.raises(UserError, match=r"G\.kind=dcgan has none"):
        check_networks(config(PATH, "data.size=32", "G.norm=none"), 0)
    check_networks(config("data.size=32", "G.norm=none"), 0)
    kind = ("G.kind=launch.selfcheck.networks:LatentGenerator", "data.size=32", PATH)
    check_networks(config(*kind, "G.options.norm=none"), 0)
    with pytest.raises(UserError, match="batch normalisation in G"):
        check_networks(config(*kind), 0)


@pytest.mark.parametrize(
    "settings",
    [OBJECTIVES[w] for w in ("loss.kind=relativistic", "penalty.r2", "penalty.wgan_gp")] + [(PATH,)],
)
def test_fp16_is_refused(settings):
    check_objective(config(*settings), 8, "bf16")
    with pytest.raises(UserError, match="--mixed_precision bf16"):
        check_objective(config(*settings), 8, "fp16")


def test_R1_goes_with_fp16():
    check_objective(config(R1), 8, "fp16")


def test_a_fraction_must_divide_a_rounds_images():
    given = config(R1, "penalty.r1.fraction=0.25")
    check_objective(given, 8, "no")
    with pytest.raises(UserError, match=r"fraction=1/4: 4 does not divide .* 6\."):
        check_objective(given, 6, "no")
    check_objective(config("penalty.r1.fraction=0.25"), 6, "no")  # γ is 0


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as refused:
        check_objective(config(R2, "penalty.r2.fraction=1/4", "loss.kind=relativistic"), 6, "fp16")
    assert len(str(refused.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("settings", "precision", "words"),
    [
        ((R1, R2, "loss.kind=relativistic"), "bf16", ["penalty.r1.interval=16"]),
        ((R1, R2, "loss.kind=relativistic", "penalty.r1.interval=1"), "bf16", []),
        ((R2, "penalty.r2.sigma=0.1"), "bf16", ["outweighs"]),
        ((R2, "penalty.r2.sigma=0.1", "penalty.r2.sided=1"), "no", ["outweighs", "sided=1"]),
        (
            ("augment.ops=[flip]", "augment.p=[0.9,0.5]", "run.burn_in_kimg=9"),
            "no",
            ["augment.p=0.9: above 0.8"],
        ),
        (("augment.ops=[flip]", "augment.p=0.8"), "no", []),
        ((R2, "penalty.r2.sigma=0.01"), "no", ["outweighs"]),
        ((R2, "penalty.r2.sigma=0.01"), "bf16", ["outweighs", "Use 0.03 or more"]),
        (("G.kind=mine:G", "G.norm=none", "G.width=8"), "no", ["G.norm, G.width: without effect on mine:G"]),
        (
            ("G.kind=mine:G", "D.norm=none", "G.z_dim=8", "D.kind=mine:D", "D.freeze=1"),
            "no",
            ["D.norm: with"],
        ),
    ],
)
def test_remarks(settings, precision, words):
    lines = list(remarks(config(*settings), precision))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))
