"""The import graph of pipeline/ and launch/, read from the code. To draw it: `python tests/import_graph.py`.

A room is a package, or a file beside packages (`pipeline/step.py`). A room stands one floor above the highest
room that it imports, and a file likewise within its room: every import points down.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
WIDTH = 118
Graph = Mapping[str, set[str]]  # what → all that it imports


def sources(root: Path = ROOT) -> dict[str, str]:
    """Module → source, of every file in pipeline/ and launch/."""
    files = sorted(f for top in ("pipeline", "launch") for f in (root / top).rglob("*.py"))
    return {module_of(f.relative_to(root)): f.read_text() for f in files}


def module_of(file: Path) -> str:
    return ".".join(file.with_suffix("").parts)


def file_graph(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """Which file imports which, wherever in it the import stands and whatever it is for."""
    return {name: set(_imported(name, source, modules)) - {name} for name, source in modules.items()}


def _imported(name: str, source: str, modules: Mapping[str, str]) -> Iterator[str]:
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{module}.{alias.name}" for alias in node.names]
        for each in found:
            parts = each.split(".")
            tails = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            files = (file for tail in tails for file in (tail, f"{tail}.__init__") if file in modules)
            yield from list(files)[:1]


def room_of(module: str) -> str:
    """The package of a file; a file beside packages is a room of its own. So is each file of
    pipeline/api: some are the installed command, above everything, and some are needed everywhere."""
    parts = module.split(".")
    if len(parts) == 2 or parts[1] == "api":
        return f"{'/'.join(parts)}.py"
    return f"{parts[0]}/{parts[1]}/"


def room_graph(files: Graph) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {room_of(name): set() for name in files}
    for name, imported in files.items():
        rooms[room_of(name)] |= {room_of(other) for other in imported} - {room_of(name)}
    return rooms


def circle(graph: Graph) -> list[str]:
    """Files or rooms that import each other in a circle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def floors(graph: Graph) -> list[list[str]]:
    """From the top floor down. Raises CycleError if there is no top."""
    height: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        height[name] = max((height[other] + 1 for other in graph.get(name, ())), default=0)
    return [
        sorted(n for n, h in height.items() if h == floor) for floor in range(max(height.values()), -1, -1)
    ]


def drawn(modules: Mapping[str, str]) -> str:
    """The rooms from the top floor down, each package with its files from the top down."""
    files, lines = file_graph(modules), []
    stack = floors(room_graph(files))
    for number, floor in zip(range(len(stack), 0, -1), stack, strict=True):
        for room in (room for room in floor if room.endswith("/")):
            lines += _wrapped(f"{number:2}  {room:21} {_inside(room, files)}")
        beside = [room for room in floor if not room.endswith("/")]
        lines += _wrapped(f"{number:2}  {', '.join(beside)}") if beside else []
    return "\n".join(lines)


def _inside(room: str, files: Graph) -> str:
    mine = {name for name in files if room_of(name) == room and not name.endswith(".__init__")}
    stack = floors({name: files[name] & mine for name in mine})
    return " > ".join(
        ", ".join(name.split(".", 2)[-1].replace(".", "/") for name in names) for names in stack
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * 26, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    print(drawn(sources()))
