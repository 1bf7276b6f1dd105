"""Whole networks from a checkpoint of a run, in one process, whatever world and strategy wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import nn

from pipeline.config import Config, UserError, dump
from pipeline.credentials import redacted
from pipeline.durable import save_tensors, whole
from pipeline.gan.networks import build_D, build_G
from pipeline.parallel.batch_norm import pooled
from pipeline.run.checkpoint import Pieces, Wanted, chosen, read_buffers, read_state
from pipeline.run.folder import begun
from pipeline.run.state import State
from pipeline.wording import in_time

Network = Literal["G_ema", "G", "D"]
NETWORKS: tuple[Network, ...] = ("G_ema", "G", "D")


def load_run(run: Path, checkpoint: Wanted = "newest") -> tuple[Config, Path, State]:
    """A run folder's config, one checkpoint, and that checkpoint's state.

    checkpoint: "newest" (intact), "best" (by the run's own score), or a kimg. Raises UserError if it is not a
    run folder or does not keep this checkpoint.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml. Runs are in runs/<name>/.")
    found = chosen(run / "checkpoints", checkpoint)
    return begun(run), found, read_state(found)


def load_generator(run: Path, checkpoint: Wanted = "newest") -> tuple[nn.Module, Config, State]:
    """G_ema of a run's checkpoint, on the CPU, in eval mode, with pooled BatchNorm statistics.

    Raises UserError as `load_run` does, or if training has just deleted the checkpoint.
    """
    config, found, state = load_run(run, checkpoint)
    try:
        return load_network("G_ema", config, found, state), config, state
    except OSError as error:
        raise UserError(f"{found} is no longer there, or cannot be read: {error}. Try again.") from None


def export(run: Path, out: Path, checkpoint: Wanted = "newest") -> list[Path]:
    """Write G_ema, G and D (whole, fp32, keys as in the module), the config and a model card to `out`.

    Returns the files. Raises UserError as `load_run` does, or if `out` cannot be written.
    """
    config, found, state = load_run(run, checkpoint)
    networks = {name: load_network(name, config, found, state) for name in NETWORKS}
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, network in networks.items():
            tensors = {key: t.clone().contiguous() for key, t in network.state_dict().items()}
            files.append(out / f"{name}.safetensors")
            with whole(files[-1]) as partial:
                save_tensors(tensors, partial, {"format": "pt", "cur_nimg": str(state.cur_nimg)})
        (out / "config.yaml").write_text(dump(config), "utf-8")
        (out / "README.md").write_text(_model_card(config, state), "utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} could not be written: {error}") from None
    return [*files, out / "config.yaml", out / "README.md"]


def load_network(name: Network, config: Config, found: Path, state: State) -> nn.Module:
    """A network of the checkpoint `found`, whole on the CPU, in eval mode, BatchNorm's statistics pooled."""
    player, kind = name[0], "ema" if name == "G_ema" else "weights"
    network = (build_D if player == "D" else build_G)(config, state.num_classes)
    pieces = Pieces(found, player)
    if not {name for name, p in network.named_parameters() if p.requires_grad} <= pieces.names():
        raise UserError(f"{found} holds another {player} than the run's config.yaml describes.")
    pieces.fill(kind, network)
    pieces.fill("constant", network)
    buffers = dict(network.named_buffers())
    with torch.no_grad():
        for key, value in pooled(network, read_buffers(found, player)).items():
            buffers[key].copy_(value)
    return network.requires_grad_(False).eval()


def _model_card(config: Config, state: State) -> str:
    """A README for users of the files."""
    data, G, penalty = config.data, config.G, config.penalty
    shape = f"{data.channels}, {data.size}, {data.size}"
    colour = "latents" if data.latents else "grey" if data.channels == 1 else "RGB"
    label = ", and class labels c, int64 [N]" if state.num_classes else ""
    labels = f", torch.arange(16) % {state.num_classes}" if state.num_classes else ""
    classes = f"one of {state.num_classes} classes, " if state.num_classes else ""
    what, black_to_white, clamp = (
        "images",
        ", of which\n[-1, 1] is from black to white: clamp them",
        ".clamp(-1, 1)",
    )
    if data.latents:
        what, black_to_white, clamp = "latents", "", ""
    own = ", ".join(f"`{kind}`" for kind in dict.fromkeys((G.kind, config.D.kind)) if ":" in kind)
    needs = f"Its networks are not ShardGAN's own: {own} must be importable too.\n" if own else ""
    if data.decoder is not None:
        needs += f"What makes images of its latents, `{data.decoder}`, is not among the files.\n"
    return f"""# {config.run.name}

A generator G and a discriminator D of {data.size}x{data.size} images ({classes}{colour}),
trained by ShardGAN on the images in `{redacted(str(data.train))}`; D was shown {state.cur_nimg:,} of them,
counting repeats. Loss `{config.loss.kind}`; L2 penalties
λ_G = {in_time(penalty.G.l2)} on `{penalty.G.on}`, λ_D = {in_time(penalty.D.l2)} on `{penalty.D.on}`.

| file | what |
|---|---|
| `G_ema.safetensors` | the moving average of G: the one to sample from |
| `G.safetensors`, `D.safetensors` | the players as they ended |
| `config.yaml` | the resolved config; `shardgan train` reproduces the run from it |

All tensors are whole and float32, named as in the modules. G takes z ~ N(0, 1), float32
[N, {G.z_dim}]{label}, and gives {what}, float32 [N, {shape}]{black_to_white}.

To use it, install ShardGAN (`pip install .` in its source folder), which brings the modules `pipeline` and
`launch`, and run this in the folder of these files.
{needs}
```python
import torch
from safetensors.torch import load_file

from pipeline import config
from pipeline.gan.networks import build_G

G = build_G(config.load("config.yaml"), num_classes={state.num_classes})
G.load_state_dict(load_file("G_ema.safetensors"))
with torch.no_grad():
    {what} = G.eval()(torch.randn(16, {G.z_dim}){labels}){clamp}
```
"""
