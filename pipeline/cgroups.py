"""The Linux control groups of this process: a container's, a Kubernetes pod's, a Slurm job's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_OWN, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def folders(controller: str) -> Iterator[tuple[Path, bool]]:
    """Those of the group that limits `controller` ("cpu", "memory") and of each group around it, innermost
    first, and whether they are version 1's, whose files have other names. None where there are no groups."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)  # of version 2 there are no controllers in it
        if controllers and controller not in controllers.split(","):
            continue
        mounted = _ROOT / controllers
        group = mounted / path.lstrip("/")  # a container sees its own as the root, wherever the host has it
        for folder in (group, *group.parents):
            yield folder, bool(controllers)
            if folder == mounted:
                break
