"""gpu.md: the results of the GPU suite as tables for a README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """found: results by part, as suite.py writes them to gpu.json."""
    machine = found.get("surroundings", {}).get("figures", {})
    where = machine.get("GPU", "no GPU") if machine else "a machine that has not been looked at"
    count = f"{machine['GPUs']} x " if machine.get("GPUs", 0) > 1 else ""
    lines = [f"# Measured on {count}{where}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()), ""] if machine else []
    lines += ["| part | outcome | seconds | |", "|---|---|---:|---|"]
    for name, result in found.items():
        ranks = result.get("figures", {}).get("ranks")
        why = str(result.get("why") or (f"ranks: {ranks}" if ranks else ""))
        why = why.replace("\n", " ").replace("|", "\\|")[:300]
        lines.append(f"| {name} | {result['status']} | {result['seconds']:.0f} | {why} |")
    for name, result in found.items():
        if name != "surroundings" and result.get("figures"):
            lines += ["", f"## {name}", "", *table(result["figures"])]
    return "\n".join(lines) + "\n"


def table(figures: Mapping[str, Any]) -> list[str]:
    """Figures by name as a table; those that are figures by name themselves have a row each."""
    if not all(isinstance(value, Mapping) for value in figures.values()):
        return ["| | |", "|---|---:|", *(f"| {name} | {_cell(value)} |" for name, value in figures.items())]
    columns = list(dict.fromkeys(key for row in figures.values() for key in row))
    lines = [f"| | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
    lines += [
        f"| {name} | {' | '.join(_cell(row.get(c, '')) for c in columns)} |" for name, row in figures.items()
    ]
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 1e-3 else str(round(value, 4))
    return str(value)
