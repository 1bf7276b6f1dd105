"""Where a run starts: its newest intact checkpoint, on the data that it was trained on; or run.init."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from pipeline.config import Config
from pipeline.data.index import Index
from pipeline.data.plan import Split
from pipeline.data.stream import label_frequencies
from pipeline.errors import CommonError
from pipeline.parallel.batch_norm import has_sync_batch_norm
from pipeline.parallel.ranks import Ranks
from pipeline.players import Gan
from pipeline.run import checkpoint, events, source
from pipeline.run.checkpoint import SavedBy
from pipeline.run.folder import finished, has_saved, record_data
from pipeline.run.report import say
from pipeline.run.resend import catch_up
from pipeline.run.source import Source
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.run.tensorboard import TensorBoard
from pipeline.wording import counted, in_kimg


def is_finished(config: Config, folder: Path, ranks: Ranks) -> bool:
    """Whether the run has trained as far as the config asks; says so, and gives its trackers the rest."""
    if not ranks.broadcast_from_main(lambda: finished(folder, config)):
        return False
    others = [partial(TensorBoard, folder, say)] if config.track.tensorboard else []
    ranks.broadcast_from_main(lambda: catch_up(config, folder, say, others))
    ranks.broadcast_from_main(
        lambda: say(f"{folder} is finished. Nothing to do; raise run.total_kimg to train longer.")
    )
    return True


def first_state(config: Config, index: Index, split: Split) -> State:
    """Where a new run stands."""
    plan = split.training()
    frequencies = label_frequencies(index, plan).tolist() if config.data.conditional else None
    names = list(index.classes) if config.data.conditional else None
    return State(
        plan=plan.fingerprint, data=index.fingerprint, label_frequencies=frequencies, class_names=names
    )


@dataclass(frozen=True)
class Start:
    """Where a run's weights come from: its newest intact checkpoint, else run.init, else the seed."""

    config: Config
    ranks: Ranks
    checkpoint: Path | None
    source: Source | None

    def fill(self, player: str, network: nn.Module) -> None:
        """Before a whole network is wrapped: fill it from run.init; or fill what D.freeze keeps from the
        checkpoint, from which `resume` loads the rest."""
        if self.checkpoint is not None:
            checkpoint.Pieces(self.checkpoint, player).fill("constant", network)
        elif self.source is not None:
            text = source.fill(self.config, self.source, player, network)
            if self.ranks.main:
                say(text)


def to_continue_from(
    folder: Path, look: Callable[[Path], tuple[Path | None, list[str]]] = checkpoint.newest_intact
) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a run, None if it has not saved yet, and a complaint about each newer
    one. Raises CommonError if the run has or had checkpoints, but no intact one."""
    found, complaints = look(folder / "checkpoints")
    if found is None and not complaints and has_saved(folder):
        complaints = [
            f"{folder / 'checkpoints'} is empty or gone, although the run has saved. Is a disk missing?"
        ]
    if found is None and complaints:
        raise CommonError(
            "\n".join([f"{folder} holds no intact checkpoint to continue from:", *complaints])
            + "\nBring one back, or start over under a new name with run.resume=false."
        )
    return found, complaints


def find_start(config: Config, folder: Path, state: State, ranks: Ranks) -> Start:
    """state: that of a new run. Raises CommonError if the run has or had checkpoints, but no intact one, or
    if it is new and run.init cannot be used."""
    ranks.progress.doing = "looking for a checkpoint"
    found, complaints = ranks.broadcast_from_main(lambda: to_continue_from(folder, checkpoint.recover))
    for complaint in complaints if ranks.main else ():
        at = 0 if found is None else int(found.name)
        _warn(folder, at, "Damaged checkpoint", f"{complaint}; falling back")
    first = ranks.broadcast_from_main(lambda: source.check_init(config, folder, state.num_classes))
    return Start(config, ranks, found, first)


def resume(start: Start, folder: Path, gan: Gan, state: State) -> tuple[State, Stats]:
    """Continue from the checkpoint that was found, if one was; returns where the run stands.

    state: that of a new run, which begins with what `Start.fill` has given it.
    """
    found, ranks = start.checkpoint, start.ranks
    stats = Stats(ranks.device, reports=gan.D.batch.world * gan.D.batch.rounds)
    if found is None:
        if start.source is not None:
            source.finish(start.config, start.source, gan)
            if ranks.main and start.source.was_split_otherwise(state):
                text = (
                    f"{start.source.where} was trained on images that are held out here, so scores flatter "
                    "this run: give it the same run.seed, data.holdout, data.folds and data.fold"
                )
                _warn(folder, 0, "Held-out images were seen", text)
        return state, stats
    ranks.progress.doing = "loading a checkpoint"
    by = checkpoint.saved_by(found)
    refuse_other_rounds(folder, by, gan)
    gan.draws.version = by.draws
    saved = checkpoint.read_state(found)
    before, now = (saved.data, saved.plan), (state.data, state.plan)
    if before != now:
        saved = on_other_data(folder, saved, state, start.config.run.new_data)
        if ranks.main:
            say("warning: resumes on other data: new scores do not compare with earlier ones")
    ranks.broadcast_from_main(lambda: record_data(folder, saved.cur_nimg, before, now))
    saved.class_names = state.class_names  # older checkpoints have none
    checkpoint.load(found, [gan.G, gan.D], gan.G_ema, ranks)
    stats.load(ranks, saved.stats)
    if gan.adaptive:
        gan.adaptive.load(saved.adaptive)
    ranks.progress.cur_nimg = saved.cur_nimg
    if ranks.main:
        other = (by.strategy, by.world) != (ranks.strategy, ranks.world)
        writer = f", saved by {counted(by.world, 'process')} under {by.strategy}" if other else ""
        say(f"Resuming from kimg {in_kimg(saved.cur_nimg / 1000)} ({found}{writer})")
    return saved, stats


def refuse_other_rounds(folder: Path, saved: SavedBy, gan: Gan) -> None:
    """Raises CommonError if a network that normalises over the images of a round would see other rounds."""
    batch, rounds = gan.D.batch, saved.rounds
    if rounds in (None, batch.rounds) or not any(has_sync_batch_norm(e.module) for e in (gan.G, gan.D)):
        return
    images, left = divmod(batch.local, rounds)
    remedy = (
        f"{batch.world} processes cannot have {counted(rounds, 'round')} of equal parts: use as many "
        f"processes as before ({saved.world})"
        if left
        else f"Set data.batch_gpu={images}"
    )
    raise CommonError(
        f"{folder} normalises over the images of a round (norm: sync_batch) and was trained with "
        f"{counted(rounds, 'round')} per update, not {batch.rounds}. {remedy}, or start over with "
        "run.resume=false."
    )


def on_other_data(folder: Path, saved: State, state: State, new_data: bool) -> State:
    """The saved state on the data of `state`. Raises CommonError if that is not wanted or impossible."""
    if not new_data:
        raise CommonError(
            f"{folder} was trained on other data, or on another split of them: resuming would mix the two. "
            "Point data.train at the same shards, with run.seed and data.holdout as they were; start over "
            "with run.resume=false; or, to change the data of this run, set run.new_data=true."
        )
    if saved.num_classes != state.num_classes:
        raise CommonError(
            f"{folder} knows {counted(saved.num_classes, 'class')}, these data {state.num_classes}."
        )
    _refuse_other_numbers(folder, saved, state)
    return saved.moved_to(state)


def _refuse_other_numbers(folder: Path, saved: State, state: State) -> None:
    """Raises CommonError if a class has another number: labels follow the order of the folders' names."""
    known, now = ({name: n for n, name in enumerate(s.classes)} for s in (saved, state))
    for name, number in known.items():
        if now.get(name, number) != number:
            raise CommonError(
                f"{folder} knows class {name!r} as number {number}, in these data it is number {now[name]}: "
                "classes are numbered in the order of their names. Prepare the images under names in the "
                "order of before, or start over with run.resume=false."
            )


def _warn(folder: Path, cur_nimg: int, title: str, text: str) -> None:
    """Before there is a report."""
    say(f"warning: {text}")
    events.record(folder, "warning", cur_nimg, title=title, text=text)


def where_to_resume(folder: Path) -> str:
    """For a person whose run has ended unexpectedly."""
    checkpoints = folder / "checkpoints"
    if saved := checkpoint.find(checkpoints):
        return f"The last checkpoint is {checkpoints / str(saved[0])}; the same command continues from there."
    return "There is no checkpoint yet; the same command starts over."
