"""StyleGAN2 (Karras et al. 2019, 2020; configuration F: skip G, residual D), written from the papers.

G maps z to a latent w, from which every layer of the synthesis takes its scales. At 256 px, width 64 and
z_dim 512, G has 24.77 M parameters and D 24.00 M. Each is a sequence of blocks, sharded one by one.

Left out is D's minibatch standard deviation: it makes an image's logit depend on the other images of a rank,
with which R1, R2 and relativistic pairs lose their meaning, and results would depend on the number of ranks.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.gan.equalised import EqualisedConv2d, EqualisedLinear, ModulatedConv2d
from pipeline.gan.layers import Activation, activation_layer, run, run_all, start_and_widths
from pipeline.gan.noise import keys_of, white_noise
from pipeline.gan.resample import enlarge, shrink

SIZES = (28, 32, 64, 128, 256, 512, 1024)
_LEARNS = 0.01  # the mapping's learning rate multiplier
_TINY = 1e-8


class Generator(nn.Module):
    """G: z float [N, z_dim] and labels c int64 [N] (None if num_classes is 0) → images [N,C,H,W], unbounded.

    mapping: layers of the mapping network, z_dim wide, as is w. width, max_width: channels next to the image,
    doubled with each halving of the size up to max_width. mixing: the share of images in training with two
    latents; z is then [N, 2·z_dim + 1], see `Draws.mixed`.

    In training, the noise of an image is a function of its z (gan/noise.py), so that it is drawn afresh with
    z in every world alike. In eval mode all images have the same noise and are functions of w alone. In
    training, forward sets `latent` [N, layers, z_dim], all w. Raises UserError for a size it does not have.
    """

    channels_last = True  # see images.py

    def __init__(
        self,
        *,
        z_dim: int,
        size: int,
        channels: int,
        num_classes: int = 0,
        width: int = 64,
        max_width: int = 512,
        mapping: int = 8,
        mixing: float = 0.0,
        checkpoint: bool = False,
        activation: Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.z_dim, self.style_mixing = z_dim, mixing
        start, inwards = start_and_widths("stylegan2", size, SIZES, width, max_width)
        outwards = inwards[::-1]
        blocks = [Synthesis(outwards[0], outwards[0], channels, z_dim, start, 0, activation)]
        for number, (inputs, outputs) in enumerate(pairwise(outwards), start=1):
            blocks.append(Synthesis(inputs, outputs, channels, z_dim, start << number, number, activation))
        self.blocks = nn.Sequential(Mapping(z_dim, num_classes, mapping, activation), *blocks)
        self.layers = 2 * len(blocks)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        w = self._mixed(z, c) if z.shape[1] > self.z_dim else self._same(self.mapping(z, c))
        if not self.training:
            return self._synthesise(w, None)
        self.latent = w
        return self._synthesise(w, keys_of(z))

    def mapping(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """z [N, z_dim] and labels → w [N, z_dim]."""
        w: Tensor = self.blocks[0](z, c)
        return w

    def synthesis(self, w: Tensor) -> Tensor:
        """w [N, z_dim] → images, with the noise of eval mode."""
        return self._synthesise(self._same(w), None)

    def _synthesise(self, w: Tensor, keys: Tensor | None) -> Tensor:
        """w [N, layers, z_dim] → images. keys: of the images' noise; None: the same noise for all."""
        x: Tensor | None = None
        image: Any = None
        for number, block in enumerate(list(self.blocks)[1:]):
            # An RGB layer takes its scales from the w of the next block's first convolution.
            first = max(2 * number - 1, 0)
            x, image = run(block, x, image, w[:, first : 2 * number + 2], keys, checkpoint=self.checkpoint)
        images: Tensor = image
        return images

    def _same(self, w: Tensor) -> Tensor:
        return w[:, None].expand(-1, self.layers, -1)

    def _mixed(self, z: Tensor, c: Tensor | None) -> Tensor:
        """Style mixing (Karras et al. 2019, section 3.1): of layers from the crossover on, w is that of the
        second z."""
        first, second, crossover = torch.split(z, [self.z_dim, self.z_dim, 1], dim=1)
        labels = None if c is None else torch.cat([c, c])
        w, other = self.mapping(torch.cat([first, second]), labels).chunk(2)
        layer = torch.arange(self.layers, device=z.device)
        others = layer >= 1 + (crossover * (self.layers - 1)).floor()
        return torch.where(others[:, :, None], other[:, None], w[:, None])


class Discriminator(nn.Module):
    """D: images float [N,C,H,W] and labels c int64 [N] (None if num_classes is 0) → logits [N].

    A conditional D has a logit for each class, and says that of the image's (Mescheder et al. 2018, as the
    authors' code). Raises UserError for a size it does not have.
    """

    channels_last = True  # see images.py

    def __init__(
        self,
        *,
        size: int,
        channels: int,
        num_classes: int = 0,
        width: int = 64,
        max_width: int = 512,
        checkpoint: bool = False,
        activation: Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        end, inwards = start_and_widths("stylegan2", size, SIZES, width, max_width)
        blocks = [
            Residual(inputs, outputs, activation, image=channels if number == 0 else None)
            for number, (inputs, outputs) in enumerate(pairwise(inwards))
        ]
        self.blocks = nn.Sequential(*blocks, Head(inwards[-1], end, activation))
        self.to_logit = EqualisedLinear(inwards[-1], max(num_classes, 1))
        self.conditional = num_classes > 0

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        logits: Tensor = self.to_logit(run_all(self.blocks, x, checkpoint=self.checkpoint))
        if self.conditional:
            assert c is not None
            logits = logits.gather(1, c[:, None])
        return logits.squeeze(1)


class Mapping(nn.Module):
    """z [N, z_dim] and labels → w [N, z_dim], by layers that learn at a hundredth of the pace."""

    def __init__(self, z_dim: int, num_classes: int, layers: int, activation: Activation) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None
        inputs = [2 * z_dim if num_classes else z_dim, *[z_dim] * (layers - 1)]
        self.layers = nn.Sequential(*(EqualisedLinear(n, z_dim, multiplier=_LEARNS) for n in inputs))
        self.activation = _Activation(activation)

    def forward(self, z: Tensor, c: Tensor | None) -> Tensor:
        x = F.rms_norm(z, z.shape[1:], eps=_TINY)
        if self.embed is not None:
            label = self.embed(c)
            x = torch.cat([x, F.rms_norm(label, label.shape[1:], eps=_TINY)], dim=1)
        for layer in self.layers:
            x = self.activation(layer(x))
        return x


class Synthesis(nn.Module):
    """One resolution of G: features [N, a, H/2, W/2], the image so far and w → features [N, b, H, W] and the
    image, enlarged and added to. The first one (number 0) has learnt features of its own, and no image."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        channels: int,
        w_dim: int,
        size: int,
        number: int,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.start = None if number else nn.Parameter(torch.empty(outputs, size, size))
        if self.start is not None:
            nn.init.normal_(self.start)
        last = Styled(outputs, outputs, w_dim, size, 2 * number, activation)
        enlarging = [Styled(inputs, outputs, w_dim, size, 2 * number - 1, activation)] if number else []
        self.convs = nn.ModuleList([*enlarging, last])
        self.to_image = ModulatedConv2d(outputs, channels, 1, w_dim, demodulate=False)
        self.bias = nn.Parameter(torch.empty(channels))
        nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor | None, image: Tensor | None, w: Tensor, keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        features: Any = x if self.start is None else self.start.expand(w.shape[0], -1, -1, -1)
        for number, conv in enumerate(self.convs):
            features = conv(features, w[:, number], keys)
        added = self.to_image(features, w[:, -1])
        added = added + _per_channel(self.bias, added)
        return features, added if image is None else enlarge(image) + added


class Styled(nn.Module):
    """A modulated 3×3 convolution, noise, bias and activation. layer: odd if it doubles the size."""

    def __init__(
        self, inputs: int, outputs: int, w_dim: int, size: int, layer: int, activation: Activation
    ) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(inputs, outputs, 3, w_dim, up=layer % 2 == 1)
        self.noise = nn.Parameter(torch.empty(1))  # how strong it is
        self.bias = nn.Parameter(torch.empty(outputs))
        self.activation = _Activation(activation)
        self.size, self.layer = size, layer
        nn.init.zeros_(self.noise)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, w: Tensor, keys: Tensor | None) -> Tensor:
        x = self.conv(x, w)
        if keys is None:
            keys = torch.zeros(1, dtype=torch.int64, device=x.device)
        noise = self.noise * white_noise(keys, self.layer, self.size)
        activated: Tensor = self.activation(x + noise.to(x.dtype) + _per_channel(self.bias, x))
        return activated


class Residual(nn.Module):
    """One resolution of D: (branch(x) + 1×1(x))/√2, at half the size: [N, a, H, W] → [N, b, H/2, W/2].

    image: its channels, for the block that sees it.
    """

    def __init__(self, inputs: int, outputs: int, activation: Activation, image: int | None) -> None:
        super().__init__()
        self.from_image = None if image is None else EqualisedConv2d(image, inputs, 1)
        self.conv1 = EqualisedConv2d(inputs, inputs, 3)
        self.conv2 = EqualisedConv2d(inputs, outputs, 3, down=True)
        self.match = EqualisedConv2d(inputs, outputs, 1, bias=False)
        self.activation = _Activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.from_image is not None:
            x = self.activation(self.from_image(x))
        branch = self.activation(self.conv2(self.activation(self.conv1(x))))
        out: Tensor = (branch + self.match(shrink(x))) * math.sqrt(0.5)
        return out


class Head(nn.Module):
    """The end of D: [N, C, H, W] → [N, C]."""

    def __init__(self, channels: int, size: int, activation: Activation) -> None:
        super().__init__()
        self.conv = EqualisedConv2d(channels, channels, 3)
        self.linear = EqualisedLinear(channels * size**2, channels)
        self.activation = _Activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.activation(self.linear(self.activation(self.conv(x)).flatten(1)))
        return features


class _Activation(nn.Module):
    """√2 · φ(x), which keeps the mean square of normal inputs if φ is a ReLU, nearly if it is leaky."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.function = activation_layer(activation)

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.function(x)
        return activated * math.sqrt(2)


def _per_channel(bias: Tensor, x: Tensor) -> Tensor:
    return bias.to(x.dtype)[:, None, None]
