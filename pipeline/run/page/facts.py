"""What a page says of one run, read from its folder without loading a network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import Config, UserError
from pipeline.credentials import anonymous
from pipeline.run.changes import DATA
from pipeline.run.events import EVENTS
from pipeline.run.folder import begun, flattened
from pipeline.run.history import History, seconds_of
from pipeline.run.markers import DONE
from pipeline.run.metrics import leading_chart, metric_of
from pipeline.run.panels import label_of
from pipeline.run.rows import rows
from pipeline.run.wandb_mode import public
from pipeline.wording import counted, in_kimg, in_time, setting

_HOST = re.compile(r"(?<=\d) \([^(),]+, pid \d+\)")  # behind the number of a rank
_FEW = 5  # starts that are listed one by one
_UNSAID = {
    "run.name",
    "run.out",
    "run.resume",
    "track.wandb",
    "track.project",
    "track.entity",
}  # of no result


@dataclass(frozen=True)
class Score:
    """One score over a run: its values at the first and last scoring, and the best if there is one."""

    chart: str  # as in metrics.jsonl
    label: str
    first: tuple[float, float]  # kimg, value
    best: tuple[float, float] | None
    last: tuple[float, float]
    lower_is_better: bool | None  # None: neither is, and none is the best


@dataclass(frozen=True)
class Setting:
    key: str
    value: str
    default: str

    @property
    def differs(self) -> bool:
        return self.value != self.default


class Facts:
    """A run, as its folder shows it. Texts name no folders of this machine and hold no credentials."""

    def __init__(self, history: History) -> None:
        """Raises UserError if this version cannot read its config or its events."""
        self.history, self.config = history, begun(history.folder)
        self.name, self.folder, self.rows = history.name, history.folder, history.rows
        try:
            self.events = rows(self.folder / EVENTS)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read: {error.strerror or error}.") from None

    @property
    def kimg(self) -> float:
        return float(self.rows[-1]["cur_nimg"]) / 1000

    @property
    def finished(self) -> bool:
        return (self.folder / DONE).exists()

    @property
    def seconds(self) -> float:
        """Spent in training, without scoring and saving."""
        return seconds_of(self.rows)

    @property
    def what(self) -> str:
        """One sentence: what was trained, on what, and how far."""
        data, penalty = self.config.data, self.config.penalty
        colour = "latents" if data.latents else "grey images" if data.channels == 1 else "colour images"
        kinds = " and ".join(dict.fromkeys((self.config.G.kind, self.config.D.kind)))
        lambdas = {in_time(getattr(penalty, p).l2): p for p in "DG"}
        one = len(lambdas) == 1
        l2 = next(iter(lambdas)) if one else ", ".join(f"{p} {value}" for value, p in lambdas.items())
        shown = counted(round(1000 * self.kimg), "image")
        return (
            f"A GAN ({anonymous(kinds)}) of {data.size}×{data.size} {colour}, trained on "
            f"{_place(str(data.train))} with λ = {l2}. D was shown {shown}"
            f"{self._epochs()}{f', in {_duration(self.seconds)} of training' if self.seconds else ''}."
        )

    @property
    def state(self) -> str:
        kimg, total = in_kimg(self.kimg), in_kimg(self.config.run.total_kimg)
        return f"Finished at kimg {kimg}" if self.finished else f"At kimg {kimg} of {total}"

    @cached_property
    def scores(self) -> list[Score]:
        """The one to compare by first."""
        found = [score for chart in self.history.scores if (score := self._score(chart))]
        return sorted(found, key=lambda score: score.chart != self.leading)

    @cached_property
    def evaluated(self) -> list[tuple[str, float, float]]:
        """Label, value and kimg of what `shardgan evaluate` has found."""
        found = self.history.evaluated.items()
        return [(label_of(chart), score.value, score.cur_nimg / 1000) for chart, (score, _) in found]

    @cached_property
    def leading(self) -> str | None:
        """The chart by which runs are compared; None if there is none."""
        return leading_chart(self.config.score.metrics, self.history.scores)

    @property
    def leading_score(self) -> Score | None:
        return next((score for score in self.scores if score.chart == self.leading), None)

    @property
    def conclusion(self) -> str:
        """What the leading score did; empty without scores."""
        score = self.leading_score
        if score is None or score.best is None:
            return ""
        (start, first), (best_at, best), (_, last) = score.first, score.best, score.last
        if start == score.last[0]:
            return f"{score.label} is {last:.4g} at kimg {in_kimg(start)}{self.against}."
        moved = "fell" if best < first else "did not fall"
        to = f" to {best:.4g} (kimg {in_kimg(best_at)})" if best < first else ""
        end = "" if best == last else f", and ended at {last:.4g}"
        return f"{score.label} {moved} from {first:.4g}{to}{end}{self.against}."

    @property
    def against(self) -> str:
        """What scores were taken of and against, with counts."""
        about = self.history.reference.get("heldout", {})
        fakes = next(
            (row[key] for row in reversed(self.rows) for key in row if key.endswith("_fake_images")), 0
        )
        features = (about.get("features") or [""])[0]
        if not (fakes and about.get("images")):
            return ""
        of = f", in features of {anonymous(str(features))}" if features else ""
        made, started = counted(int(fakes), "generated image"), self.history.settings.get("run.init")
        # The split of other data, or of another run, may hold out others.
        never = "" if started or self.history.data_since >= 0 else " that were never trained on"
        return f", for {made} against {about['images']:,} held-out images{never}{of}"

    @property
    def settings(self) -> list[Setting]:
        """All that may have had an influence on the result."""
        default: dict[str, Any] = {}
        for section, values in public(Config()).items():
            default |= flattened(section, values)
        return [
            Setting(key, setting(value, _place), setting(default.get(key), _place))
            for key, value in self.history.settings.items()
            if key not in _UNSAID
        ]

    @property
    def values(self) -> dict[str, str]:
        """The same, by key."""
        return {each.key: each.value for each in self.settings}

    @property
    def surroundings(self) -> dict[str, str]:
        """Of the last start that is recorded; {} of a run that an earlier version trained."""
        start = next((row for row in reversed(self.events) if row.get("event") == "start"), None)
        if start is None:
            return {}
        versions = start.get("versions")
        return {
            "strategy": f"{start.get('strategy')}, {counted(int(start.get('world') or 1), 'process')}",
            "device": str(start.get("device")),
            "precision": {"no": "float32"}.get(str(start.get("precision")), str(start.get("precision"))),
            **(versions if isinstance(versions, Mapping) else {}),
        }

    @cached_property
    def troubles(self) -> list[tuple[str, str]]:
        """(when, what) of everything that a reader should know of, in order."""
        found = sorted([*self._happened(), *self._changed()], key=lambda pair: pair[0])
        return [*((f"kimg {in_kimg(at / 1000)}", anonymous(text)) for at, text in found), *self._counts()]

    def _happened(self) -> Iterator[tuple[int, str]]:
        starts = [number for number, row in enumerate(self.events) if row.get("event") == "start"]
        again = starts[1:]
        few = len(again) <= _FEW
        if not few:
            text = f"Stopped and started again {len(again)} times, the last time here"
            yield self.events[again[-1]]["cur_nimg"], text
        for number, row in enumerate(self.events):
            event = row.get("event")
            if event == "warning":
                yield row["cur_nimg"], f"{row.get('title')}: {row.get('text')}"
            elif event == "error":
                yield row["cur_nimg"], f"Failed: {_HOST.sub('', str(row.get('text')))}"
            elif event == "stop" and (few or number > starts[-1]):
                yield row["cur_nimg"], f"Stopped {row.get('reason')}"
            elif few and number in again:
                yield row["cur_nimg"], "Started again, and resumed from here"

    def _changed(self) -> Iterator[tuple[int, str]]:
        for row in self.history.changes:
            text = f"{row.get('key')}: {row.get('old')} → {row.get('new')}"
            moved = row["key"] == DATA
            text = f"Other {text}; earlier scores do not compare" if moved else f"Setting changed: {text}"
            yield row["cur_nimg"], text

    def _counts(self) -> Iterator[tuple[str, str]]:
        # Between two updates of G, D has loss.D_steps.
        per_update, before = {"G": self.config.images_per_update, "D": self.config.data.batch_size}, 0
        skipped = dict.fromkeys("GD", 0)
        for row in self.rows:
            shown, before = row["cur_nimg"] - before, row["cur_nimg"]
            for player in skipped:
                updates = shown / per_update[player]
                skipped[player] += round(_number(row.get(f"Gradients/{player}/skipped")) * updates)
        for player, count in skipped.items():
            if count:
                yield "in all", f"{counted(count, 'update')} of {player} skipped, as they were not finite"
        if bad := int(_number(self.rows[-1].get("Progress/bad_images"))):
            yield "in all", f"{counted(bad, 'training image')} could not be read; others replaced them"

    def _epochs(self) -> str:
        epochs = _number(self.rows[-1].get("Progress/epoch"))
        return f" ({epochs:.3g} epochs)" if epochs else ""

    def _score(self, chart: str) -> Score | None:
        metric = metric_of(chart)
        last = self.history.last(chart)  # which may not be finite
        if metric is None or last is None:
            return None
        end = (last.cur_nimg / 1000, last.value)
        values = [(score.cur_nimg / 1000, score.value) for score in self.history.finite(chart)]
        best = None
        if values and metric.lower_is_better is not None:
            best = (min if metric.lower_is_better else max)(values, key=lambda point: point[1])
        return Score(chart, label_of(chart), values[0] if values else end, best, end, metric.lower_is_better)


def _place(value: str) -> str:
    """A setting that may be a path of this machine, with spaces perhaps: then its last part."""
    return f"…/{Path(value).name}" if value.startswith(("/", "~", "..")) else anonymous(value)


def _number(value: Any, otherwise: float = 0.0) -> float:
    return float(value) if isinstance(value, int | float) else otherwise


def _duration(seconds: float) -> str:
    """45 s, 12 min, 3.4 h, 2.1 days."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit == "min" and seconds >= 60):
            return f"{seconds / length:.2g} {unit}" if unit != "min" else f"{seconds / length:.0f} min"
    return f"{seconds:.0f} s"
