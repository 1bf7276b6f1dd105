"""Every setting, as frozen dataclasses: defaults < YAML file < `key=value` on the command line.

A config file holds only what differs from the defaults below. The resolved config is written to
`runs/<name>/config.yaml`; loading it reproduces the run. The number of processes, the strategy and the
precision are not settings: they are read from the launcher, so the two cannot disagree.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.config_layers import expand_shorthands, explain, read_file, read_override
from pipeline.credentials import reason, redacted
from pipeline.errors import UserError as UserError  # part of this module

_STRICT = ConfigDict(extra="forbid")


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Signal = Literal["USR1", "USR2", "HUP", "CONT"]
Norm = Literal["batch", "sync_batch", "group", "instance", "none"]


def _plain_name(name: str | None) -> str | None:
    if name is not None and (not name.strip() or name.startswith(".") or Path(name).name != name):
        raise ValueError("must be a plain folder name, without '/' and not starting with '.'")
    if name is not None and not name.isprintable():
        raise ValueError("has characters that cannot be printed, or are not in this shell's locale")
    return name


def _place(text: str) -> str:
    """A local path with `~` and `$VARIABLE` expanded; a URL unchanged."""
    if "://" in text:
        plain = text if "@" in text else text.replace(" ", "-")  # S3 keys may contain blanks, logins may not
        if not re.fullmatch(r"\w+://((?!://)[^\s\x00-\x1f])+", plain):
            raise ValueError("is neither a path nor one URL")
        return text
    path = os.path.expandvars(text)
    if unset := re.search(r"\$(\w+|\{[^}]*\})", path):
        raise ValueError(f"the variable {unset[0]} is not set")
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise ValueError("there is no such home folder; write the path out") from None


Place = Annotated[str, AfterValidator(_place)]


@dataclass(frozen=True, config=_STRICT)
class Run:
    """What a run is called, how long it lasts and how often it reports. Every kimg may be fractional."""

    name: Annotated[str | None, AfterValidator(_plain_name)] = None  # None: the config file's stem
    out: Place = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    total_kimg: Positive = 1000.0  # thousands of real images shown to D
    tick_kimg: Positive = 4.0  # a line in metrics.jsonl and a point in every chart
    snapshot_kimg: Positive = 50.0  # a grid of generated images
    checkpoint_kimg: Positive = 50.0
    eval_kimg: Positive = 100.0  # scores on held-out images
    keep: Count = 2  # newest checkpoints kept, and the one with the best score
    max_failed_saves: Annotated[int, Field(ge=0)] = 3  # in a row before the run ends
    max_skipped: Annotated[int, Field(ge=0)] = 10  # non-finite updates of a player, in a tick or in a row
    stop_signal: Signal = "USR1"  # save and stop, as on SIGTERM and Ctrl-C
    grace: Positive = 90.0  # seconds from a stop signal to all processes saved and gone
    resume: bool = True  # False: start over under a new name, never over old files
    new_data: bool = False  # resume with other shards than the run was trained on
    timeout_s: Positive = 600.0  # a rank without a sign of life for this long ends the job


@dataclass(frozen=True, config=_STRICT)
class Remote:
    """Remote shards, cached whole on the local disk and shared by all ranks and runs."""

    folder: str | None = None  # on the node's own disk; None: shards/ in $SHARDGAN_CACHE or ~/.cache/shardgan
    gb: Positive = 50.0  # size limit; the least recently read shards are removed first
    stall_s: Positive = 30.0  # a transfer without progress for this long is restarted
    timeout_s: Annotated[float, Field(gt=0, le=500)] = 300.0  # a shard missing for this long ends the run


@dataclass(frozen=True, config=_STRICT)
class Data:
    """Which images, at what size, and which of them are held out."""

    train: Place | None = None  # a folder of tar shards, a URL, a glob, or a brace list {000000..000099}
    size: Count = 32  # pixels, height = width
    channels: Literal[1, 3] = 3
    conditional: bool = False  # train on the shards' .cls labels
    batch_size: Count = 64  # global, per D update; divided over ranks and rounds
    batch_gpu: Count | None = None  # at most this many images at once on a device; rounds follow
    workers: Annotated[int, Field(ge=0)] = 1  # decoding processes per rank; 0: in the training process
    window: Count = 16  # shards shuffled together; more mixes better, with more open files
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the samples held out, if folds is not set
    xflip: bool = False  # mirror half of the images, others in each epoch
    remote: Remote = Remote()
    stages: tuple[str, ...] = ()  # your own webdataset stages, each package.module:name, before decoding
    cache: Literal["none", "ram"] = "none"  # ram: decode each image once and keep it in memory, if all fit
    max_bad: Annotated[int, Field(ge=0)] = 10  # damaged images that are replaced by others; more end the run
    folds: Annotated[int, Field(ge=2)] | None = None  # cross-validation: hold out one of this many parts …
    fold: Annotated[int, Field(ge=0)] = 0  # … this one


@dataclass(frozen=True, config=_STRICT)
class Generator:
    """G: z (and a label) → image."""

    kind: str = "dcgan"  # or resnet, or package.module:Class
    z_dim: Count = 128
    width: Count = 64  # channels next to the image; doubled with each layer further in
    depth: Count = 1  # resnet: residual blocks per resolution
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    spectral_norm: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # keyword arguments of a Class


@dataclass(frozen=True, config=_STRICT)
class Discriminator:
    """D: image (and a label) → logit."""

    kind: str = "dcgan"
    width: Count = 64
    depth: Count = 1
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    spectral_norm: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class Loss:
    """The adversarial loss. `minimax` is the article's, `nonsaturating` Goodfellow's practical form."""

    kind: Literal["minimax", "nonsaturating", "hinge", "least_squares"] = "nonsaturating"
    D_steps: Count = 1  # D updates per G update, each on fresh reals and latents


@dataclass(frozen=True, config=_STRICT)
class WeightPenalty:
    """λ of λ‖W‖² (l2) and of λ‖W‖₁ (l1): plain sums, neither averaged nor halved."""

    l2: NonNegative = 0.0
    l1: NonNegative = 0.0


@dataclass(frozen=True, config=_STRICT)
class R1:
    """(γ/2) E‖∇D(x)‖² on real images (Mescheder et al. 2018, eq. 9), every `interval` D updates."""

    gamma: NonNegative = 0.0
    interval: Count = 16  # lazy: applied every `interval` updates, times `interval` (Karras et al. 2020)


@dataclass(frozen=True, config=_STRICT)
class Penalty:
    """Weight penalties of both players. The shorthands `penalty.l2` and `penalty.l1` set both at once."""

    on: Literal["weights", "all"] = "weights"  # kernels of convolutions and linear layers, or everything
    G: WeightPenalty = WeightPenalty()
    D: WeightPenalty = WeightPenalty()
    r1: R1 = R1()


@dataclass(frozen=True, config=_STRICT)
class Optimizer:
    """One player's optimizer."""

    kind: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive = 2e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.999)
    eps: Positive = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # sgd
    decoupled_decay: NonNegative = 0.0  # adamw: Loshchilov & Hutter's, which is not the L2 penalty
    clip: Positive | None = None  # largest gradient norm, weight penalties included


@dataclass(frozen=True, config=_STRICT)
class Optimizers:
    """One optimizer per player."""

    G: Optimizer = Optimizer()
    D: Optimizer = Optimizer()


@dataclass(frozen=True, config=_STRICT)
class Ema:
    """G_ema, the moving average of G that is sampled, scored and exported."""

    kimg: NonNegative = 10.0  # half-life; 0: G itself
    rampup: Annotated[float, Field(ge=0, le=1)] = 0.05  # at most this share of cur_nimg; 0: no limit


@dataclass(frozen=True, config=_STRICT)
class Score:
    """What is measured, on generated against held-out images, with which features, on how many images."""

    metrics: tuple[Literal["kid", "fd", "pr", "dc", "nn"], ...] = ("kid",)  # pipeline/run/scores.py
    features: str = "efflite0"  # or inception:PATH, or package.module:Class
    images: Annotated[int, Field(ge=2)] = 1000  # generated and real alike; fewer if fewer are held out
    train_images: Annotated[int, Field(ge=0)] = 0  # compared with too; 0: only for nn, as many as `images`


@dataclass(frozen=True, config=_STRICT)
class Track:
    """Weights & Biases, online or offline. Its WANDB_* variables apply where nothing is set here."""

    wandb: bool = True
    project: str | None = None  # None: WANDB_PROJECT, or else shardgan
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, config=_STRICT)
class Config:
    """All settings of a run."""

    run: Run = Run()
    data: Data = Data()
    G: Generator = Generator()
    D: Discriminator = Discriminator()
    loss: Loss = Loss()
    penalty: Penalty = Penalty()
    optim: Optimizers = Optimizers()
    ema: Ema = Ema()
    score: Score = Score()
    track: Track = Track()

    @property
    def images_per_update(self) -> int:
        """Real images shown to D in one alternating update: what cur_nimg advances by."""
        return self.data.batch_size * self.loss.D_steps


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Defaults < the YAML file (None: none) < overrides of the form `section.key=value`.

    Raises UserError listing every problem at once, each with its path.
    """
    layers = [] if path is None else [read_file(Path(path), Config)]
    layers += [read_override(text, Config) for text in overrides]
    source = str(path) if path is not None else "the given settings"
    try:
        merged = OmegaConf.merge(*(OmegaConf.create(expand_shorthands(layer)) for layer in layers))
        values = OmegaConf.to_container(merged, resolve=True)
        config = TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise UserError("\n".join([f"{source} is not a valid config:", *explain(error, Config())])) from None
    except OmegaConfBaseException as error:
        given = [layer.get("data") for layer in layers] if error.full_key == "data.train" else ()
        raise UserError(
            f"{source}: {error.full_key or 'a value'} cannot be read: {reason(error, str(given))}"
        ) from None
    if config.run.name is None:
        name = Path(path).stem if path is not None else "run"
        try:
            run = dataclasses.replace(config.run, name=name)
        except ValidationError:
            raise UserError(f"{path}: no run can be called {name!r}. Set run.name.") from None
        config = dataclasses.replace(config, run=run)
    _check(config)
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML; loading it gives the same config, less the credentials in URLs."""
    values: dict[str, Any] = TypeAdapter(Config).dump_python(config, mode="json")
    if config.data.train is not None:
        values["data"]["train"] = redacted(config.data.train)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _check(config: Config) -> None:
    """Refuse settings that are valid alone but not together."""
    problems = []
    if config.data.train is None:
        problems.append(
            "data.train: where are the images? Give a folder of shards (`shardgan prepare` makes one)."
        )
    elif "://" in config.data.train and config.data.remote.timeout_s >= config.run.timeout_s:
        problems.append(
            "data.remote.timeout_s must be less than run.timeout_s, or other ranks give up before the "
            "waiting one can name its shard"
        )
    if config.data.folds is not None and config.data.fold >= config.data.folds:
        problems.append(f"data.fold: {config.data.fold} is not one of the folds 0 to {config.data.folds - 1}")
    for name in ("G", "D"):
        optimizer: Optimizer = getattr(config.optim, name)
        penalty: WeightPenalty = getattr(config.penalty, name)
        if optimizer.decoupled_decay and optimizer.kind != "adamw":
            problems.append(f"optim.{name}.decoupled_decay: only adamw has it, not {optimizer.kind}")
        if optimizer.decoupled_decay and (penalty.l2 or penalty.l1):
            problems.append(
                f"optim.{name}.decoupled_decay together with penalty.{name}: two different regularisers of "
                "the same weights (decoupled decay is not an L2 penalty). Set one of them to 0."
            )
        if optimizer.momentum and optimizer.kind != "sgd":
            problems.append(f"optim.{name}.momentum: only sgd has it; for {optimizer.kind} set betas")
    if problems:
        raise UserError("\n".join(["The settings do not fit together:", *(f"  {p}" for p in problems)]))
