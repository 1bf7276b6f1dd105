"""Every setting and its default, as frozen dataclasses. `pipeline/config.py` reads and checks them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from pipeline.setting_types import (
    BelowOne,
    Count,
    Kimg,
    NonNegative,
    Norm,
    OneIn,
    PenaltyOn,
    Place,
    Positive,
    Schedulable,
    ScheduledBelowOne,
    ScheduledNonNegative,
    ScheduledPositive,
    ScheduledShare,
    Signal,
    none_or_several,
    plain_name,
)

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Run:
    """What a run is called, how long it lasts and how often it reports. Every kimg may be fractional."""

    name: Annotated[str | None, AfterValidator(plain_name)] = None  # None: the config file's stem
    out: Place = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    total_kimg: Kimg = 1000.0  # thousands of real images shown to D
    burn_in_kimg: Annotated[NonNegative, Field(le=1e12)] = 0.0  # length of the cosine of every [from, to]
    tick_kimg: Kimg = 4.0  # a line in metrics.jsonl and a point in every chart
    snapshot_kimg: Kimg = 50.0  # a grid of generated images
    checkpoint_kimg: Kimg = 50.0
    eval_kimg: Kimg = 100.0  # scores on held-out images
    keep: Count = 2  # newest checkpoints kept, and the one with the best score
    max_failed_saves: Annotated[int, Field(ge=0)] = 3  # in a row before the run ends
    max_skipped: Annotated[int, Field(ge=0)] = 10  # non-finite updates of a player, in a tick or in a row
    stop_signal: Signal = "USR1"  # save and stop, as on SIGTERM and Ctrl-C
    grace: Positive = 90.0  # seconds from a stop signal to all processes saved and gone
    resume: bool = True  # False: start over under a new name, never over old files
    new_data: bool = False  # resume with other shards than the run was trained on
    new_settings: bool = False  # resume with another λ, lr, betas or γ (whatever may be [from, to])
    init: Place | None = None  # begin with the weights of another run, an export or .safetensors files
    init_optimizer: bool = False  # … and with that run's moments
    timeout_s: Annotated[float, Field(gt=0, le=1e9)] = (
        600.0  # a rank without a sign of life for this long ends the job
    )


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
    channels: Count = 3  # 1 (grey) or 3; of latents any number
    decoder: str | None = None  # package.module:Class, makes images of latents; set: the shards hold those
    conditional: bool = False  # train on the shards' .cls labels
    batch_size: Count = 64  # global, per D update; divided over ranks and rounds
    batch_gpu: Count | None = None  # at most this many images at once on a device; rounds follow
    workers: Annotated[int, Field(ge=0)] = 1  # decoding processes per rank; 0: in the training process
    window: Count = 16  # shards shuffled together; more mixes better, with more open files
    holdout: BelowOne = 0.1  # share of the samples held out, if folds is not set
    xflip: bool = False  # mirror half of the images, others in each epoch
    remote: Remote = Remote()
    stages: tuple[str, ...] = ()  # your own webdataset stages, each package.module:name, before decoding
    cache: Literal["none", "ram"] = "none"  # ram: decode each image once and keep it in memory, if all fit
    max_bad: Annotated[int, Field(ge=0)] = 10  # damaged images that are replaced by others; more end the run
    folds: Annotated[int, Field(ge=2)] | None = None  # cross-validation: hold out one of this many parts …
    fold: Annotated[int, Field(ge=0)] = 0  # … this one

    @property
    def latents(self) -> bool:
        """Whether the shards hold latents, .npy of floats [channels, size, size], rather than images."""
        return self.decoder is not None or self.channels not in (1, 3)


@dataclass(frozen=True, config=_STRICT)
class Generator:
    """G: z (and a label) → image."""

    kind: str = "dcgan"  # or resnet, r3gan, stylegan2, vit, or package.module:Class
    z_dim: Count = 128
    width: Count = 64  # channels next to the image, doubled with each layer further in; vit: of every token
    max_width: Count = 512  # r3gan, stylegan2: no layer is wider
    depth: Count = 1  # resnet, r3gan: residual blocks per resolution; vit: blocks
    blocks: Annotated[int, Field(ge=0)] = 0  # dcgan: R3GAN's residual blocks at its smallest resolution
    heads: Count | None = None  # vit: of attention; None: one per 64 channels
    patch: Count = 2  # vit: pixels along the side of the square that a token stands for
    outputs: Count = 4  # vit: depths at which an image is added to the output
    mapping: Count = 8  # stylegan2: layers of the mapping network
    mixing: Annotated[float, Field(ge=0, le=1)] = 0.0  # stylegan2: share of training images with two latents
    norm: Norm = "batch"  # over the images of a rank and round; sync_batch: of a round, on all ranks
    dropout: BelowOne = 0.0
    spectral_norm: bool = False
    checkpoint: bool = False  # compute activations again in the backward pass instead of keeping them
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # keyword arguments of a Class


@dataclass(frozen=True, config=_STRICT)
class Discriminator:
    """D: image (and a label) → logit."""

    kind: str = "dcgan"
    width: Count = 64
    max_width: Count = 512
    depth: Count = 1
    blocks: Annotated[int, Field(ge=0)] = 0
    heads: Count | None = None
    patch: Count = 2
    norm: Norm = "batch"
    dropout: BelowOne = 0.0
    spectral_norm: bool = False
    checkpoint: bool = False
    freeze: Annotated[int, Field(ge=0)] = 0  # so many blocks next to the image stay as they are
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class Loss:
    """The adversarial loss. `minimax` is the objective of Goodfellow et al. (2014), `nonsaturating` their
    practical form."""

    kind: Literal["minimax", "nonsaturating", "hinge", "least_squares", "relativistic", "wasserstein"] = (
        "nonsaturating"
    )
    D_steps: Count = 1  # D updates per G update, each on fresh reals and latents


@dataclass(frozen=True, config=_STRICT)
class WeightPenalty:
    """λ of λ‖W‖² (l2) and of λ‖W‖₁ (l1): plain sums, neither averaged nor halved."""

    l2: ScheduledNonNegative = 0.0
    l1: ScheduledNonNegative = 0.0
    on: PenaltyOn = "auto"  # W: kernels of layers, all parameters, or kernels times their layer's weight_gain


@dataclass(frozen=True, config=_STRICT)
class R1:
    """(γ/2) E‖∇D(x)‖² on real images (Mescheder et al. 2018, eq. 9), every `interval` D updates."""

    gamma: ScheduledNonNegative = 0.0
    interval: Count = 16  # lazy: applied every `interval` updates, times `interval` (Karras et al. 2020)
    sigma: NonNegative = 0.0  # 0: exact; else a finite difference over noise of this standard deviation
    sided: Literal[1, 2] = 2  # finite difference: from x to x + σε (1), or from x − σε to x + σε (2)
    fraction: OneIn = 1.0  # 1/k: on every k-th image of the batch


@dataclass(frozen=True, config=_STRICT)
class R2(R1):
    """(γ/2) E‖∇D(G(z))‖², R1 on generated images (Mescheder et al. 2018, eq. 10)."""

    interval: Count = 1


@dataclass(frozen=True, config=_STRICT)
class WganGp:
    """weight · E(‖∇D(x̂)‖ − 1)², x̂ between a real and a generated image (Gulrajani et al. 2017, eq. 3)."""

    weight: NonNegative = 0.0


@dataclass(frozen=True, config=_STRICT)
class PathLength:
    """weight · E(‖J‖ − a)², the path length of G's latent (Karras et al. 2020, StyleGAN2, section 3.2)."""

    weight: NonNegative = 0.0
    interval: Count = 4  # lazy: applied every `interval` G updates, times `interval`
    decay: BelowOne = 0.99  # the share of a, the moving mean of ‖J‖, that such an update keeps


@dataclass(frozen=True, config=_STRICT)
class Penalty:
    """Penalties. The shorthands `penalty.l2`, `penalty.l1` and `penalty.on` set both players' at once."""

    G: WeightPenalty = WeightPenalty()
    D: WeightPenalty = WeightPenalty()
    r1: R1 = R1()
    r2: R2 = R2()
    wgan_gp: WganGp = WganGp()
    path: PathLength = PathLength()


@dataclass(frozen=True, config=_STRICT)
class Augment:
    """Augmentation of every image that D sees, real or generated; never of samples and scores."""

    ops: tuple[Literal["flip", "shift", "scale", "rotate", "colour", "cutout"], ...] = ()
    p: ScheduledShare | None = None  # probability of each op; or
    target: BelowOne | None = None  # adjust p until the mean sign of D on real images (of pairs) is this
    speed_kimg: Positive = 500.0  # with target: how long p takes from 0 to 1


@dataclass(frozen=True, config=_STRICT)
class Optimizer:
    """One player's optimizer."""

    kind: Literal["adam", "adamw", "sgd"] = "adam"
    lr: ScheduledPositive = 2e-4
    betas: tuple[ScheduledBelowOne, ScheduledBelowOne] = (0.5, 0.999)
    eps: Positive = 1e-8
    momentum: BelowOne = 0.0  # sgd
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

    kimg: ScheduledNonNegative = 10.0  # half-life; 0: G itself; [from, to] and run.init have no rampup
    rampup: Annotated[float, Field(ge=0, le=1)] = 0.05  # at most this share of cur_nimg; 0: no limit


@dataclass(frozen=True, config=_STRICT)
class Score:
    """What is measured, on generated against held-out images, with which features, on how many images."""

    metrics: tuple[Literal["kid", "fd", "pr", "dc", "nn"], ...] = ("kid",)  # pipeline/run/scores.py
    features: str = "efflite0"  # or inception:PATH, or package.module:Class
    images: Annotated[int, Field(ge=2)] = 1000  # generated and real alike; fewer if fewer are held out
    # training images compared with too; 0: only for nn, as many as `images`
    train_images: Annotated[int, Field(ge=0), AfterValidator(none_or_several)] = 0


@dataclass(frozen=True, config=_STRICT)
class Track:
    """Weights & Biases, online or offline. Its WANDB_* variables apply where nothing is set here."""

    wandb: bool = True
    tensorboard: bool = False  # event files in the run folder; needs shardgan[tensorboard]
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
    augment: Augment = Augment()
    optim: Optimizers = Optimizers()
    ema: Ema = Ema()
    score: Score = Score()
    track: Track = Track()

    @property
    def images_per_update(self) -> int:
        """Real images shown to D in one alternating update: what cur_nimg advances by."""
        return self.data.batch_size * self.loss.D_steps

    @property
    def schedulable(self) -> dict[str, Schedulable | None]:
        """Dotted key → value of every setting that may be [from, to]."""
        values: dict[str, Schedulable | None] = {
            "penalty.r1.gamma": self.penalty.r1.gamma,
            "penalty.r2.gamma": self.penalty.r2.gamma,
            "augment.p": self.augment.p,
            "ema.kimg": self.ema.kimg,
        }
        for name in ("G", "D"):
            optimizer: Optimizer = getattr(self.optim, name)
            penalty: WeightPenalty = getattr(self.penalty, name)
            values |= {f"optim.{name}.lr": optimizer.lr, f"penalty.{name}.l2": penalty.l2}
            values |= {f"optim.{name}.betas[{i}]": beta for i, beta in enumerate(optimizer.betas)}
            values[f"penalty.{name}.l1"] = penalty.l1
        return values
