"""Pictures of what runs recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from launch.plot import plot as command
from pipeline.config import UserError
from pipeline.run.curves import COLOURS, CURVES, FEWEST, Curves, _scale, draw_run, plot, save
from pipeline.run.history import read_histories
from pipeline.run.panels import panels_of
from pipeline.run.report import MainReport, Report

KID = "Metrics/kid_efflite0"
LOSSES = ("Loss/G/adversarial", "Loss/D/adversarial", "Loss/D/loss")


def a_run(folder: Path, rows: int = 8, **charts: float) -> Path:
    """Losses 2^-k at kimg k = 1, 2, …, other charts with slashes for __ likewise, and KID at every other."""
    folder.mkdir(parents=True)
    scales = dict.fromkeys(LOSSES, 1.0) | {name.replace("__", "/"): value for name, value in charts.items()}
    lines = []
    for k in range(1, rows + 1):
        row = {"cur_nimg": 1000 * k, **{name: scale * 2.0**-k for name, scale in scales.items()}}
        lines.append(json.dumps(row | ({KID: abs(k - 5) + 1.5} if k % 2 else {})))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def lines(figure, title: str) -> list:
    axes = next(axes for axes in figure.axes if axes.get_title(loc="left") == title)
    return [line for line in axes.lines if line.get_marker() != "o"]


def test_a_panel_for_what_there_is_and_none_for_what_is_not(tmp_path):
    a_run(tmp_path / "run", Loss__D__r1_penalty=3.0, Loss__G__l2_penalty=0.0, Loss__scores__heldout=1.0)
    histories = read_histories([tmp_path / "run"])
    figure = plot(histories, panels_of(histories))
    assert titles(figure) == [
        "KID",
        "Loss, without penalties",
        "D's scores of images",
        "Penalties in the loss",
    ]
    (kid,) = lines(figure, "KID")
    assert list(kid.get_xdata()) == [1, 3, 5, 7] and list(kid.get_ydata()) == [5.5, 3.5, 1.5, 3.5]
    assert figure.axes[0].get_title(loc="right") == "lowest 1.5 at kimg 5"
    (penalty,) = lines(figure, "Penalties in the loss")
    assert list(penalty.get_ydata()) == [3 * 2.0**-k for k in range(1, 9)], "λ = 0 has no line"
    of_G, of_D = lines(figure, "Loss, without penalties")
    assert of_G.get_color() != of_D.get_color()
    assert figure.axes[1].get_yscale() == "log" and figure.axes[0].get_yscale() == "linear"


def test_several_runs_have_a_colour_each_and_trials_one_per_candidate(tmp_path):
    names = [f"l2={value},seed=0,fold={fold}" for value in (0, 1) for fold in (0, 1)]
    for name in names:
        a_run(tmp_path / "chosen" / "trials" / name)
    a_run(tmp_path / ("of $x$ and " + "long " * 30))
    histories = read_histories([tmp_path / "chosen", *tmp_path.glob("of*")])
    figure = plot(histories, panels_of(histories))
    colours = [line.get_color() for line in lines(figure, "KID")]
    assert colours == [COLOURS[0], COLOURS[0], COLOURS[1], COLOURS[1], COLOURS[2]]
    styles = [line.get_linestyle() for line in lines(figure, "Loss, without penalties")]
    assert styles == ["-"] * 5 + ["--"] * 5
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[:2] == ["l2=0 (2 trials)", "l2=1 (2 trials)"]
    figure.canvas.draw()
    picture, drawn = figure.bbox, legend.get_window_extent()
    assert picture.x0 <= drawn.x0 and drawn.x1 <= picture.x1, "a long name is not cut off by the border"


def test_colours_differ_for_the_colour_blind(tmp_path):
    """By the projections of Viénot, Brettel and Mollon 1999 in linear RGB, for two kinds."""
    deutan = [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]
    protan = [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]
    for matrix in (deutan, protan):
        seen = []
        for colour in COLOURS:
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
            mixed = [max(0.0, sum(m * c for m, c in zip(row, linear, strict=True))) for row in matrix]
            seen.append([1.055 * c ** (1 / 2.4) - 0.055 if c > 0.0031308 else 12.92 * c for c in mixed])
        assert min(math.dist(a, b) for i, a in enumerate(seen) for b in seen[:i]) > 0.14


def test_the_picture_in_the_run_folder(tmp_path):
    assert draw_run(a_run(tmp_path / "short", rows=FEWEST - 1)) is None
    run = a_run(tmp_path / "run")
    (run / "changes.jsonl").write_text(
        json.dumps({"cur_nimg": 3000, "key": "penalty.G.l2", "old": 0.001, "new": 0.01}) + "\n"
    )
    assert draw_run(run) == run / CURVES
    with Image.open(run / CURVES) as picture:
        assert picture.format == "PNG" and picture.width == 1000
    assert sorted(path.name for path in run.iterdir()) == ["changes.jsonl", CURVES, "metrics.jsonl"]
    histories = read_histories([run])
    figure = plot(histories, panels_of(histories))
    assert "kimg 3: penalty.G.l2 0.001 → 0.01" in figure.get_suptitle()


def test_drawing_takes_a_hundredth_of_the_time_at_most(tmp_path):
    """However often it is asked for."""
    now, spent = [0.0], []

    class Drawing(Report):
        def extra(self, name, make):
            spent.append(3.0)
            now[0] += 3.0

    curves = Curves(tmp_path, Drawing(), clock=lambda: now[0])
    while now[0] < 10_000:
        now[0] += 1.0
        curves.draw_if_due()
        assert sum(spent) <= 0.01 * now[0] + 3.0
    assert sum(spent) > 0.009 * now[0], "nor much less"


def test_what_cannot_be_drawn_is_a_warning(tmp_path, capfd):
    run = a_run(tmp_path / "run")
    (run / CURVES).mkdir()  # nothing can be written there
    report = MainReport(run, [], 8000, 8000)
    report.extra(CURVES, lambda: draw_run(run))
    assert "warning: curves.png could not be written" in capfd.readouterr().out
    report.close()


def test_the_command_draws_chosen_charts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        a_run(tmp_path / name)
    done = CliRunner().invoke(
        command, ["a", "b", "--charts", "Loss/*/adversarial, Metrics/*", "--out", "x.svg"]
    )
    assert done.exit_code == 0, done.output
    text = (tmp_path / "x.svg").read_text()
    assert text.count("<!-- Loss/") == 2 and f"<!-- {KID} -->" in text and "<!-- kid_efflite0 -->" not in text
    for arguments, message in [
        (["--charts", "Loss/none"], "no chart Loss/none. There are: Loss/D/adversarial"),
        (["--out", "a/metrics.jsonl/x.png"], "could not be written"),
    ]:
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(command, ["a", *arguments], catch_exceptions=False)
    refused = CliRunner().invoke(command, ["a", "--out", "x.doc"])
    assert refused.exit_code == 2 and "has to end in .png" in refused.output


def test_the_command_says_where_scores_do_not_compare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "l2=0,seed=0,fold=0", "l2=0,seed=0,fold=1"):  # folds differ on purpose
        about = {"images": 50, "plan": name}
        (a_run(tmp_path / name) / "reference.json").write_text(json.dumps({"heldout": about}))
    said = "these runs were scored against different references (images held out), so scores do not compare"
    for runs, charts, found in [
        (["a", "b"], "Metrics/*", True),
        (["a", "b"], "Loss/D/loss", False),
        (["a"], "Metrics/*", False),
        (["l2=0,seed=0,fold=0", "l2=0,seed=0,fold=1"], "Metrics/*", False),
    ]:
        done = CliRunner().invoke(command, [*runs, "--charts", charts], catch_exceptions=False)
        assert done.exit_code == 0 and (said in done.output) == found, runs


def test_names_in_letters_that_the_font_lacks_are_drawn_without_warnings(tmp_path, recwarn):
    (run,) = read_histories([a_run(tmp_path / "試験")])
    save(plot([run], panels_of([run])), tmp_path / "a.png")
    assert (tmp_path / "a.png").exists() and not [w for w in recwarn if "Glyph" in str(w.message)]


def test_an_axis_says_its_values_whole():
    """Matplotlib would write 1e-9+9.9999e-4 above an axis from 5 to 9."""
    figure = Figure()
    axes = figure.subplots()
    rates = [9.99995e-4, 9.99999e-4]
    axes.plot(rates)
    _scale(axes, rates)
    FigureCanvasAgg(figure).draw()
    assert axes.yaxis.get_offset_text().get_text() == ""
    low, high = axes.get_ylim()
    assert low < 0.99 * rates[0] and high > 1.01 * rates[1]


def test_runs_that_have_not_begun_are_passed_over(tmp_path, capfd):
    a_run(tmp_path / "begun")
    (tmp_path / "soon" / ".lock").mkdir(parents=True)
    assert [h.name for h in read_histories([tmp_path / "begun", tmp_path / "soon"])] == ["begun"]
    assert capfd.readouterr().err == f"note: {tmp_path}/soon is left out: it has no results yet.\n"
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_histories([tmp_path / "soon"])
