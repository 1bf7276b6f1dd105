"""A file system without `flock`: what programs that are started with this environment meet everywhere."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = "#include <errno.h>\nint flock(int file, int operation) { errno = %s; return -1; }\n"
ERRORS = ("ENOSYS", "ENOLCK", "EOPNOTSUPP", "EACCES")


def without_flock(folder: Path, error: str = "ENOSYS") -> dict[str, str]:
    """Environment variables; skips the test where nothing can be compiled."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    source, library = folder / f"{error}.c", folder / f"{error}.so"
    source.write_text(_SOURCE % error)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {"LD_PRELOAD": str(library)}
