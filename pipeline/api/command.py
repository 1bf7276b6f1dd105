"""The `shardgan` command, even if PYTHONPATH hides our modules or Python's."""

from __future__ import annotations

import os
import sys

from . import shadows


def main() -> None:
    """Search folders of PYTHONPATH that hide a module last, and run the command."""
    given = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    hiding = [folder for folder in given if shadows.shadows_in(folder, shadows.ANYWHERE)]
    if hiding:
        kept = os.pathsep.join(folder for folder in given if folder not in hiding)
        environment = os.environ | {"PYTHONPATH": kept, shadows.SEARCHED_LAST: os.pathsep.join(hiding)}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    from launch.cli import main as command

    command()
