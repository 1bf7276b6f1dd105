"""A page of a run, of several runs or of a selection: one HTML file that loads nothing.

Names, settings and warnings are text of others: jinja2 escapes all of it, and the page's own policy lets a
browser run nothing but the two scripts whose hashes it names: page.js, and Plotly's.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config import UserError
from pipeline.durable import write as write_whole
from pipeline.folders import cache_folder
from pipeline.plugins import own_version, require
from pipeline.run.comparison import differing, of_both_players
from pipeline.run.history import read_histories
from pipeline.run.page.charts import Line, colours, of_one, of_several
from pipeline.run.page.facts import Facts, Score
from pipeline.run.page.pictures import MOST, Picture, history, plotted, reals
from pipeline.run.page.selection import TABLE, Selection
from pipeline.wording import in_kimg

PAGE = "report.html"  # in a run folder, or a selection's
_HERE = Path(__file__).parent
_NAMED = 4  # runs in a title
_FEWEST = 6  # sample grids of each of several runs


@dataclass(frozen=True)
class Shown:
    """A run on the page."""

    facts: Facts
    frames: Sequence[Picture]
    reals: Picture | None
    colour: str
    score_cells: Sequence[Score | None] = ()

    @property
    def name(self) -> str:
        return self.facts.name


def write(folders: Sequence[Path], out: Path) -> None:
    """Write the page of one or more run folders, or of one selection's folder, to `out`.

    Some 2 MB of it are Plotly; a run's sample grids, of which at most MOST are shown, are another 1 to 2 MB.
    Raises UserError if plotly is not installed, a folder is neither, or `out` cannot be written.
    """
    require("plotly", "page", "a report")
    content = page(folders)
    try:
        write_whole(out, content)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from None


def page(folders: Sequence[Path]) -> str:
    """The page's text. Raises UserError as `write`."""
    selections = [folder for folder in folders if (folder / TABLE).is_file()]
    if selections and len(folders) > 1:
        raise UserError(f"{selections[0]} is a selection, which has a page of its own: give it alone.")
    return _rendered(_of_selection(selections[0]) if selections else _of_runs(folders))


def write_beside(folder: Path) -> Path | None:
    """The page of a run or selection that has just ended, in its folder.

    None without plotly, and for a trial, which its selection's page shows. Raises UserError as `write`.
    """
    trial = folder.parent.name == "trials" and (folder.parent.parent / "selection.json").exists()
    if trial or find_spec("plotly") is None:
        return None
    write([folder], folder / PAGE)
    return folder / PAGE


def _of_selection(folder: Path) -> dict[str, Any]:
    selection = Selection(folder)
    return {
        "kind": "ShardGAN: a selection",
        "title": selection.name,
        "what": selection.what,
        "selection": selection,
    }


def _of_runs(folders: Sequence[Path]) -> dict[str, Any]:
    runs = [Facts(history) for history in read_histories(folders)]
    most = MOST if len(runs) == 1 else max(_FEWEST, MOST // len(runs))
    charts = dict.fromkeys(score.chart for facts in runs for score in facts.scores)
    shown = [
        Shown(
            facts,
            history(facts.folder, most),
            reals(facts.folder),
            shade,
            [next((s for s in facts.scores if s.chart == chart), None) for chart in charts],
        )
        for facts, shade in zip(runs, colours(len(runs)), strict=True)
    ]
    common = {"runs": shown, "conclusion": _conclusion(runs)}
    if len(runs) == 1:
        return common | {
            "kind": f"ShardGAN: a run · {runs[0].state}",
            "title": runs[0].name,
            "what": runs[0].what,
            "curves": of_one(runs[0]),
            "drawn": plotted(runs[0].folder / "curves.png"),
        }
    labels = {score.chart: score.label for facts in runs for score in facts.scores}
    names = [facts.name for facts in runs]
    differ = of_both_players(differing([facts.values for facts in runs]))
    return common | {
        "kind": f"ShardGAN: {len(runs)} runs compared",
        "title": _listed(names),
        "what": f"They differ in {_listed([*differ])}." if differ else "Of the same settings.",
        "score_labels": [labels[chart] for chart in charts],
        "differing": [*differ.items()],
        "curves": of_several([Line(line.facts, line.name, line.colour) for line in shown]),
    }


def _listed(names: Sequence[str]) -> str:
    """The first few."""
    rest = len(names) - _NAMED
    return f"{', '.join(names[:_NAMED])} and {rest} more" if rest > 0 else ", ".join(names)


def _conclusion(runs: Sequence[Facts]) -> str:
    """What the scores say, and whether anything went wrong."""
    if len(runs) == 1:
        return " ".join(filter(None, [runs[0].conclusion, _wrong(runs[0])]))
    scored = [score for facts in runs if (score := facts.leading_score)]
    if len(scored) < len(runs) or len({score.chart for score in scored}) > 1:
        return "These runs have no score in common to be compared by."
    order = sorted(zip(scored, runs, strict=True), key=lambda pair: _place_of(pair[0].last[1]))
    ends = _last_scores(order)
    about = [facts.history.reference.get("heldout") for facts in runs]
    if any(other != about[0] for other in about):
        return f"{ends}. They were scored against different images, and do not compare."
    return f"{ends}{runs[0].against}."


def _place_of(value: float) -> tuple[bool, float]:
    """What is no finite number comes last."""
    return (False, value) if math.isfinite(value) else (True, 0.0)


def _last_scores(order: Sequence[tuple[Score, Facts]]) -> str:
    """The best first; with their kimg if a run has trained on after its last score."""
    each = [
        (f"{facts.name} {score.last[1]:.4g}", f"at kimg {in_kimg(score.last[0])}") for score, facts in order
    ]
    when = "when last scored"
    if all(score.last[0] == facts.kimg for score, facts in order):
        when = "at the end"
    elif len({at for _, at in each}) == 1:
        when = each[0][1]
    values = [f"{text} {at}" if when == "when last scored" else text for text, at in each]
    return f"{order[0][0].label} {when}, the best first: {', '.join(values)}"


def _wrong(facts: Facts) -> str:
    if not facts.troubles:
        return ""
    return f"Some things went wrong, or were changed: {len(facts.troubles)}, listed below."


def _rendered(content: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    scripts = Environment(
        autoescape=True,
        loader=FileSystemLoader(_HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts.filters |= {"short": _short, "with_error": _with_error, "frames_json": _frames_json}
    css, javascript = ((_HERE / name).read_text("utf-8") for name in ("page.css", "page.js"))
    source, packed = _plotly()
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {_hash(javascript.encode())} {_hash(source)}; base-uri 'none'; form-action 'none'"
    )
    optional: dict[str, Any] = {"selection": None, "runs": [], "drawn": None}
    return (
        scripts.get_template("page.html")
        .render(
            **optional
            | content
            | {
                "css": Markup(css),
                "javascript": Markup(javascript),
                "plotly": base64.b64encode(packed).decode(),
                "policy": policy,
                "version": own_version(),
                "date": time.strftime("%Y-%m-%d"),
            }
        )
        .lstrip()
    )


def _plotly() -> tuple[bytes, bytes]:
    """Plotly's script, and the same in gzip, which takes a second to make and is kept in the cache."""
    spec = find_spec("plotly")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_bytes()
    kept = cache_folder() / f"plotly-{hashlib.sha256(source).hexdigest()[:16]}.js.gz"
    try:
        return source, kept.read_bytes()
    except OSError:
        packed = gzip.compress(source, 6, mtime=0)
    with suppress(OSError):  # it is made again the next time
        write_whole(kept, packed)
    return source, packed


def _hash(script: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def _frames_json(frames: Sequence[Picture]) -> Any:
    from jinja2.utils import htmlsafe_json_dumps

    return htmlsafe_json_dumps([{"uri": frame.uri, "kimg": frame.kimg} for frame in frames])


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    """With as many decimals as show two digits of the error."""
    if value is None or not error:
        return _short(value)
    decimals = min(9, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"
