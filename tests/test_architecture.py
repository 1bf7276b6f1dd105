"""The arrows between the packages run one way: read from the imports, wherever in a file and whatever for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import import_graph
import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p.relative_to(ROOT) for top in ("pipeline", "launch") for p in (ROOT / top).rglob("*.py"))

# What a file may import of ours. The longest prefix that fits a module decides; its own package is allowed.
ARROWS = {
    "pipeline.cgroups": (),
    "pipeline.cores": ("pipeline.cgroups",),
    "pipeline.credentials": (),
    "pipeline.durable": (),
    "pipeline.errors": (),
    "pipeline.wording": (),
    "pipeline.config_layers": ("pipeline.credentials", "pipeline.errors", "pipeline.wording"),
    "pipeline.setting_types": (),
    "pipeline.settings": ("pipeline.setting_types",),
    "pipeline.config": (
        "pipeline.credentials",
        "pipeline.errors",
        "pipeline.config_layers",
        "pipeline.setting_types",
        "pipeline.settings",
    ),
    "pipeline.console": (),
    "pipeline.garbage": (),
    "pipeline.heap": (),
    "pipeline.interrupts": (),
    "pipeline.borrowed": ("pipeline.heap",),
    "pipeline.holder": (),
    "pipeline.folders": ("pipeline.errors",),
    "pipeline.lock": ("pipeline.errors", "pipeline.holder"),
    "pipeline.plugins": ("pipeline.api.shadows", "pipeline.config"),
    "pipeline.api": ("launch", "pipeline"),  # what is installed lies above everything
    "pipeline.api.shadows": (),
    "pipeline.gan": ("pipeline.config", "pipeline.plugins"),
    "pipeline.data": (
        "pipeline.borrowed",
        "pipeline.cgroups",
        "pipeline.config",
        "pipeline.console",
        "pipeline.cores",
        "pipeline.credentials",
        "pipeline.durable",
        "pipeline.folders",
        "pipeline.interrupts",
        "pipeline.lock",
        "pipeline.plugins",
        "pipeline.wording",
    ),
    "pipeline.parallel": (
        "pipeline.config",
        "pipeline.console",
        "pipeline.errors",
        "pipeline.garbage",
        "pipeline.heap",
        "pipeline.holder",
        "pipeline.wording",
        "pipeline.gan.penalised",
        "pipeline.gan.sync_batch_norm",
        "pipeline.gan.draws.Drawn",
        "pipeline.gan.draws.Samples",
        "pipeline.gan.schedules.Rates",
        "pipeline.gan.schedules.is_used",
    ),
    "pipeline.run": (
        "pipeline.STOP_SIGNALS",
        "pipeline.config",
        "pipeline.cores",
        "pipeline.credentials",
        "pipeline.durable",
        "pipeline.errors",
        "pipeline.folders",
        "pipeline.lock",
        "pipeline.plugins",
        "pipeline.wording",
        "pipeline.gan",
        "pipeline.data",
        "pipeline.parallel",
        "pipeline.players.Gan",
    ),
    "pipeline.step": (  # the maths, and the types of what it is handed
        "pipeline.config",
        "pipeline.gan",
        "pipeline.data.stream.Batch",
        "pipeline.players.Gan",
        "pipeline.run.stats.Stats",
    ),
    "pipeline.players": ("pipeline.config", "pipeline.gan", "pipeline.parallel"),
    "pipeline.loop": ("pipeline",),
    "pipeline.train": ("pipeline",),
    "launch": ("launch", "pipeline"),
}
OWNERS = {  # who may import what is not for everyone above it
    "pipeline.data.prepare": ("pipeline.data.prepare", "launch", "pipeline.api"),  # never what runs in a rank
    "torch.distributed": ("pipeline.parallel",),
    "accelerate": ("pipeline.parallel",),
    "deepspeed": ("pipeline.parallel",),
    "tensorboard": ("pipeline.run.tensorboard",),
    "wandb": tuple(
        f"pipeline.run.{name}" for name in ("tracker", "wandb_files", "wandb_mode", "wandb_offline")
    ),
}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def name_of(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path, tree: ast.AST) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Modules, with the names taken from them appended: `from pipeline import x` imports pipeline.x."""
    package = name_of(file).split(".") if file.name == "__init__.py" else name_of(file).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node) for alias in node.names)


def wrong_arrows(file: Path, source: str) -> list[str]:
    """Imports of `file` that the tables above do not allow, as readable lines."""
    tree, me = ast.parse(source), name_of(file)
    # A package's own __init__ lies above all its parts, and imports none of them.
    layer = max((p for p in ARROWS if within(me, p)), key=len, default=me)
    allowed = (layer, *ARROWS.get(layer, ()))
    wrong = []
    for module, node in imports(file, tree):
        ours = within(module, "pipeline") or within(module, "launch")
        if ours and not any(within(module, p) for p in allowed):
            wrong.append(f"{file}:{node.lineno} {me} may not import {module}")
        for owned, owners in OWNERS.items():
            if within(module, owned) and not any(within(me, owner) for owner in owners):
                wrong.append(f"{file}:{node.lineno} only {', '.join(owners)} may import {owned}")
    return wrong


def long_functions(file: Path, source: str, most: int) -> list[str]:
    found = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    sized = ((n, (n.end_lineno or n.lineno) - n.lineno + 1) for n in found)
    return [f"{file}:{n.lineno} {n.name} has {lines} lines" for n, lines in sized if lines > most]


def test_every_file_is_looked_at():
    assert Path("pipeline/config.py") in FILES and Path("launch/__init__.py") in FILES


def test_arrows_run_one_way():
    assert not [line for file in FILES for line in wrong_arrows(file, (ROOT / file).read_text())]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pipeline/config.py", "import pipeline.gan"),
        ("pipeline/config.py", "from pipeline import gan"),
        ("pipeline/gan/losses.py", "from ..data import index"),
        ("pipeline/gan/losses.py", "def f():\n    from pipeline.parallel.ranks import Ranks"),
        ("pipeline/data/stream.py", "import torch.distributed as dist"),
        ("pipeline/data/stream.py", "from torch import distributed"),
        ("pipeline/data/stream.py", "from pipeline.data.prepare.writer import prepare"),
        ("pipeline/train.py", "from pipeline.data import prepare"),
        ("pipeline/parallel/ddp.py", "from pipeline.gan.losses import d"),
        ("pipeline/parallel/ddp.py", "from pipeline.run.checkpoint import save"),
        ("pipeline/run/evaluate.py", "from accelerate import PartialState"),
        ("pipeline/run/evaluate.py", "import pipeline.step"),
        ("pipeline/run/grid.py", "import wandb"),
        ("pipeline/step.py", "from pipeline.loop import train"),
        ("pipeline/step.py", "from pipeline.data.stream import batches"),
        ("pipeline/step.py", "from pipeline.parallel.ranks import Ranks"),
        ("pipeline/train.py", "from launch import cli"),
        ("pipeline/train.py", "import deepspeed.ops"),
        ("pipeline/gan/losses.py", "if TYPE_CHECKING:\n    from pipeline.step import train_step"),
        ("pipeline/run/state.py", "if TYPE_CHECKING:\n    from pipeline.step import train_step"),
    ],
)
def test_a_wrong_arrow_is_seen(file, source):
    assert wrong_arrows(Path(file), source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pipeline/gan/dcgan.py", "from pipeline.config import UserError\nfrom . import losses"),
        ("pipeline/parallel/ddp.py", "import torch.distributed, accelerate, pipeline.config"),
        ("pipeline/run/tracker.py", "import wandb"),
        ("pipeline/step.py", "from pipeline.run.stats import Stats"),
        ("pipeline/run/resume.py", "from pipeline.players import Gan"),
        ("pipeline/loop.py", "from pipeline.step import train_step\nfrom pipeline.run.stats import Stats"),
        ("launch/train.py", "from pipeline.config import load\nfrom launch import doctor"),
    ],
)
def test_a_right_arrow_is_not(file, source):
    assert not wrong_arrows(Path(file), source)


def test_files_are_named_after_what_they_do():
    vague = {"util", "utils", "common", "misc", "helper", "helpers"}
    assert not [file for file in FILES if vague & set(file.with_suffix("").parts)]


def test_files_and_functions_are_short_enough_to_read():
    too_long = [str(f) for f in FILES if len((ROOT / f).read_text().splitlines()) > 350]
    too_long += [line for f in FILES for line in long_functions(f, (ROOT / f).read_text(), most=60)]
    assert not too_long
    assert long_functions(Path("x.py"), "def f():\n" + "    pass\n" * 60, most=60)


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports them by that name alone."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_no_imports_in_a_circle():
    files = import_graph.file_graph(import_graph.sources())
    assert not import_graph.circle(files)
    assert not import_graph.circle(import_graph.room_graph(files))


@pytest.mark.parametrize(
    ("file", "source", "within_a_package"),
    [
        ("pipeline.parallel.fragments", "from pipeline.parallel.engine import Engine", True),
        ("pipeline.data.tar", "def f():\n    from . import stream", True),
        ("pipeline.run.state", "if TYPE_CHECKING:\n    from pipeline.step import train_step", False),
        ("pipeline.config", "import launch.cli", False),
    ],
)
def test_a_circle_is_seen(file, source, within_a_package):
    modules = import_graph.sources()
    files = import_graph.file_graph(modules | {file: f"{modules[file]}\n{source}"})
    assert bool(import_graph.circle(files)) or not within_a_package
    assert bool(import_graph.circle(import_graph.room_graph(files))) or within_a_package


def test_the_import_graph_is_the_one_in_the_readme():
    """`python tests/import_graph.py` prints it."""
    graph = import_graph.drawn(import_graph.sources())
    print(graph)
    assert graph in (ROOT / "pipeline" / "README.md").read_text()


def test_the_walks_in_the_readme_name_what_there_is():
    """Every `folder/file.py`, `function()`, `Class`, `Class.method()` and `Class.attribute`."""
    walks = (ROOT / "pipeline" / "README.md").read_text().split("## Four walks")[1].split("\n## ")[0]
    sources = {f.as_posix(): (ROOT / f).read_text() for f in FILES}
    everything = "\n".join(sources.values())
    names = re.findall(r"`([^`]+)`", walks)
    assert len(names) > 50
    for name in names:
        if name.endswith(".py"):
            assert name in sources or f"pipeline/{name}" in sources, name
        elif name.endswith("()"):
            owner, _, method = name.removesuffix("()").rpartition(".")
            assert f"def {method}(" in everything and (not owner or f"class {owner}" in everything), name
        elif name.istitle() or (name[0].isupper() and not name.isupper() and "/" not in name):
            owner, _, member = name.partition(".")
            assert f"class {owner}" in everything or name == "Loss/D/loss", name
            assert not member or f"{member}:" in everything, name


def test_the_core_stays_small():
    lines = {
        name: (ROOT / "pipeline" / name).read_text().splitlines() for name in ("train.py", "run/session.py")
    }
    ours = [line for line in lines["train.py"] if re.match(r"(from|import) pipeline", line)]
    assert len(lines["train.py"]) <= 150 and len(ours) <= 18
    session = next(
        n for n in ast.parse("\n".join(lines["run/session.py"])).body if isinstance(n, ast.ClassDef)
    )
    assert session.name == "Session" and session.end_lineno - session.lineno < 180
    assert len([f for f in FILES if f.parent == Path("pipeline/data")]) <= 16


DIALECT = re.compile(
    r"\b(anew|noted|cure[ds]?|told|tak(e|es|en|ing) up|elsewhere|stand-ins?|spares?|unseen|sheets?"
    r"|(is|are) seen to|by then|be it|goes? on|gone on|in the making|sound ones?|hand(s|ed)? in"
    r"|lets? go of|settings: Config)\b",
    re.IGNORECASE,
)


def dialect(text: str) -> list[str]:
    return [line for line in text.splitlines() if DIALECT.search(line)]


def test_the_field_s_words_are_used():
    """resume, intact, sample grid, replacement, remote, held-out; and plain English besides."""
    folders = [f for top in ("pipeline", "launch", "slurm", "configs") for f in (ROOT / top).rglob("*.*")]
    texts = [f for f in folders if f.suffix in (".py", ".sh", ".sbatch", ".yaml", ".md")]
    texts += [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / ".github").glob("*.md")]
    assert len(texts) > 150
    assert {str(f): found for f in texts if (found := dialect(f.read_text()))} == {}
    assert dialect("Errors that only waiting cures are told anew.") and not dialect(
        "A retold story is spared."
    )
