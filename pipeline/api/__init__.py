"""ShardGAN from Python: `import shardgan`, in a script, a notebook or a thread.

Installed as `shardgan`: a name that is only ours, unlike `pipeline` and `launch`. It imports what it needs
when it is called, so `import shardgan` is quick; `pipeline` imports this file too, before any other.
"""

from __future__ import annotations

from . import shadows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from torch import Tensor

    from pipeline.data.prepare.labels import Classes
    from pipeline.data.prepare.pictures import Fit
    from pipeline.parallel.launched import Precision, Strategy
    from pipeline.run.checkpoint import Wanted
    from pipeline.run.generator import Generator

__all__ = ["evaluate", "load", "prepare", "sample", "train"]


def load(source: str | Path, checkpoint: Wanted = "newest") -> Generator:
    """A trained G, ready to use: `G(z)`, or `G(z, c)` if it is conditional.

    Args:
        source: a run folder, a folder that `shardgan export` wrote, or what `shardgan push` published on the
            Hugging Face Hub, USER/NAME or USER/NAME@REVISION as a str (a Path is a folder).
        checkpoint: of a run: "newest", "best" (by the run's own score), or a kimg.

    Returns G_ema as a torch.nn.Module on the CPU, in eval mode, its weights without gradients: z float32
    [N, G.z_dim] and, if it is conditional, c int64 [N] → images float32 [N, C, H, W] in [-1, 1], of
    data.channels and data.size; a G of latents returns latents, which have no bounds. Its class names are
    G.classes.

    Raises UserError (a ValueError) if there is no such run, export or checkpoint, and ImportError if a file
    of yours would be imported in place of one of ours.
    """
    shadows.refuse_import()
    from pipeline.run.generator import load

    return load(source, checkpoint)


def sample(
    G: Generator,
    seeds: Sequence[int],
    classes: Sequence[int | str] | int | str | None = None,
    truncation: float = 1.0,
) -> Tensor:
    """An image per seed, uint8 [N, C, H, W] on the CPU, made on the device that G is on.

    An image is a function of its seed, class and truncation alone; `shardgan sample --seeds` makes the same.

    Args:
        G: what `load` has returned, on any device. Of a G of latents, data.decoder makes the images.
        seeds: N whole numbers in [0, 2³²), one or more.
        classes: one for all, or one per seed, by number or name. Default: drawn by the seeds.
        truncation: ψ, less variety for better images below 1; for families with a latent w (stylegan2).

    Raises UserError (a ValueError) for a seed outside [0, 2³²), none, or a class or truncation that G does
    not have; TypeError for another module.
    """
    if not hasattr(G, "sampler"):
        raise TypeError(f"sample takes a G that shardgan.load has loaded, not {G!r:.60}")
    return G.sampler().sample(seeds, classes, truncation)


def train(
    config: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    procs: int = 1,
    strategy: Strategy | None = None,
    mixed_precision: Precision = "no",
) -> Path:
    """Train what a config describes, or on your own images, as `shardgan train` does, which explains what it
    chooses; the same call again resumes.

    Args:
        config: a YAML file, or the name of a published one, such as "fashion-mnist"; or a folder of images, a
            zip of one, a folder of shards, or a run to continue.
        settings: override the config, as in {"penalty.l2": 1e-3, "data.train": "data/photos"}: numbers,
            texts, lists, booleans and None.
        procs: processes (the command's default is one per GPU). One: this one, so `G.kind` may name a class
            of a notebook, "__main__:MyG". Several are started, and end with this one; their output is printed
            here.
        strategy: single, ddp, fsdp2, hsdp, zero1, zero2 or zero3. Default: ddp; for one process single.
        mixed_precision: no, bf16 or fp16.

    Returns the run folder. A finished run is left as it is.

    Raises UserError (a ValueError): for what you can fix its message says how; a training that fails after
    its start raises one too (RunError). A signal that asks to stop is raised again once the run is saved:
    KeyboardInterrupt after Ctrl-C, or "interrupt" in a notebook. ImportError as `load`.
    """
    shadows.refuse_import()
    from .training import train

    return train(config, settings or {}, procs, strategy, mixed_precision)


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    fit: Fit | None = None,
    background: str | None = None,
    channels: int | None = None,
    per_shard: int = 1000,
    classes: Classes = "top",
    dedupe: bool = False,
    workers: int | None = None,
) -> Path:
    """Make tar shards of images, with an index, as `shardgan prepare` does.

    Args:
        source: a folder of images, a zip of one, WebDataset shards, "fashion-mnist" or "cifar10".
        out: the folder to make; the same call again leaves it as it is.
        size: pixels of the square images. Default: as they are, all alike.
        fit: how an image of another shape gets to size: crop, pad or stretch. Default: as suits the source.
        background: the colour behind transparency and around padding: white, black or #rrggbb.
        channels: 1 (grey) or 3. Default: as each image is.
        per_shard: images in a shard.
        classes: "top" (folders at the top), "path" (whole paths) or "none".
        dedupe: leave copies out.
        workers: processes. Default: one per core.

    Returns `out`, `~` expanded. Raises UserError (a ValueError) as the command does.
    """
    shadows.refuse_import()
    from launch.prepare import show
    from pipeline.data.prepare.source import Options, refuse_count
    from pipeline.errors import expanded

    refuse_count("workers", workers)
    options = Options(size, fit, channels, per_shard, classes, background, dedupe)
    show(str(source), str(out), options, workers)
    return expanded(out)


def evaluate(
    run: str | Path,
    metrics: str | Sequence[str] = "kid",
    *,
    features: str | None = None,
    images: int | None = None,
    train_images: int | None = None,
    data: str | None = None,
    checkpoint: Wanted = "newest",
) -> dict[str, float]:
    """Scores of a run's G_ema against held-out images, as `shardgan evaluate` does: {"kid_efflite0": …}.

    Args:
        run: its folder.
        metrics: kid, fd, pr, dc and nn, as a list or separated by commas.
        features: efflite0, inception:PATH or module:Class. Default: the run's.
        images: generated and held out. Default: as in training, which gives the score of metrics.jsonl.
        train_images: compare with so many training images too.
        data: where the run's data are now, if they were moved.
        checkpoint: "newest", "best" (by the run's own score), or a kimg.

    Returns a number per score, some metrics having several; NaN where one is not defined. They are added to
    scores.json in the run folder. Computed on a GPU if there is one. Raises UserError (a ValueError) as the
    command does.
    """
    shadows.refuse_import()
    from pipeline.borrowed import borrowed
    from pipeline.errors import expanded
    from pipeline.run.score_run import score_run

    names = metrics.split(",") if isinstance(metrics, str) else metrics
    with borrowed():
        scores, _ = score_run(
            expanded(run),
            names,
            features=features,
            images=images,
            train_images=train_images,
            data=data,
            checkpoint=checkpoint,
        )
    return {name.removeprefix("Metrics/"): score for name, score in scores.items()}
