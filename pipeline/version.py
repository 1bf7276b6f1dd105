"""Which version of this package is at work."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """As installed; "unknown" for a source folder on PYTHONPATH, as in a container's image without us."""
    try:
        return version("shardgan")
    except PackageNotFoundError:
        return "unknown"
