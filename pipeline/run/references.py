"""The real images that generated ones are compared with: their features, and what those depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config, Data, Score, UserError
from pipeline.data.index import Index
from pipeline.data.plan import HeldOutPlan, split_of
from pipeline.data.stream import heldout_batches
from pipeline.durable import write
from pipeline.errors import CommonError
from pipeline.parallel.ranks import Ranks
from pipeline.run.features import Extractor
from pipeline.run.images import PLAIN, Images
from pipeline.run.metrics import METRICS
from pipeline.run.report import say
from pipeline.run.tensor_cache import read_tensor, write_tensor
from pipeline.wording import counted, why

About = Mapping[str, Mapping[str, object]]
"""Of each part ("heldout", "train"): what scores against it depend on."""


@dataclass(frozen=True)
class References:
    """Features of the real images that generated ones are compared with, and what scores depend on."""

    heldout: Tensor  # float32 [n, d]
    train: Tensor | None  # likewise, of training images; None: not compared with
    all_of_train: bool  # whether these are all training images
    about: dict[str, dict[str, object]]  # "heldout", "train" → everything a score against them depends on

    @property
    def fingerprints(self) -> dict[str, str]:
        """Only scores against references of equal fingerprints can be compared."""
        return fingerprints(self.about)


def fingerprints(about: About) -> dict[str, str]:
    """Of "heldout" and "train", each a short hash of what scores against it depend on."""
    return {
        name: hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        for name, key in about.items()
    }


def references(
    config: Config, extractor: Extractor, index: Index, ranks: Ranks, images: Images = PLAIN
) -> References:
    """The real images that the config asks for: held-out ones, and training images for `nn` or if asked for.

    images: makes them of what the shards hold. Raises UserError if fewer than two are held out, or if a shard
    cannot be read.
    """
    data, score = config.data, config.score
    split = split_of(config, index)
    check_held_out(data, split.heldout().size)
    real = partial(_real_features, extractor, index, ranks, data, images)
    heldout, about = real(split.heldout(), score.images)
    wanted = training_images(score)
    if not wanted:
        return References(heldout, None, False, {"heldout": about})
    plan = split.trained_once()
    train, about_train = real(plan, wanted)
    return References(heldout, train, len(train) == plan.size, {"heldout": about, "train": about_train})


def check_held_out(data: Data, count: int) -> None:
    """Raises CommonError if `count` held-out images are too few for a score."""
    if count < 2:
        more = more_held_out(data).capitalize()
        raise CommonError(
            f"{counted(count, 'image')} held out: too few to compare with. {more}, use more images, or set "
            "score.metrics=[] for no scores."
        )


def more_held_out(data: Data) -> str:
    """What to set for more held-out images."""
    return (
        f"lower data.folds (now {data.folds})" if data.folds else f"raise data.holdout (now {data.holdout:g})"
    )


def training_images(score: Score) -> int:
    """How many training images to compare with, if there are so many."""
    return score.train_images or (score.images if any(METRICS[m].needs_train for m in score.metrics) else 0)


def differences(before: About, now: About) -> list[str]:
    """Where scores against `before` and against `now` do not compare: `part, key: before → now` each.

    Parts that only one of them has are not compared.
    """
    return [
        f"{part}, {key}: {before[part].get(key)!r} → {about.get(key)!r}"
        for part, about in now.items()
        for key in (dict.fromkeys([*before[part], *about]) if part in before else ())
        if before[part].get(key) != about.get(key)
    ]


def _real_features(
    extractor: Extractor,
    index: Index,
    ranks: Ranks,
    data: Data,
    images: Images,
    plan: HeldOutPlan,
    count: int,
) -> tuple[Tensor, dict[str, object]]:
    """Features [n, d], float32, of a plan's first `count` real images, or of all if there are fewer; and
    everything they depend on, which is their key in the cache folder.

    All ranks compute them together. The result is the same on every rank and in any world, in the plan's
    order. Raises UserError if a shard cannot be read.
    """
    count = min(count, plan.size)
    key: dict[str, object] = {
        "index": index.fingerprint,
        "plan": plan.fingerprint,
        "size": data.size,
        "channels": data.channels,
        "stages": list(data.stages),
        "pixels": images.version,
        "features": [extractor.name, extractor.version],
        "images": count,
    }
    kept = None if data.stages else read_tensor("real-features", key)  # a user's code may change
    # Where each node has its own cache, some may lack it: then all ranks compute, as all must take part.
    if not any(ranks.poll_any(kept is None)()) and kept is not None:
        return kept.to(ranks.device), key
    features = _compute(extractor, index, ranks, data, images, plan, count)
    if not data.stages:
        ranks.broadcast_on_machine(lambda: write_tensor("real-features", key, features))  # once, not by all
    return features, key


def keep_to(file: Path, real: References) -> str | None:
    """Record in `file`, once, what a run's scores are against; later scores must be against the same.

    Raises UserError otherwise: numbers under one name would not compare. Returns a complaint if the file
    cannot be written now, which the next score does.
    """
    try:
        before = json.loads(file.read_text()) if file.exists() else {}
        changed, both = differences(before, real.about), before | real.about
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read: {error}. If it is damaged, remove it: new scores are then assumed to "
            "compare with earlier ones."
        ) from None
    if changed:
        lines = [
            "This run's earlier scores are against other references, and new ones would not compare:",
            *changed,
            "Set score.images, score.train_images and score.features as before.",
        ]
        raise UserError("\n  ".join(lines))
    if both != before:
        try:
            write(file, json.dumps(both, indent=1) + "\n")
        except OSError as error:
            return f"{file}, what scores are against, could not be written: {why(error)}."
    return None


def _compute(
    extractor: Extractor,
    index: Index,
    ranks: Ranks,
    data: Data,
    images: Images,
    plan: HeldOutPlan,
    count: int,
) -> Tensor:
    """Features [count, d] of the plan's first images, each once, in the plan's order."""
    parts, valid = [], []
    batch = min(64, -(-count // ranks.world))
    batches = heldout_batches(index, plan, data, batch=batch, rank=ranks.rank, world=ranks.world, limit=count)
    while True:
        with ranks.raise_together():  # only reading: the extractor may ask the ranks something too
            following = next(batches, None)
        if following is None:  # on all ranks
            break
        reals, there = following
        for problem in reals.bad:
            say(f"warning: {problem} Another held-out image replaces it.")
        features = torch.zeros(batch, extractor.dim, device=ranks.device)
        features[:there] = extractor(images(reals.images[:there].to(ranks.device)))
        parts.append(features)
        valid.append(torch.arange(batch, device=ranks.device) < there)
    by_rank = (ranks.world, len(parts), batch)
    features = ranks.gather(torch.cat(parts)).view(*by_rank, -1).transpose(0, 1)  # ranks share each chunk
    return features[ranks.gather(torch.cat(valid)).view(by_rank).transpose(0, 1)]
