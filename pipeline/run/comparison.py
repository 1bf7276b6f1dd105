"""What sets runs apart: the settings that differ, and the scores that compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.run.changes import settings_changed
from pipeline.run.history import History, Score
from pipeline.run.metrics import METRICS, leading_chart, metric_of
from pipeline.wording import in_kimg, setting

NOTHING = "–"
_NONE = -1
_OF_ITSELF = {"run.name", "run.out", "run.resume", "run.new_data", "run.new_settings"}  # of any two runs
_BOTH = ("l2", "l1")  # `penalty.l2` sets those of both players
_MEANING = {  # of the keys of a reference
    "index": "data",
    "plan": "images held out",
    "images": "number of images",
    "features": "features",
}


@dataclass(frozen=True)
class Column:
    """cells: a text for each run. best: which of them are the best of those that compare."""

    title: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Comparison:
    """names: of the runs, in their order. notes: whole sentences, what has to be known to read the table."""

    names: tuple[str, ...]
    columns: tuple[Column, ...]
    notes: tuple[str, ...]


def compare(histories: Sequence[History]) -> Comparison:
    """Settings that are not the same in all runs, how far each run is, and their scores: of those that lead,
    the lowest and the last, each with its kimg; of others the last; and the newest of `shardgan evaluate`.

    Scores against different held-out images do not compare: then a column says which runs' do, and the best
    is sought among these.
    """
    groups, notes = _groups(histories)
    leading, others, more = _score_columns(histories, groups)
    kimg = tuple(in_kimg(history.rows[-1]["cur_nimg"] / 1000) for history in histories)
    columns = [Column("kimg", kimg)]
    if notes and (leading or others):
        columns.append(Column("scored against", tuple(_letter(group) for group in groups)))
        more = [*notes, *more]
    of_evaluate, apart = _evaluated_columns(histories)
    settings = [Column(key, values) for key, values in settings_apart(histories).items()]
    columns += [*leading, *of_evaluate, *settings, *others]
    more += _changed(histories)
    return Comparison(tuple(history.name for history in histories), tuple(columns), (*more, *apart))


def _changed(histories: Sequence[History]) -> list[str]:
    """A note for each run that did not have its present settings from the start."""
    found = []
    for history in histories:
        rows = settings_changed(history.changes, history.rows[-1]["cur_nimg"])
        texts = [
            f"{row['key']} was {row['old']} up to kimg {in_kimg(row['cur_nimg'] / 1000)}" for row in rows
        ]
        found += [f"{history.name}: {', '.join(texts)}."] if texts else []
    return found


def differing(each: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """The settings in which runs differ, and their values. each: a run's settings by key."""
    keys = dict.fromkeys(key for settings in each for key in settings)
    table = {key: tuple(settings.get(key, NOTHING) for settings in each) for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def of_both_players(settings: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The same, with λ of G and D together where they are equal in each run."""
    found = dict(settings)
    for penalty in _BOTH:
        of_G, of_D = (f"penalty.{player}.{penalty}" for player in "GD")
        if of_G in found and found[of_G] == found.get(of_D):
            together = {of_G: f"penalty.{penalty}"}
            found = {together.get(key, key): values for key, values in found.items() if key != of_D}
    return found


def settings_apart(histories: Sequence[History]) -> dict[str, tuple[str, ...]]:
    """The settings in which runs differ, without those in which any two do, and each run's value."""
    each = [
        {key: setting(value) for key, value in history.settings.items() if key not in _OF_ITSELF}
        for history in histories
    ]
    found = of_both_players(differing([settings for settings in each if settings]))
    values = {key: iter(cells) for key, cells in found.items()}  # of runs whose settings can be read
    return {key: tuple(next(cells) if of else NOTHING for of in each) for key, cells in values.items()}


def references_apart(histories: Sequence[History]) -> str:
    """That runs were scored against different references, and in which respect; empty if they were not. Runs
    without scores do not count."""
    each = [about for history in histories if (about := history.reference.get("heldout"))]
    keys = dict.fromkeys(key for about in each for key in about)
    differing = [key for key in keys if any(about.get(key) != each[0].get(key) for about in each)]
    which = ", ".join(_MEANING.get(key, key) for key in differing)
    return f"scored against different references ({which}), so scores do not compare." if which else ""


def _groups(histories: Sequence[History]) -> tuple[list[int], list[str]]:
    """The number of each run's group, within which scores compare, _NONE of those without scores; and in
    which respect groups differ."""
    seen: list[dict[str, Any]] = []
    groups = []
    for history in histories:
        about = history.reference.get("heldout", {})
        seen += [about] if about and about not in seen else []
        groups.append(seen.index(about) if about else _NONE)
    letters, apart = ", ".join(map(_letter, range(len(seen)))), references_apart(histories)
    return groups, [f"{letters}: {apart}"] if apart else []


def _letter(group: int) -> str:
    if group == _NONE:
        return NOTHING
    return chr(ord("A") + group) if group < 26 else str(group)


def _score_columns(
    histories: Sequence[History], groups: Sequence[int]
) -> tuple[list[Column], list[Column], list[str]]:
    """Columns of scores that lead and of others, and notes. Scores against training images are left out where
    these are not the same in all runs."""
    leading = list(dict.fromkeys(chart for history in histories for chart in history.leading_scores))
    charts = list(dict.fromkeys(chart for history in histories for chart in history.scores))
    trained = [str(history.reference.get("train")) for history in histories if "train" in history.reference]
    apart = [chart for chart in charts if _against_training(chart)] if len(set(trained)) > 1 else []
    of_leading, of_others = [], []
    for chart in leading:
        title = chart.removeprefix("Metrics/")
        lowest = _score_column(f"{title} lowest (kimg)", chart, History.lowest, histories, groups)
        last = _score_column(f"{title} last (kimg)", chart, History.last, histories, groups)
        if lowest.cells == last.cells:
            of_leading.append(replace(last, title=f"{title} (kimg)"))
        else:
            of_leading += [lowest, last]
    for chart in charts:
        if chart not in leading and chart not in apart:
            values = [history.last(chart) for history in histories]
            cells = tuple(f"{score.value:.4g}" if score else NOTHING for score in values)
            of_others.append(Column(chart.removeprefix("Metrics/"), cells))
    note = "Scores against training images are left out: they are against different ones."
    return of_leading, of_others, [note] if apart else []


def _evaluated_columns(histories: Sequence[History]) -> tuple[list[Column], list[str]]:
    """A column for each score of `shardgan evaluate`, and notes on those that do not compare."""
    charts = list(dict.fromkeys(chart for history in histories for chart in history.evaluated))
    leading = {leading_chart([name], charts) for name in METRICS}
    found, notes = [], []
    for chart in charts:
        part = "train" if _against_training(chart) else "heldout"
        each: list[tuple[Score | None, dict[str, Any]]] = [
            history.evaluated.get(chart, (None, {})) for history in histories
        ]
        references = [str(against.get(part)) for _, against in each]
        groups = [references.index(reference) for reference in references]
        title = chart.removeprefix("Metrics/")
        column = _score_column(
            f"{title} evaluated (kimg)", chart, lambda h, c: h.evaluated.get(c, (None,))[0], histories, groups
        )
        found.append(column if chart in leading else replace(column, best=frozenset()))
        if len({group for group, (score, _) in zip(groups, each, strict=True) if score}) > 1:
            notes.append(f"{title}: evaluated against different images, so these do not compare.")
    return found, notes


def _score_column(
    title: str,
    chart: str,
    read: Callable[[History, str], Score | None],
    histories: Sequence[History],
    groups: Sequence[int],
) -> Column:
    found = [read(history, chart) for history in histories]
    cells = tuple(f"{s.value:.4g} ({in_kimg(s.cur_nimg / 1000)})" if s else NOTHING for s in found)
    best = set()
    for group in set(groups):
        members = {i: s.value for i, s in enumerate(found) if s and groups[i] == group}
        members = {i: value for i, value in members.items() if math.isfinite(value)}
        best |= {i for i, value in members.items() if len(members) > 1 and value == min(members.values())}
    return Column(title, cells, frozenset(best))


def _against_training(chart: str) -> bool:
    metric = metric_of(chart)
    return chart.endswith("_train") or (metric is not None and metric.needs_train)
