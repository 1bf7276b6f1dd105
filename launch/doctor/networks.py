"""Doctor's checks of the networks: can they be built, and what are the pitfalls of training them?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from launch.doctor import scale
from launch.doctor.finding import Finding, Job, ok, warning, would_fail
from launch.doctor.flops import Flops, forward, in_flops, of_training
from pipeline.config import UserError
from pipeline.data.index import Index
from pipeline.gan import vit
from pipeline.gan.compatible import check_objective, remarks
from pipeline.gan.frozen import sizes
from pipeline.gan.networks import build_D, build_G, check_networks
from pipeline.gan.schedules import at, is_used
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.batch_norm import has_batch_norm, has_sync_batch_norm
from pipeline.run.folder import under_a_free_name
from pipeline.run.source import check_init
from pipeline.wording import counted, in_bytes, in_kimg, in_millions

Players = tuple[nn.Module, nn.Module]  # G and D

_SMALL = 16  # images in a BatchNorm's batch
_MANY_TICKS = 20_000  # 100 MB of metrics.jsonl, each after a look at held-out images


def examine(job: Job, index: Index | None) -> tuple[Players | None, Flops | None, list[Finding]]:
    """Also returns G and D, without memory, if they can be built, and their FLOPs if these can be counted."""
    num_classes = index.num_classes if index and job.config.data.conditional else 0
    if index is None and job.config.data.conditional:
        text = "not checked: the number of classes is not known"
        return None, None, [warning("networks", text, "Repair the data first.")]
    try:
        check_networks(job.config, num_classes)
        G, D = build_players(job, num_classes)
    except UserError as error:
        return None, None, [would_fail("networks", str(error))]
    flops, large = measured(job, num_classes, G, D)
    found = [large, *initial_weights(job, num_classes)]
    for check in (tied, batch_norm, objective, gathered_whole, learning_rate, cadence):
        found += check(job, G, D)
    return (G, D), flops, [*found, *scale.examine(job, num_classes, (G, D), flops and flops[:2])]


def measured(job: Job, num_classes: int, G: nn.Module, D: nn.Module) -> tuple[Flops | None, Finding]:
    """Parameters and FLOPs; also returns those of an image in G and D if they can be counted."""
    in_G, in_D = (in_millions(sum(sizes(player))) for player in (G, D))
    text = f"G {in_G} and D {in_D} parameters"
    try:
        flops = forward(job.config, num_classes)
    except Exception as error:  # a user's network may do anything
        return None, ok("networks", f"{text}; FLOPs cannot be counted ({error})")
    training = in_flops(of_training(job.config, *flops))
    text += (
        f"; an image takes {in_flops(flops[0])} in G and {in_flops(flops[1])} in D, {training} to train on"
    )
    return flops, ok("networks", text)


def initial_weights(job: Job, num_classes: int) -> Iterator[Finding]:
    """Can a new run start from what run.init names?"""
    run = under_a_free_name(job.config).run
    try:
        source = check_init(job.config, Path(run.out) / str(run.name), num_classes)
    except UserError as error:
        yield would_fail("run.init", str(error))
        return
    if source is not None:
        yield ok("run.init", f"starts from {source.where}")


def build_players(job: Job, num_classes: int) -> Players:
    """G and D of FakeTensors, or with memory if they cannot be built without."""
    try:
        with FakeTensorMode():
            return build_G(job.config, num_classes), build_D(job.config, num_classes)
    except Exception:
        return build_G(job.config, num_classes), build_D(job.config, num_classes)


def tied(job: Job, G: nn.Module, D: nn.Module) -> Iterator[Finding]:
    """Parameters that FSDP2 cannot shard."""
    if job.strategy not in ("fsdp2", "hsdp"):
        return
    from pipeline.parallel.fsdp2 import refuse_unshardable

    try:
        refuse_unshardable(G)
        refuse_unshardable(D)
    except UserError as error:
        yield would_fail("sharding", str(error))


def batch_norm(job: Job, G: nn.Module, D: nn.Module) -> Iterator[Finding]:
    """Its statistics are over one rank's images of one round, or all ranks'."""
    who = [name for name, player in (("G", G), ("D", D)) if has_batch_norm(player)]
    try:
        shape = batch_shape(job.config.data, job.world)
    except UserError:
        return
    if (shape.world, shape.rounds) == (1, 1):
        return
    if any(map(has_sync_batch_norm, (G, D))):
        of_round, rounds = shape.world * shape.images, counted(shape.rounds, "round")
        text = f"sync_batch normalises over the {of_round} images of a round; a resume needs {rounds} again"
        yield ok("BatchNorm", text)
    if not who:
        return
    few, all_of_them = counted(shape.images, "image"), job.config.data.batch_size
    text = (
        f"{' and '.join(who)} normalise{'s' * (len(who) == 1)} over the {few} of a rank and round, not over "
        f"the {all_of_them} of the batch: results depend on the number of ranks"
    )
    if shape.images < _SMALL:
        text += ", and statistics of so few images are noisy"
    norms = " and ".join(f"{name}.norm" for name in who)
    yield warning("BatchNorm", text, f"Set {norms} to sync_batch, group or instance for equal results.")


def objective(job: Job, G: nn.Module, D: nn.Module) -> Iterator[Finding]:
    """What training would refuse or remark on."""
    try:
        images = batch_shape(job.config.data, job.world).images
    except UserError:  # which `batch` reports
        images = 0  # divisible by anything
    try:
        check_objective(job.config, images, job.precision)
    except UserError as error:
        yield would_fail("objective", str(error))
        return
    for remark in remarks(job.config, job.precision):
        yield warning("objective", remark)
    if is_used(job.config.penalty.r1.gamma) and (has_batch_norm(D) or has_sync_batch_norm(D)):
        text = "R1 asks for the gradient of one image's logit; under BatchNorm that depends on the others"
        yield warning("R1", text, "Set D.norm to none, group or instance.")


def gathered_whole(job: Job, G: nn.Module, D: nn.Module) -> Iterator[Finding]:
    """ZeRO 3 gathers a player whose passes are differentiated twice."""
    of_D = [penalty.name for penalty in at(job.config, 0).gradient_penalties if penalty.twice]
    of_G = ["path length"] * (job.config.penalty.path.weight > 0)
    for name, player, penalties in (("G", G, of_G), ("D", D, of_D)):
        if job.strategy == "zero3" and penalties:
            size = in_bytes(4 * sum(sizes(player)))
            text = f"{' and '.join(penalties)}: each rank gathers all of {name}, {size}, in every such turn"
            yield ok("gradient penalty", text)


def learning_rate(job: Job, G: nn.Module, D: nn.Module) -> Iterator[Finding]:
    """A transformer's falls with its width."""
    config = job.config
    for name, section, optimizer in (("G", config.G, config.optim.G), ("D", config.D, config.optim.D)):
        lr = optimizer.lr[0] if isinstance(optimizer.lr, tuple) else optimizer.lr
        if section.kind == "vit" and not math.isclose(
            lr, rule := vit.learning_rate(section.width), rel_tol=0.01
        ):
            text = (
                f"optim.{name}.lr={lr:g}, where a vit of width {section.width} is to begin with "
                f"2e-4 · 768 / width = {rule:.3g}"
            )
            yield warning("learning rate", text, f"Set optim.{name}.lr={rule:.3g}, unless it was tuned.")


def cadence(job: Job, G: nn.Module, D: nn.Module) -> Iterator[Finding]:
    """How much does a failing node lose, and how much of a run goes into reports?"""
    run = job.config.run
    if run.checkpoint_kimg > run.total_kimg / 4:
        text = f"a checkpoint every {in_kimg(run.checkpoint_kimg)} of {in_kimg(run.total_kimg)} kimg"
        text += ": a node that fails loses up to that much (a signal saves first)"
        yield warning("checkpoints", text, "Lower run.checkpoint_kimg.")
    if (ticks := run.total_kimg / run.tick_kimg) > _MANY_TICKS:
        text = (
            f"{ticks:,.0f} ticks of {in_kimg(run.tick_kimg)} kimg: each is a line in metrics.jsonl and a "
            "look of D at held-out images"
        )
        enough = math.ceil(run.total_kimg / _MANY_TICKS)
        yield warning("ticks", text, f"Set run.tick_kimg={enough} or more.")
