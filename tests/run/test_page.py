"""A run's page: what it says, that it loads and runs nothing, and how it looks to a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from runs_on_paper import write_events, write_run

from pipeline.credentials import anonymous
from pipeline.errors import UserError
from pipeline.run import events
from pipeline.run.exported import scores_of
from pipeline.run.history import read_history
from pipeline.run.page import document
from pipeline.run.page.document import PAGE, page, write, write_beside
from pipeline.run.panels import panels_of

EVIL = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>{{ 7*7 }}"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Parsed(HTMLParser):
    """Tags with their attributes, texts outside of scripts and styles, and the contents of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text, self._raw = "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._raw = False

    def handle_data(self, data):
        if not self._raw:
            self.text += f" {data}"
        elif self.tags[-1][0] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def data(self) -> list[object]:
        """What the scripts that are data hold."""
        return [json.loads(text) for a, text in self.scripts if a.get("type") == "application/json"]


@pytest.fixture(scope="module", autouse=True)
def plotly_once(tmp_path_factory):
    """Compressed once for this file, and not in each test's cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SHARDGAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        packed = document._plotly()
        patched.setattr(document, "_plotly", lambda: packed)
        yield


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "home" / "of-mine" / "photos", "penalty.l2=1e-3")


def test_it_says_what_was_trained_and_what_came_out(run):
    words = Parsed(page([run])).words
    assert "A GAN (dcgan) of 28×28 grey images, trained on data/x with λ = 0.001." in words
    assert "D was shown 4,000 images (0.5 epochs), in 40 s of training." in words  # at 100 a second
    assert (
        "KID fell from 3 to 1 (kimg 1), and ended at 2, for 50 generated images against 50 held-out" in words
    )
    assert "Finished at kimg 4" in words
    assert "penalty.G.l2 0.001 0 " in words, "a setting, its value, and its default"
    assert words.index("penalty.G.l2") < words.index("Settings at their defaults") < words.index("optim.G.lr")


def test_what_went_wrong_is_counted_and_listed(run):
    write_events(
        run,
        {"event": "start", "strategy": "ddp", "world": 2, "precision": "no", "device": "CPU", "versions": {}},
        {"event": "warning", "cur_nimg": 2000, "title": "D has won", "text": f"See {run}/samples/x.png."},
        {"event": "stop", "cur_nimg": 3000, "reason": "by SIGTERM"},
        {"event": "error", "cur_nimg": 3000, "text": f"rank 1 failed: {run}/x"},
        {"event": "start", "cur_nimg": 3000, "strategy": "fsdp2", "world": 3, "precision": "bf16"},
    )
    (run / "changes.jsonl").write_text('{"cur_nimg": 1000, "key": "optim.G.lr", "old": 1, "new": 2}\n')
    words = Parsed(page([run])).words
    order = ["kimg 1 Setting changed: optim.G.lr: 1 → 2", "kimg 2 D has won: See …/x.png."]
    order += [
        "kimg 3 Stopped by SIGTERM",
        "kimg 3 Failed: rank 1 failed: …/x",
        "kimg 3 Started again",
        "in all 3 updates of D skipped",
    ]
    places = [words.index(text) for text in order]
    assert places == sorted(places)
    assert "Some things went wrong, or were changed: 6, listed below." in words
    assert "fsdp2, 3 processes" in words and "bf16" in words and "ddp, 2" not in words
    assert "Nothing: no warning" not in words and "Not recorded" not in words


def test_what_has_often_been_stopped_and_resumed_is_one_trouble(run):
    """As every night by a cluster, which would hide the warning."""
    often: list[dict[str, object]] = [{"event": "start", "cur_nimg": 0}]
    for kimg in range(1, 8):
        often += [
            {"event": "stop", "cur_nimg": 1000 * kimg, "reason": "by SIGTERM"},
            {"event": "start", "cur_nimg": 1000 * kimg},
        ]
    often.insert(6, {"event": "warning", "cur_nimg": 2500, "title": "D has won", "text": "See it."})
    write_events(run, *often)
    words = Parsed(page([run])).words
    assert "kimg 7 Stopped and started again 7 times, the last time here" in words
    assert "kimg 2.5 D has won: See it." in words
    assert "Stopped by" not in words and "Started again, and" not in words
    assert "Some things went wrong, or were changed: 3, listed below." in words  # D's updates skipped, too
    write_events(run, *often, {"event": "stop", "cur_nimg": 7500, "reason": "by SIGINT"})
    assert "kimg 7.5 Stopped by SIGINT" in Parsed(page([run])).words


def test_nothing_of_this_machine_leaves_it(run, tmp_path, monkeypatch):
    """Neither folders nor credentials, wherever they stand."""
    text = (run / "config.yaml").read_text()
    text = text.replace("train: data/x", "train: s3://me:hunter2@store/photos?token=hunter2")
    text = text.replace("init: null", f"init: '{run.parent}/an older run'").replace(
        "tags: []", f"tags: [{run}]"
    )
    (run / "config.yaml").write_text(text)
    write_events(
        run, {"event": "warning", "title": "x", "text": f"GET https://u:hunter2@h/x: {run.parent}/y"}
    )
    found = page([run])
    assert "hunter2" not in found and "s3://store/photos" in found
    assert str(tmp_path) not in found and "of-mine" not in found
    assert "…/an older run" in found


def test_texts_of_others_stay_texts(tmp_path):
    """In a folder's name, a setting, and a warning: nothing is run, and the page's own policy forbids it."""
    folder = write_run(tmp_path / "<img src=y onerror=alert(2)>", "run.name=x", "track.group=plain")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("group: plain", f"group: {json.dumps(EVIL)}"))
    write_events(folder, {"event": "warning", "title": EVIL, "text": EVIL})
    harmless, parsed = Parsed(page([write_run(tmp_path / "plain")])), Parsed(page([folder]))
    for tag in ("script", "img"):
        assert count(parsed, tag) == count(harmless, tag)
    assert not [a for _, a in parsed.tags if any(name.startswith("on") for name in a)]
    assert EVIL in parsed.text and "<img src=y onerror=alert(2)>" in parsed.text
    several = Parsed(page([folder, tmp_path / "plain"]))
    assert sum("onerror" in json.dumps(data) for data in several.data) > 1, "as the name of a curve"
    assert count(several, "img") == 2 * count(harmless, "img") + 2  # in front, and in each one's details


def count(parsed: Parsed, tag: str) -> int:
    return sum(name == tag for name, _ in parsed.tags)


def test_it_loads_nothing_and_only_its_own_two_scripts_may_run(run):
    parsed = Parsed(page([run]))
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    css = re.findall(r"<style>(.*?)</style>", page([run]), re.DOTALL)
    assert len(css) == 1 and "url(" not in css[0] and "@import" not in css[0]
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data: blob:;")
    ours = [text for a, text in parsed.scripts if "type" not in a]
    plotly = next(text for a, text in parsed.scripts if a.get("id") == "plotly")
    allowed = re.search("script-src ([^;]*);", policy)[1].split()
    scripts = [*(text.encode() for text in ours), gzip.decompress(base64.b64decode(plotly))]
    assert allowed == [f"'sha256-{base64.b64encode(hashlib.sha256(s).digest()).decode()}'" for s in scripts]


def test_the_history_is_bounded_and_keeps_both_ends(tmp_path):
    parsed = Parsed(page([run := write_run(tmp_path / "long", grids=55)]))
    kimgs = [frame["kimg"] for frame in next(data for data in parsed.data if isinstance(data, list))]
    assert len(kimgs) == 39 and kimgs[0] == 0 and kimgs == sorted(kimgs)
    assert max(b - a for a, b in pairwise(kimgs)) <= 2 * 0.04 + 1e-9, "evenly thinned out"
    last = next(a["src"] for tag, a in parsed.tags if tag == "img")
    picture = Image.open(io.BytesIO(base64.b64decode(last.partition(",")[2])))
    newest = Image.open(run / "samples" / "fakes000054.png").convert("RGB")
    assert picture.format == "WEBP" and picture.size == newest.size
    of = lambda image: sum(image.convert("L").resize((8, 8), Image.Resampling.BOX).tobytes()[:8])  # noqa: E731
    assert abs(of(picture) - of(newest)) < 64, "it is that grid"


def test_several_runs_are_compared(tmp_path):
    one = write_run(tmp_path / "one", "penalty.l2=0")
    two = write_run(tmp_path / "two", "penalty.l2=0.1", scores=(3.0, 0.5))
    parsed = Parsed(page([one, two]))
    assert "They differ in penalty.l2." in parsed.words
    assert "KID when last scored, the best first: two 0.5 at kimg 1, one 2 at kimg 2, for 50" in parsed.words
    charts = {d["title"]: d for d in parsed.data if isinstance(d, dict) and "traces" in d}
    assert [trace["name"] for trace in charts["KID"]["traces"]] == ["one", "two"]
    assert charts["KID"]["traces"][0]["x"] == [0, 1, 2] and charts["KID"]["traces"][0]["y"] == [3, 1, 2]
    assert charts["Loss, without penalties: D"]["traces"][1]["y"] == [1.25] * 4
    assert charts["Loss, without penalties: G"]["traces"][0]["y"] == [None] * 4, "JSON has no nan"
    (two / "reference.json").write_text('{"heldout": {"images": 51, "features": ["efflite0", "1"]}}')
    assert "They were scored against different images, and do not compare." in Parsed(page([one, two])).words


def test_scores_on_other_data_are_not_mixed(tmp_path):
    run = write_run(tmp_path / "one", scores=(3.0, 0.5, 2.0, 1.5, 1.75))
    (run / "changes.jsonl").write_text('{"cur_nimg": 2000, "key": "data", "old": "a1", "new": "b2"}\n')
    words = Parsed(page([run])).words
    assert (
        "KID did not fall from 1.5, and ended at 1.75, for 50 generated images against 50 held-out" in words
    )
    assert (
        "never trained on in" not in words and "Other data: a1 → b2; earlier scores do not compare" in words
    )
    history = read_history(run)
    assert str(history.lowest("Metrics/kid_efflite0")) == "1.5 at kimg 3"
    assert str(history.last("Metrics/kid_efflite0")) == "1.75 at kimg 4"
    old = write_run(tmp_path / "old", scores=(3.0, 0.5))
    shutil.copy(run / "changes.jsonl", old)
    assert read_history(old).last("Metrics/kid_efflite0") is None
    assert [scores_of(run, at)[0].get("Metrics/kid_efflite0") for at in (1000, 3000)] == [None, 1.5]


def test_a_run_that_began_with_others_weights_may_have_seen_the_held_out_images(tmp_path):
    assert "never trained on" in page([write_run(tmp_path / "plain")])
    other = page([write_run(tmp_path / "one", "run.init=runs/old", "data.train=../../srv/secret/photos")])
    assert "never trained on" not in other
    assert "trained on …/photos with" in other and "secret" not in other  # names no folders of this machine


def test_a_failure_names_no_machine(tmp_path):
    run = write_run(tmp_path / "one")
    text = "rank 1 (node-7.my.org, pid 28571) is gone. Last seen at kimg 3, in an update."
    (run / "events.jsonl").write_text(
        json.dumps({"cur_nimg": 3000, "time": 1e9, "event": "error", "text": text}) + "\n"
    )
    assert "Failed: rank 1 is gone. Last seen at kimg 3" in Parsed(page([run])).words


def test_runs_scored_at_other_times_are_compared(tmp_path):
    """A run that was stopped may have been scored before it had trained."""
    one = write_run(tmp_path / "one", scores=(3.0,))
    two = write_run(tmp_path / "two", scores=(4.0, 3.8, 3.6, 3.4, 3.2))
    words = Parsed(page([one, two])).words
    assert "KID when last scored, the best first: one 3 at kimg 0, two 3.2 at kimg 4, for 50" in words
    assert "3 at kimg 0 (3)" in words and "3.2 (3.2)" in words
    three = write_run(tmp_path / "three", scores=(4.0, 3.8, 3.6, 3.4, 3.0))
    assert "KID at the end, the best first: three 3, two 3.2, for 50" in Parsed(page([two, three])).words


def test_scores_against_other_images_are_not_put_in_order(tmp_path):
    """Their numbers may be the same."""
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    about = {"index": "other", "images": 50, "features": ["efflite0", "1"]}
    (two / "reference.json").write_text(json.dumps({"heldout": about}))
    assert "They were scored against different images, and do not compare." in Parsed(page([one, two])).words


def test_only_the_same_score_is_compared(tmp_path):
    one = write_run(tmp_path / "one", "score.metrics=[pr]", scores=())
    two = write_run(tmp_path / "two", "score.metrics=[dc]", scores=())
    add(one, "Metrics/precision_efflite0", 0.5)
    add(two, "Metrics/coverage_efflite0", 0.6)
    words = Parsed(page([one, two])).words
    assert "These runs have no score in common to be compared by." in words and "best first" not in words


def test_near_copies_are_no_best_score(run):
    add(run, "Metrics/nn_copies_efflite0", 0.75)
    words = Parsed(page([run])).words
    assert "Copies of training images 0.75 – 0.75" in words and "Precision" not in words
    add(run, "Metrics/precision_efflite0", 0.25)
    assert "Precision ↑ 0.25 0.25 kimg 4 0.25" in Parsed(page([run])).words


def test_a_distance_is_not_drawn_among_shares(run):
    add(run, "Metrics/fid50k_full", 80.0)
    add(run, "Metrics/precision_efflite0", 0.5)
    lines = {panel.title: [name for name, _ in panel.lines] for panel in panels_of([read_history(run)])}
    assert lines["FID of 50,000"] == ["FID of 50,000"] and lines["Other scores"] == ["Precision"]


def test_skips_of_every_turn_of_D_are_counted(tmp_path):
    run = write_run(tmp_path / "run", "loss.D_steps=2")
    assert "in all 3 updates of D skipped" in Parsed(page([run])).words, "0.3 of the ten turns of a kimg"


def add(run: Path, chart: str, value: float) -> None:
    """To the last row of a run."""
    file = run / "metrics.jsonl"
    *rows, last = file.read_text().splitlines()
    file.write_text("\n".join([*rows, json.dumps(json.loads(last) | {chart: value})]) + "\n")


def test_what_is_no_run_is_refused(tmp_path, run, monkeypatch):
    (tmp_path / "empty").mkdir()
    for folders in ([tmp_path / "empty"], [run, tmp_path / "nowhere"]):
        with pytest.raises(UserError, match=r"no metrics\.jsonl"):
            page(folders)
    with pytest.raises(UserError, match="cannot be written"):
        write([run], run / "DONE" / "x.html")
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    with pytest.raises(UserError, match=r"pip install 'shardgan\[page\]'"):
        write([run], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_run_that_ends_has_its_page_and_a_trial_has_none(run, monkeypatch):
    assert write_beside(run) == run / PAGE and (run / PAGE).stat().st_size > 1_000_000
    trial = write_run(run.parent / "chosen" / "trials" / "a")
    (trial.parent.parent / "selection.json").write_text("{}")
    assert write_beside(trial) is None and not (trial / PAGE).exists()
    monkeypatch.setattr(document, "find_spec", lambda _: None)  # plotly is not installed
    (run / PAGE).unlink()
    assert write_beside(run) is None and not (run / PAGE).exists()


def test_paths_lose_their_folders_and_other_texts_nothing(tmp_path, monkeypatch):
    (tmp_path / "my work").mkdir()
    monkeypatch.chdir(tmp_path / "my work")
    for text, kept in {
        "/home/me/runs/mine": "…/mine",
        "(/tmp/x/y.png) or '~/z/w', and inception:/home/w.pt": "(…/y.png) or '…/w', and inception:…/w.pt",
        "file:///home/me/x s3://k:pw@h/p": "…/x s3://h/p",
        "data/x, 1/2, and/or, λ_G / λ_D": "data/x, 1/2, and/or, λ_G / λ_D",
        "not found: '/srv/my data/x y.png'": "not found: '…/x y.png'",
        "it's '/x' and isn't /y/z": "it's '…/x' and isn't …/z",
        f"{tmp_path}/my work/runs/mine is full": "…/mine is full",
    }.items():
        assert anonymous(text) == kept


def test_a_full_disk_does_not_keep_a_run_from_recording(tmp_path):
    events.record(tmp_path / "gone", "warning", 3, title="x")  # no error
    events.record(tmp_path, "warning", 3, title="x")
    assert json.loads((tmp_path / events.EVENTS).read_text())["cur_nimg"] == 3


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_it_without_complaint(tmp_path, run):
    """It would complain of anything that the policy of the page forbids: to load what is not in it."""
    write_events(run, {"event": "warning", "title": EVIL, "text": EVIL})
    write([run, write_run(tmp_path / "<b>other")], file := tmp_path / "page.html")
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    line += [
        f"--user-data-dir={tmp_path}/profile",
        "--virtual-time-budget=20000",
        "--dump-dom",
        file.as_uri(),
    ]
    shown = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr, [li for li in shown.stderr.splitlines() if "CONSOLE" in li]
    dom = Parsed(shown.stdout)
    assert next(a for tag, a in dom.tags if tag == "html")["class"] == "", "the curves have taken their place"
    drawn = [a for tag, a in dom.tags if tag == "svg" and "main-svg" in (a.get("class") or "")]
    charts = [a for tag, a in dom.tags if a.get("class") == "chart"]
    assert len(drawn) >= len(charts) > 3
    assert "<title>photos, &lt;b&gt;other</title>" in shown.stdout, "no script of others ran"
