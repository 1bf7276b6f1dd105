"""The scores that an export tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.run.exported import scores_of


def entry(at: int, images: int, against: str = "a", **scores: float) -> dict[str, Any]:
    found: dict[str, Any] = {"cur_nimg": at, "against": {"heldout": against}}
    found |= {f"Metrics/{name}_efflite0": value for name, value in scores.items()}
    return found | {"Metrics/efflite0_real_images": images}


def told(tmp_path: Path, *entries: dict[str, Any]) -> dict[str, float]:
    """Of the checkpoint at 1,000 images, without the counts."""
    (tmp_path / "scores.json").write_text(json.dumps(entries))
    scores, against = scores_of(tmp_path, 1000)
    assert against == {"heldout": entries[-1]["against"]["heldout"]}
    return {name: value for name, value in scores.items() if not name.endswith("_images")}


def test_those_of_earlier_calls_are_added_if_they_compare(tmp_path):
    earlier, last = entry(1000, 50, kid=2.0, fd=7.0), entry(1000, 50, kid=1.0)
    assert told(tmp_path, earlier, last) == {"Metrics/kid_efflite0": 1.0, "Metrics/fd_efflite0": 7.0}
    for other in (
        entry(1000, 40, fd=7.0),  # of fewer images
        entry(1000, 50, "b", fd=7.0),  # against others
        entry(2000, 50, fd=7.0),  # of another checkpoint
    ):
        assert told(tmp_path, other, last) == {"Metrics/kid_efflite0": 1.0}
