"""What `shardgan train FOLDER` trains with: a config in configs/, changed for the size and for few images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The fewer images, the sooner D knows them by heart (Karras et al. 2020, "Training GANs with limited data").
FEW = 10_000
PER_CLASS = 50  # images of a class on average, from which on it is worth a class of its own


@dataclass(frozen=True)
class Preset:
    """config: a file in configs/; about: what it is, in a few words.

    sizes: for each size of images that it has (pixels), the settings that differ there; largest: the largest
    size that it chooses by itself. few: settings for fewer than FEW images, and `few_about` in words;
    many_about: the augmentation of more images, in words; "" for none.
    why_not_conditional: why it trains on classes only where that is asked for; "" where it does by itself.
    """

    config: str
    about: str
    sizes: Mapping[int, tuple[str, ...]]
    largest: int
    few: tuple[str, ...]
    few_about: str
    many_about: str = ""
    why_not_conditional: str = ""

    @property
    def conditional(self) -> bool:
        return not self.why_not_conditional

    def size_for(self, side: int) -> int:
        """The largest of its own sizes that an image of `side` pixels fills; else its smallest."""
        return max((size for size in self.sizes if size <= min(side, self.largest)), default=min(self.sizes))

    def at(self, size: int) -> tuple[str, ...]:
        """The settings at a size; of one it does not have, those of the nearest smaller one."""
        return self.sizes[max((known for known in self.sizes if known <= size), default=min(self.sizes))]


def _width(width: int, *settings: str) -> tuple[str, ...]:
    return (f"G.width={width}", f"D.width={width}", *settings)


def _gamma(start: float) -> str:
    return f"penalty.r1.gamma=[{start:g},{start / 10:g}]"  # R2's follows


CPU = Preset(
    "own-cpu.yaml",
    "a small DCGAN, as there is no GPU",
    {
        28: _width(64),
        32: _width(64),  # as small-data.yaml
        # Half the width at twice the size takes as long per image; the rate is that of Radford et al., who
        # trained at 64 px.
        64: _width(32, "optim.D.lr=2e-4"),
        128: _width(16, "optim.D.lr=2e-4"),
    },
    largest=32,  # what a quarter of an hour of two cores is enough for
    # With p = 0.5 from the beginning 6,000 images got a worse score (small-data.yaml). This p stays at 0
    # until D is surer of real images than an unfitted one can be, as there in the second half.
    few=("augment.ops=[shift,colour,cutout]", "augment.target=0.6"),
    few_about="shift, colour and cutout, as soon as D overfits",
    # 2,000 images of CIFAR-10 in three classes at random, 10 to 30 kimg: with classes one image for each,
    # without them many.
    why_not_conditional="as so small a DCGAN tends to make one image for each",
)
GPU = Preset(
    "own-gpu.yaml",
    "R3GAN at half its published width",
    {
        # γ is a matter of the data. Published: 0.05 (CIFAR-10) to 1 (stacked MNIST) at these sizes, …
        # From 64 px on the activations of a round take 9 to 11 GiB in fp32, 18 at most; half of it in bf16.
        28: _width(384, _gamma(0.5)),
        32: _width(384, _gamma(0.5)),
        64: _width(192, _gamma(2)),  # … 2 for FFHQ-64, …
        128: _width(96, _gamma(17), "data.batch_gpu=16"),  # (between its neighbours, by their ratio)
        256: _width(48, _gamma(150), "data.batch_gpu=8"),  # … and 150 for FFHQ-256.
    },
    largest=256,
    few=("augment.p=[0,0.6]",),  # about as for CIFAR-10 (0.55); from 0.8 on it shows in the images (Karras)
    few_about="up to p = 0.6",
    many_about="up to p = 0.3",
)
