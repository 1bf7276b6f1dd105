"""run.init: weights of another run, of an export, or in safetensors files, that a new run begins with.

Networks are filled while they are whole, before a strategy wraps them; G_ema's averages and the moments,
which live on fragments, afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import Config, UserError
from pipeline.gan.frozen import frozen_names
from pipeline.gan.networks import build_D, build_G
from pipeline.players import Gan
from pipeline.run import checkpoint
from pipeline.run.export import NETWORKS, Network, load_network, load_run
from pipeline.run.state import State
from pipeline.wording import counted, in_kimg

# A network is read from the first of these that the source has.
_INSTEAD: Mapping[str, tuple[Network, ...]] = {
    "G": ("G", "G_ema"),
    "G_ema": ("G_ema", "G"),
    "D": ("D",),
}
_NAMED = 12  # tensors in a message


@dataclass(frozen=True)
class Source:
    """What run.init names: the newest intact checkpoint of a run, or files."""

    where: str  # as shown to people
    files: Mapping[str, Path]  # network → its file; of a run, none
    run: tuple[Config, Path, State] | None = None  # a run's config, its checkpoint and that one's state

    def was_split_otherwise(self, state: State) -> bool:
        """Whether it is a run on the data of `state` that other images were held out of, as far as known."""
        theirs = self.run[2] if self.run is not None else state
        return theirs.data == state.data and theirs.plan != state.plan

    def tensors(self, network: str) -> dict[str, Tensor]:
        """Parameters and buffers of "G", "G_ema" or "D", by name; {} if the source has no such network.

        G and G_ema stand in for each other. Raises UserError if they cannot be read.
        """
        for name in _INSTEAD[network]:
            if self.run is None and name not in self.files:
                continue
            try:
                return load_file(self.files[name]) if self.run is None else _of_run(name, *self.run)
            except (OSError, SafetensorError) as error:
                raise UserError(f"run.init: {self.where} cannot be read: {error}. Try again.") from None
        return {}


def open_source(init: str) -> Source:
    """The source that run.init names. Raises UserError if there is none."""
    path = Path(init)
    if (path / "checkpoints").is_dir():
        config, found, state = load_run(path)
        return Source(f"{path} at kimg {in_kimg(state.cur_nimg / 1000)}", {}, (config, found, state))
    files: dict[str, Path] = {name: path / f"{name}.safetensors" for name in NETWORKS}
    if path.stem in NETWORKS and path.suffix == ".safetensors":
        files = {path.stem: path}
    there = {name: file for name, file in files.items() if file.is_file()}
    if not there:
        names = [f"{name}.safetensors" for name in NETWORKS]
        raise UserError(
            f"run.init={init}: there is no run, no export and no file of these names: {', '.join(names)}."
        )
    return Source(str(path), there)


def check_init(config: Config, folder: Path, num_classes: int) -> Source | None:
    """What the run in `folder` is to start from; None without run.init, and once it has its own checkpoint.

    Raises UserError if it cannot be read, fits in nothing, or lacks the moments that are asked for.
    """
    if config.run.init is None or checkpoint.find(folder / "checkpoints"):
        return None
    source, weights = open_source(config.run.init), 0
    for player, build in (("G", build_G), ("D", build_D)):
        network = build(config, num_classes)
        fitting = _fitting(config, source, player, network).keys()
        weights += len(fitting & dict(network.named_parameters()).keys())
        if config.run.init_optimizer:
            trained = {name for name, p in network.named_parameters() if p.requires_grad}
            _check_moments(config, source, player, trained, trained & fitting)
    if not weights:
        raise UserError(
            f"run.init={config.run.init}: no weights there have the name and the shape of any of this G and "
            "D. Are kind, width and data.size the same?"
        )
    return source


def fill(config: Config, source: Source, player: str, network: nn.Module) -> str:
    """Copy into a whole network all that the source has of the same name and shape; says what it has not."""
    fitting, own = _fitting(config, source, player, network), _own(config, player, network)
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)
    text = f"{player} starts with {len(fitting)} of its {counted(len(own), 'tensor')} from {source.where}"
    rest = [name for name in own if name not in fitting]
    more = f" and {len(rest) - _NAMED} more" if len(rest) > _NAMED else ""
    return f"{text}; as new: {', '.join(rest[:_NAMED])}{more}" if rest else text


def finish(config: Config, source: Source, gan: Gan) -> None:
    """After `fill`: G_ema's averages, and the moments if the config asks for them."""
    tensors = source.tensors("G_ema")
    with torch.no_grad():
        for fragment, average in zip(gan.G.fragments, gan.G_ema.averages, strict=True):
            tensor = tensors.get(fragment.name)
            if tensor is not None and tensor.shape == fragment.shape:
                piece = tensor.reshape(-1)[fragment.start : fragment.start + average.numel()]
                average.copy_(piece.view(average.shape))
    if config.run.init_optimizer and source.run is not None:
        for engine in (gan.G, gan.D):
            checkpoint.load_moments(engine, checkpoint.Pieces(source.run[1], engine.player.name))


def _of_run(name: Network, config: Config, found: Path, state: State) -> dict[str, Tensor]:
    network = load_network(name, config, found, state)
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _own(config: Config, player: str, network: nn.Module) -> dict[str, Tensor]:
    """What run.init fills: buffers and parameters. Not those that the network's class does not train: a
    checkpoint has none of them, as the class makes them at every start."""
    frozen = frozen_names(network, config.D.freeze) if player == "D" else frozenset()
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad or name in frozen}
    return {**parameters, **dict(network.named_buffers())}


def _fitting(config: Config, source: Source, player: str, network: nn.Module) -> dict[str, Tensor]:
    """The source's tensors of the same name and shape."""
    there, own = source.tensors(player), _own(config, player, network)
    return {name: there[name] for name, t in own.items() if name in there and there[name].shape == t.shape}


def _check_moments(config: Config, source: Source, player: str, trained: set[str], fitting: set[str]) -> None:
    """Raise UserError unless the source has moments of all that trains. The others would begin at zero with
    the step count of the rest, and Adam's first steps be many times the learning rate."""
    start = "run.init_optimizer=true"
    if source.run is None:
        raise UserError(f"{start}: {source.where} holds no moments, only weights. Set run.init to a run.")
    theirs, found, _ = source.run
    before, now = (getattr(of.optim, player).kind for of in (theirs, config))
    if before != now:
        raise UserError(f"{start}: optim.{player}.kind is {now}, but {source.where} was trained by {before}.")
    if lacking := trained - (fitting & checkpoint.Pieces(found, player).names()):
        raise UserError(
            f"{start}: {source.where} has no moments of this {player}'s {', '.join(sorted(lacking)[:3])}. "
            f"Leave it out, or let {player} be as it was there."
        )
