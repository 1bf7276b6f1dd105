"""ShardGAN from Python: `import shardgan`, in a script, a notebook or a thread.

Installed as `shardgan`: a name that is only ours, unlike `pipeline` and `launch`. It imports what it needs
when it is called, so `import shardgan` is quick; `pipeline` imports this file too, before any other.
"""

from __future__ import annotations

from . import shadows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from pipeline.parallel.launched import Precision, Strategy

__all__ = ["train"]


def train(
    config: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    procs: int = 1,
    strategy: Strategy | None = None,
    mixed_precision: Precision = "no",
) -> Path:
    """Train what a config describes, as `shardgan train` does; the same call again resumes.

    Args:
        config: a YAML file, or the name of a published one, such as "fashion-mnist".
        settings: override the config, as in {"penalty.l2": 1e-3, "data.train": "data/photos"}.
        procs: processes. One: this one, so `G.kind` may name a class of a notebook, "__main__:MyG".
            Several are started, and end with this one; their output is printed here.
        strategy: single, ddp, fsdp2, zero1, zero2 or zero3. Default: ddp; for one process single.
        mixed_precision: no, bf16 or fp16.

    Returns the run folder. A finished run is left as it is.

    Raises UserError (a ValueError) for what you can mend; its message says how. Raises KeyboardInterrupt
    after Ctrl-C, or "interrupt" in a notebook, once the run is saved.
    """
    shadows.refuse_import()
    from . import training

    return training.train(config, settings or {}, procs, strategy, mixed_precision)
