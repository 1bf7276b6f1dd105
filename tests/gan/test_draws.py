"""Randomness is a function of (seed, purpose, cur_nimg), and fake labels follow the data's."""

import pytest
import torch

from pipeline.gan.draws import Draws, derive_seed


def test_seeds_are_fixed_for_ever():
    """A resumed run must draw what the unbroken one drew, in any later version: this number stays."""
    assert derive_seed(0, "latents", "D", 64) == 4273574957467270480
    assert 0 <= derive_seed("x") < 2**63


def test_seeds_differ_wherever_the_parts_do():
    parts = [(1, 2), (12,), ("1", 2), (1, "2"), ("12",), (2, 1), ("a", "b"), ("ab",), ("a,b",), ("a', 'b",)]
    assert len({derive_seed(*p) for p in parts}) == len(parts)


def test_the_same_place_gives_the_same_draw_and_another_place_another():
    draws, again = Draws(7, 16, [1, 1]), Draws(7, 16, [1, 1])
    torch.randn(5)  # what else is drawn does not matter
    z, c, *_ = draws.latents("D", 640, 8)
    z2, c2, *_ = again.latents("D", 640, 8)
    assert torch.equal(z, z2) and torch.equal(c, c2)
    others = [
        draws.latents("G", 640, 8),
        draws.latents("D", 648, 8),
        Draws(8, 16, [1, 1]).latents("D", 640, 8),
    ]
    assert all(not torch.equal(z, other) for other, *_ in others)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    Draws(0, 4, [1, 2]).latents("D", 0, 100)
    assert torch.equal(torch.randn(4), expected)


def test_latents_are_standard_normal():
    z, c, *_ = Draws(0, 64, None).latents("D", 0, 4096)
    assert z.shape == (4096, 64) and z.dtype == torch.float32 and z.device.type == "cpu" and c is None
    n = z.numel()
    assert abs(z.mean().item()) < 5 / n**0.5 and abs(z.std().item() - 1) < 5 / (2 * n) ** 0.5
    assert abs((z**4).mean().item() - 3) < 5 * (96 / n) ** 0.5


def test_what_networks_draw_themselves_has_a_seed_of_its_own():
    draws = Draws(7, 16, None)
    seeds = {draws.latents(purpose, n, 2).seed for purpose in ("D", "G") for n in (0, 64)}
    assert len(seeds) == 4 and draws.latents("D", 64, 5).seed in seeds


def test_ranks_and_rounds_partition_one_draw():
    """However many ranks slice it, the global batch is the same."""
    z, c, *_ = Draws(1, 8, [3, 1]).latents("G", 128, 12)
    for world in (1, 2, 3, 4):
        slices = [slice(r * 12 // world, (r + 1) * 12 // world) for r in range(world)]
        drawn = [Draws(1, 8, [3, 1]).latents("G", 128, 12) for _ in slices]  # by each rank for itself
        assert torch.equal(torch.cat([zs[s] for (zs, *_), s in zip(drawn, slices, strict=True)]), z)
        assert torch.equal(torch.cat([cs[s] for (_, cs, *_), s in zip(drawn, slices, strict=True)]), c)


def test_fake_labels_follow_the_frequencies():
    frequencies = torch.tensor([50.0, 0.0, 30.0, 15.0, 5.0, 0.0])
    _, c, *_ = Draws(0, 2, frequencies.tolist()).latents("G", 0, 20_000)
    assert c.dtype == torch.int64
    counts = torch.bincount(c, minlength=6).double()
    expected = 20_000 * frequencies.double() / 100
    assert counts[1] == 0 and counts[5] == 0
    occurring = expected > 0
    chi2 = ((counts - expected)[occurring] ** 2 / expected[occurring]).sum().item()
    assert chi2 < 16.3  # 0.1 % of χ² with 3 degrees of freedom


@pytest.mark.parametrize("frequencies", [[1.0], [0, 0, 1e-12], [0.1] * 10])
def test_every_label_is_a_class_that_occurs(frequencies):
    _, c, *_ = Draws(0, 1, frequencies).latents("D", 0, 5000)
    occurring = torch.tensor(frequencies).nonzero().flatten()
    assert torch.isin(c, occurring).all()


@pytest.mark.parametrize("frequencies", [[0.0, 0.0], [1.0, -1.0], []])
def test_impossible_frequencies_are_refused(frequencies):
    with pytest.raises(ValueError, match="frequencies"):
        Draws(0, 1, frequencies)


def test_grid_has_a_class_per_column():
    draws = Draws(0, 4, [5, 0, 5, 5])
    z, c = draws.grid(9)
    assert torch.equal(z, draws.grid(9)[0]) and z.shape == (9, 4)
    assert draws.grid_columns(9) == 3
    assert c.view(-1, 3).tolist() == [[0, 2, 3]] * 3


@pytest.mark.parametrize(("frequencies", "columns"), [(None, 8), ([1] * 10, 10), ([1] * 1000, 8), ([1], 8)])
def test_grid_columns(frequencies, columns):
    assert Draws(0, 4, frequencies).grid_columns(64) == columns


def test_mixed_latents_have_a_second_z_and_a_crossover():
    draws, z = Draws(5, 3, None), torch.randn(4000, 3)
    mixed = draws.mixed(z, 0.9, "D", 64)
    assert mixed.shape == (4000, 7) and mixed.dtype == torch.float32
    assert torch.equal(mixed[:, :3], z) and torch.equal(mixed, draws.mixed(z, 0.9, "D", 64))
    other, crossover = mixed[:, 3:6], mixed[:, 6]
    assert abs(other.mean()) < 0.05 and abs(other.std() - 1) < 0.05 and abs((other * z).mean()) < 0.05
    share = (crossover < 1).float().mean()
    assert abs(share - 0.9) < 0.03 and abs(crossover[crossover < 1].mean() - 0.5) < 0.03
    assert (draws.mixed(z, 1.0, "D", 64)[:, 6] < 1).all() and (draws.mixed(z, 0.0, "D", 64)[:, 6] == 1).all()
    for another in (draws.mixed(z, 0.9, "G", 64), draws.mixed(z, 0.9, "D", 128)):
        assert not torch.equal(another[:, 3:6], other)
