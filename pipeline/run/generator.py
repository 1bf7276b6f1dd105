"""A trained G with what using it takes, for Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import Config, UserError
from pipeline.errors import expanded
from pipeline.run.checkpoint import Wanted
from pipeline.run.export import load_exported, load_generator
from pipeline.run.exported import FILE
from pipeline.run.hub import fetch, is_repository
from pipeline.run.sampling import Sampler


class Generator(nn.Module):
    """The moving average of a trained G, in eval mode; its weights need no gradients.

    Attributes:
        network: G itself, whose images may go beyond [-1, 1]; of family `config.G.kind`.
        config: the settings of the run.
        z_dim: length of a latent.
        classes: their names, in the order of their numbers; () for an unconditional G.
        label_frequencies: how often each class occurred in training; None for an unconditional G.
        cur_nimg: real images that D was shown in training, counting repeats.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        label_frequencies: Sequence[float] | None,
        classes: Sequence[str],
        cur_nimg: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.config, self.z_dim, self.cur_nimg = config, config.G.z_dim, cur_nimg
        self.label_frequencies = None if label_frequencies is None else tuple(label_frequencies)
        self.classes = tuple(classes)
        self.requires_grad_(False).eval()

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Images float32 [N, C, H, W] in [-1, 1], black to white, of z ~ N(0, 1), float32 [N, z_dim].

        c: classes, int64 [N], of a conditional G. A G of latents (data.latents) gives latents, of any size.
        Raises ValueError without c, or with c for an unconditional G.
        """
        if (c is None) != (self.label_frequencies is None):
            has = f"has {len(self.classes)} classes" if c is None else "is unconditional"
            raise ValueError(f"This G {has}: call it as {'G(z, c), c int64 [N]' if c is None else 'G(z)'}.")
        made: Tensor = self.network(z, c)
        return made if self.config.data.latents else made.clamp(-1, 1)

    def sampler(self) -> Sampler:
        """Images by seed, on the device that G is on. Raises UserError if data.decoder cannot be used."""
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        return Sampler(self.network, self.config, self.label_frequencies, self.classes, device)


def load(source: str | Path, checkpoint: Wanted = "newest") -> Generator:
    """The Generator of a run, an export or a repository on the Hugging Face Hub, on the CPU.

    checkpoint: of a run: see `load_run`. Raises UserError as `load_generator`, `load_exported` and `fetch`.
    """
    folder = expanded(source)
    on_the_hub = isinstance(source, str) and is_repository(source)  # a Path names a folder
    if not on_the_hub and not (folder / FILE).is_file():
        network, config, state = load_generator(folder, checkpoint)
        return Generator(network, config, state.label_frequencies, state.classes, state.cur_nimg)
    if checkpoint != "newest":
        raise UserError(f"{source} is an export, which holds one checkpoint: leave out checkpoint.")
    network, config, facts = load_exported(_fetched(str(source)) if on_the_hub else folder)
    return Generator(network, config, facts.label_frequencies, facts.classes, facts.cur_nimg)


def _fetched(repository: str) -> Path:
    """`fetch`, whose errors say first that there is no such folder: runs/photos may be a run, too, if the
    current folder is the wrong one."""
    try:
        return fetch(repository)
    except UserError as error:
        raise UserError(f"There is no folder {repository} here; as a repository: {error}") from None
