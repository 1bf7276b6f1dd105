"""Whole networks from a checkpoint of a run, in one process, whatever world and strategy wrote it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipeline.config import Config, UserError, as_yaml, dump, load
from pipeline.credentials import all_redacted, public, redacted
from pipeline.durable import save_tensors, whole, write
from pipeline.errors import readable
from pipeline.gan.networks import build_D, build_G
from pipeline.parallel.batch_norm import pooled
from pipeline.parallel.buffers import fill_buffers
from pipeline.run import programs
from pipeline.run.card import card
from pipeline.run.checkpoint import Pieces, Wanted, chosen, find, read_buffers, read_state
from pipeline.run.exported import CARD, FILE, Exported, digest, facts_of, read, save
from pipeline.run.folder import begun
from pipeline.run.portable import write_portable
from pipeline.run.state import State
from pipeline.wording import did_you_mean, one_line, why

Network = Literal["G_ema", "G", "D"]
NETWORKS: tuple[Network, ...] = ("G_ema", "G", "D")


def load_run(run: Path, checkpoint: Wanted = "newest") -> tuple[Config, Path, State]:
    """A run folder's config, one checkpoint, and that checkpoint's state.

    checkpoint: "newest" (intact), "best" (by the run's own score), or a kimg. Raises UserError if it is not a
    run folder or does not keep this checkpoint.
    """
    if not (run / "config.yaml").is_file():
        if (trials := run / "trials").is_dir():
            raise UserError(f"{run} is a selection, not a run folder. Its trials are runs: {trials}.")
        if not run.exists():
            raise UserError(f"There is no {run}. Runs are in runs/<name>/.{did_you_mean(run)}")
        raise UserError(f"{run} is not a run folder: it has no config.yaml. Runs are in runs/<name>/.")
    if (run / FILE).is_file() and not (run / "checkpoints").exists():
        raise UserError(f"{run} is an export, not a run folder. In Python, shardgan.load reads it.")
    config, folder = begun(run), run / "checkpoints"
    while True:
        kept = find(folder)
        try:
            found = chosen(folder, checkpoint)
            return config, found, read_state(found)
        except FileNotFoundError as error:
            if find(folder) == kept:  # else training has just removed it: choose again
                raise UserError(f"{error.filename} is not there: the checkpoint is no whole one.") from None


def load_generator(run: Path, checkpoint: Wanted = "newest") -> tuple[nn.Module, Config, State]:
    """G_ema of a run's checkpoint, on the CPU, in eval mode, with pooled BatchNorm statistics.

    Raises UserError as `load_run` does, or if the checkpoint cannot be read.
    """
    networks, config, state = _load_networks(run, checkpoint, ["G_ema"])
    return networks["G_ema"], config, state


def _load_networks(
    run: Path, checkpoint: Wanted, names: Sequence[Network]
) -> tuple[dict[Network, nn.Module], Config, State]:
    """Networks of one checkpoint; of a newer one, if training removes that while it is read."""
    while True:
        config, found, state = load_run(run, checkpoint)
        try:
            return {name: load_network(name, config, found, state) for name in names}, config, state
        except OSError as error:
            if found.exists():
                raise UserError(f"{found} cannot be read: {error}. Try again.") from None


def load_exported(folder: Path) -> tuple[nn.Module, Config, Exported]:
    """G_ema of an export, on the CPU, in eval mode; its settings, and its facts.

    Raises UserError if `folder` is no export, or holds another G than its config.yaml describes.
    """
    facts, config = read(folder), load(folder / "config.yaml")
    G = build_G(config, facts.num_classes)
    try:
        G.load_state_dict(load_file(folder / "G_ema.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{folder}: G_ema.safetensors does not fit its config.yaml: {one_line(str(error))}"
        ) from None
    return G.requires_grad_(False).eval(), config, facts


class Written(NamedTuple):
    """What `export` has written, and what it could not or does not know, and why."""

    files: list[Path]
    remarks: list[str]


def export(
    run: Path, out: Path, checkpoint: Wanted = "newest", *, complete: bool = False, onnx: bool = False
) -> Written:
    """Write G_ema, G and D (whole, fp32, keys as in the module), the config and a model card to `out`.

    complete: also what others need to use it without ShardGAN, samples.png and G_ema.pt2; onnx: G_ema.onnx
    too. What cannot be written of a user's own network or decoder is left out, with a remark. Files of an
    earlier export there are replaced. Raises UserError as `load_run` does, if `out` holds anything else or
    cannot be written, or without the packages of `onnx`.
    """
    networks, config, state = _load_networks(run, checkpoint, NETWORKS)
    if onnx:
        programs.onnx_runtime()  # refused before anything is written
    _refuse_taken(out)
    if complete:  # someone asked for it
        _refuse_loss(out, config)
    facts, files, remarks = facts_of(run, config, state), list[str](), list[str]()
    try:
        _begin(out)
        for name, network in networks.items():
            tensors = {key: t.clone().contiguous() for key, t in network.state_dict().items()}
            files.append(f"{name}.safetensors")
            with whole(out / files[-1]) as partial:
                save_tensors(tensors, partial, {"format": "pt", "cur_nimg": str(state.cur_nimg)})
        if facts.training_images is None:
            remarks.append(_without_data(config))
        if complete:
            made, unwritten = write_portable(networks["G_ema"], config, state, out, onnx)
            files += made
            remarks += unwritten
        facts = replace(facts, files=(*files, "config.yaml", CARD, FILE))
        write(out / "config.yaml", _public_settings(config))
        write(out / CARD, card(config, facts))
        save(out, replace(facts, card=digest(out / CARD)))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} could not be written: {why(error)}") from None
    return Written([out / name for name in facts.files], remarks)


def _without_data(config: Config) -> str:
    """Why the card lacks what the index of the run's data says."""
    return (
        f"The run's data are not at {redacted(str(config.data.train))}, seen from here, or are others now, "
        "so the card lacks their number and licence; export again from where they are."
    )


def _refuse_taken(out: Path) -> None:
    """Raise UserError if `out` holds what is not ours: README.md and config.yaml might be someone's own.

    Hidden files do not count, as a repository that was just cloned has some.
    """
    own = "Give the export a folder of its own, by another --out."
    if (out / "checkpoints").exists():
        raise UserError(f"{out} is a run folder. {own}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. {own}")
    if (out / FILE).exists():
        try:
            read(out)
        except UserError:
            raise UserError(f"{out / FILE} was not written by an export of ShardGAN. {own}") from None
    elif (out / f"{NETWORKS[0]}.safetensors").exists():  # alone: perhaps an export that was killed
        if not _is_our_card(out / CARD):
            raise UserError(f"{out / CARD} is not the card of an export of ShardGAN. {own}")
    elif out.is_dir():
        names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if names:
            raise UserError(f"{out} holds files that are no export, such as {names[0]}. {own}")


def _refuse_loss(out: Path, config: Config) -> None:
    """Raise UserError if `out` is an export of another run, or its model card was edited since."""
    if not (out / FILE).exists():
        return
    earlier = read(out)
    if earlier.name != config.run.name:
        raise UserError(f"{out} is an export of another run, {earlier.name}. Give another --out.")
    with readable(str(out / CARD)):
        now = digest(out / CARD)
    if earlier.card and now not in ("", earlier.card):
        raise UserError(f"{out / CARD} has been edited. Move it away, or give another --out.")


def _is_our_card(card: Path) -> bool:
    """Whether a model card is one of an export, by its first lines, or is not there."""
    if not card.exists():
        return True
    with readable(str(card)):
        front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    return bool(front and re.search(r"^library_name: *shardgan *$", front[1], re.MULTILINE))


def _begin(out: Path) -> None:
    """Remove what an earlier export has left: export.json first, as the rest is no longer one.

    G_ema goes last: by it the rest is still known as ours if this is killed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with suppress(UserError):
        for name in (FILE, *reversed(read(out).files)):
            (out / name).unlink(missing_ok=True)
    (out / FILE).unlink(missing_ok=True)


def _public_settings(config: Config) -> str:
    """config.yaml without the folders of this machine."""
    values = all_redacted(yaml.safe_load(dump(config)), by=public)
    return as_yaml(values)


def load_network(name: Network, config: Config, found: Path, state: State) -> nn.Module:
    """A network of the checkpoint `found`, whole on the CPU, in eval mode, BatchNorm's statistics pooled.

    Raises FileNotFoundError if training has removed the checkpoint meanwhile, UserError if it is of another
    network.
    """
    try:
        return _filled(name, config, found, state)
    finally:
        if not found.exists():  # what was read of it may not be all
            raise FileNotFoundError(f"{found} was removed while it was read")


def _filled(name: Network, config: Config, found: Path, state: State) -> nn.Module:
    player, kind = name[0], "ema" if name == "G_ema" else "weights"
    network = (build_D if player == "D" else build_G)(config, state.num_classes)
    pieces = Pieces(found, player)
    if not {name for name, p in network.named_parameters() if p.requires_grad} <= pieces.names():
        raise UserError(f"{found} holds another {player} than the run's config.yaml describes.")
    pieces.fill(kind, network)
    pieces.fill("constant", network)
    fill_buffers(network, pooled(network, read_buffers(found, player)))
    return network.requires_grad_(False).eval()
