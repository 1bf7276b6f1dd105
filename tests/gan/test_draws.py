"""Randomness is a function of (seed, purpose, cur_nimg), and fake labels follow the data's."""

import pytest
import torch

from pipeline.gan import draws as module
from pipeline.gan.augment import OPS, Augmentation
from pipeline.gan.draws import BLOCK, Draws, Samples, derive_seed
from pipeline.parallel.batch import BatchShape

AUGMENT = Augmentation(OPS, 16)
every = Samples.all


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
    z, c, *_ = draws.latents("D", 640, every(8))
    z2, c2, *_ = again.latents("D", 640, every(8))
    assert torch.equal(z, z2) and torch.equal(c, c2)
    others = [
        draws.latents("G", 640, every(8)),
        draws.latents("D", 648, every(8)),
        Draws(8, 16, [1, 1]).latents("D", 640, every(8)),
    ]
    assert all(not torch.equal(z, other) for other, *_ in others)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    Draws(0, 4, [1, 2]).latents("D", 0, every(100))
    assert torch.equal(torch.randn(4), expected)


def test_latents_are_standard_normal():
    z, c, *_ = Draws(0, 64, None).latents("D", 0, every(4096))
    assert z.shape == (4096, 64) and z.dtype == torch.float32 and z.device.type == "cpu" and c is None
    n = z.numel()
    assert abs(z.mean().item()) < 5 / n**0.5 and abs(z.std().item() - 1) < 5 / (2 * n) ** 0.5
    assert abs((z**4).mean().item() - 3) < 5 * (96 / n) ** 0.5


def test_what_networks_draw_themselves_has_a_seed_of_its_own():
    draws = Draws(7, 16, None)
    seeds = {draws.latents(purpose, n, every(2)).seed for purpose in ("D", "G") for n in (0, 64)}
    assert len(seeds) == 4 and draws.latents("D", 64, every(5)).seed in seeds


def all_of(draws: Draws, samples: Samples) -> list[torch.Tensor]:
    """Everything that training may draw in an update."""
    z, c, *_ = draws.latents("G", 128, samples)
    mixed = draws.mixed(z, 0.5, "G", 128, samples)
    augmentation = draws.augmentation(AUGMENT, 0.5, "G", 128, samples)
    return [z, c, mixed, draws.uniform("mix", 128, samples), augmentation]


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(("world", "rounds"), [(1, 1), (1, 5), (2, 1), (2, 3), (3, 2), (6, 5), (300, 1)])
def test_ranks_and_rounds_partition_one_draw(version, world, rounds):
    """However many ranks draw it, the global batch is the same, bit for bit; its last block is not full."""
    draws, batch = Draws(1, 8, [3, 1], version), BatchShape(world, rounds, 300 // (world * rounds))
    whole = all_of(draws, every(300))
    for rank in range(world):
        parts = tuple(batch.part(rank, number) for number in range(rounds))
        for mine, tensor in zip(all_of(draws, Samples(300, parts)), whole, strict=True):
            assert torch.equal(mine, tensor[batch.positions(rank)])


def test_a_rank_draws_the_blocks_of_its_samples_and_no_others(monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "_normal", lambda out, generator: drawn.append(len(out)))
    for rank in range(8):
        Draws(0, 4, None).latents("D", 0, Samples(2048, (BatchShape(8, 1, 256).part(rank, 0),)))
    assert drawn == [BLOCK] * (2048 // BLOCK)
    drawn.clear()
    Draws(0, 4, None).latents("D", 0, Samples(300, (slice(60, 70), slice(120, 125), slice(290, 300))))
    assert drawn == [64, 64, 300 - 4 * 64]
    drawn.clear()
    Draws(0, 4, None, version=1).latents("D", 0, Samples(300, (slice(60, 70),)))
    assert drawn == [300]


def test_numbers_of_a_version_are_fixed_for_ever():
    """Runs continue in later versions, those that were begun before there were blocks included."""

    def source(*parts):
        return torch.Generator().manual_seed(derive_seed(7, *parts))

    for version, block in ((1, ()), (2, (1,)), (3, (1,))):
        drawn = Draws(7, 8, None, version).latents("G", 128, every(100))
        assert drawn.key is (drawn.z if version == 3 else None)
        first, count = (0, 100) if version == 1 else (64, 36)
        z, c, mixed, mix, augmentation = (t[first:] for t in all_of(Draws(7, 8, [3, 1], version), every(100)))
        assert torch.equal(z, torch.randn(count, 8, generator=source("latents", "G", 128, *block)))
        u = torch.rand(count, dtype=torch.float64, generator=source("labels", "G", 128, *block))
        assert c.tolist() == (u >= 0.75).tolist()
        generator = source("mixing", "G", 128, *block)
        assert torch.equal(mixed[:, 8:16], torch.randn(count, 8, generator=generator))
        where, mixes = torch.rand(2, count, 1, generator=generator)
        assert torch.equal(mixed[:, 16:], where.where(mixes < 0.5, 1.0))
        assert torch.equal(mix, torch.rand(count, generator=source("mix", 128, *block)))
        generator = source("augmentation", "G", 128, *block)
        numbers = torch.rand(count, 16, dtype=torch.float64, generator=generator)
        assert torch.equal(augmentation, AUGMENT.parameters(numbers, 0.5))


def test_grids_and_scores_have_the_same_latents_in_every_version():
    for version in (1, 2, 3):
        z, c, *_ = Draws(7, 8, [3, 1], version).fixed("score", 100)
        first, labels, *_ = Draws(7, 8, [3, 1], 1).latents("score", 0, every(100))
        assert torch.equal(z, first) and torch.equal(c, labels)


def test_fake_labels_follow_the_frequencies():
    frequencies = torch.tensor([50.0, 0.0, 30.0, 15.0, 5.0, 0.0])
    _, c, *_ = Draws(0, 2, frequencies.tolist()).latents("G", 0, every(20_000))
    assert c.dtype == torch.int64
    counts = torch.bincount(c, minlength=6).double()
    expected = 20_000 * frequencies.double() / 100
    assert counts[1] == 0 and counts[5] == 0
    occurring = expected > 0
    chi2 = ((counts - expected)[occurring] ** 2 / expected[occurring]).sum().item()
    assert chi2 < 16.3  # 0.1 % of χ² with 3 degrees of freedom


@pytest.mark.parametrize("frequencies", [[1.0], [0, 0, 1e-12], [0.1] * 10])
def test_every_label_is_a_class_that_occurs(frequencies):
    _, c, *_ = Draws(0, 1, frequencies).latents("D", 0, every(5000))
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
    draws, z, four = Draws(5, 3, None), torch.randn(4000, 3), every(4000)
    mixed = draws.mixed(z, 0.9, "D", 64, four)
    assert mixed.shape == (4000, 7) and mixed.dtype == torch.float32
    assert torch.equal(mixed[:, :3], z) and torch.equal(mixed, draws.mixed(z, 0.9, "D", 64, four))
    other, crossover = mixed[:, 3:6], mixed[:, 6]
    assert abs(other.mean()) < 0.05 and abs(other.std() - 1) < 0.05 and abs((other * z).mean()) < 0.05
    share = (crossover < 1).float().mean()
    assert abs(share - 0.9) < 0.03 and abs(crossover[crossover < 1].mean() - 0.5) < 0.03
    assert (draws.mixed(z, 1.0, "D", 64, four)[:, 6] < 1).all() and (
        draws.mixed(z, 0.0, "D", 64, four)[:, 6] == 1
    ).all()
    for another in (draws.mixed(z, 0.9, "G", 64, four), draws.mixed(z, 0.9, "D", 128, four)):
        assert not torch.equal(another[:, 3:6], other)
