"""Images by seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config import Config, UserError, load
from pipeline.gan.networks import build_G
from pipeline.gan.truncation import Truncated
from pipeline.run.sampling import Sampler
from pipeline.run.state import State

NAMES = ("boot", "Dress", "10")
FREQUENCIES = [0.7, 0.3, 0.0]


def config_of(tmp_path, *settings: str) -> Config:
    (tmp_path / "config.yaml").write_text(
        "data: {train: data, size: 28, channels: 3}\nG: {width: 4, z_dim: 8}"
    )
    return load(tmp_path / "config.yaml", list(settings))


def sampler(tmp_path, *settings: str, conditional: bool = True) -> Sampler:
    config = config_of(tmp_path, *settings)
    torch.manual_seed(0)
    G = build_G(config, 3 if conditional else 0).requires_grad_(False).eval()
    for p in G.parameters():
        p += 0.3 * torch.randn_like(p)
    return Sampler(G, config, *((FREQUENCIES, NAMES) if conditional else ()))


def test_an_image_is_a_function_of_its_seed(tmp_path):
    """Whatever the others, their order and their number (130: three batches)."""
    makes = sampler(tmp_path)
    many = makes.sample(range(130))
    assert many.dtype == torch.uint8 and many.shape == (130, 3, 28, 28)
    few = makes.sample([129, 2, 2, 70])
    assert (many[[129, 2, 2, 70]].int() - few.int()).abs().max() <= 1  # rounding
    assert many.float().std(0).mean() > 5, "other seeds, other images"


def test_the_latents_are_those_of_numpys_frozen_stream(tmp_path):
    z, _ = sampler(tmp_path).latents([3, 2**32 - 1])
    assert torch.equal(z[0], torch.from_numpy(np.random.RandomState(3).randn(8)).float())
    many, labels = sampler(tmp_path).latents(range(4000))
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03
    assert abs((labels == 0).float().mean() - 0.7) < 0.03 and (labels < 2).all()
    assert sampler(tmp_path, conditional=False).latents([3])[1] is None
    for seed in (-1, 2**32, 1.5):
        with pytest.raises(UserError, match="seeds are whole numbers from 0"):
            sampler(tmp_path).latents([0, seed])
    with pytest.raises(UserError, match=r"as in range\(3\)"):
        sampler(tmp_path).latents(3)


def test_classes_by_number_and_name(tmp_path):
    makes = sampler(tmp_path)
    assert makes.classes(["Dress", "dress", 1, "0", "10", 2]) == [1, 1, 1, 0, 2, 2]
    boots = makes.sample([5, 6], "boot")
    assert torch.equal(boots, makes.sample([5, 6], ["boot", 0]))
    assert not torch.equal(boots, makes.sample([5, 6], ["boot", "Dress"]))
    for one in (np.int64(2), torch.tensor(2)):
        assert torch.equal(makes.sample([5, 6], one), makes.sample([5, 6], 2))
    assert torch.equal(makes.sample(np.array([5, 6]), np.array([2, 2])), makes.sample([5, 6], 2))
    with pytest.raises(UserError, match=r"seeds=3: give several, as in range\(3\)"):
        makes.sample(np.int64(3))
    number, name = makes.sample([5], 2), makes.sample([5], "10")
    assert torch.equal(number, name) and torch.equal(number, makes.sample([5], [np.int64(2)]))
    for wrong, message in [("boots", "did you mean 'boot'"), ("xyz", "they are boot"), (3, "from 0 to 2")]:
        with pytest.raises(UserError, match=message):
            makes.sample([5], wrong)
    for number in (10, -1):  # 10 is a name, not a number, of a class
        with pytest.raises(UserError, match=f"no class {number}: classes are from 0 to 2"):
            makes.sample([5], number)
    with pytest.raises(UserError, match="3 classes for 2 seeds"):
        makes.sample([5, 6], [0, 1, 1])
    with pytest.raises(UserError, match="unconditional"):
        sampler(tmp_path, conditional=False).sample([5], 0)


def test_truncation_is_that_of_the_family(tmp_path):
    makes = sampler(tmp_path, "G.kind=stylegan2", "G.max_width=8")
    z, c = makes.latents([1, 2])
    expected = Truncated(makes.G, 0.5)(z, c)
    found = makes.sample([1, 2], truncation=0.5)
    assert (found.float() / 127.5 - 1 - expected.clamp(-1, 1)).abs().max() <= 0.5001 / 127.5
    assert not torch.equal(found, makes.sample([1, 2]))
    with pytest.raises(UserError, match="latent w"):
        sampler(tmp_path).sample([1], truncation=0.5)


def test_a_class_without_a_known_name_goes_by_its_number():
    assert State(label_frequencies=[0.5, 0.5]).classes == ("0", "1")
    assert State(label_frequencies=[0.5, 0.5], class_names=["a", "b"]).classes == ("a", "b")
    assert State().classes == ()


@pytest.mark.parametrize("psi", [float("nan"), float("inf"), -1])
def test_a_truncation_that_is_no_number_from_0_is_refused(tmp_path, psi):
    with pytest.raises(UserError, match="give a number from 0"):
        sampler(tmp_path).sample([1], truncation=psi)
