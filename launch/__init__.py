"""The shardgan command, and how the processes of a training start and meet."""

import importlib.util
import os
import signal
import sys


def _refuse_another_pipeline() -> None:
    """End this process if another `pipeline` would be imported than the package next to this one."""
    found = importlib.util.find_spec("pipeline")
    places = list(found.submodule_search_locations or [str(found.origin)]) if found is not None else []
    ours = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "pipeline")
    if ours in map(os.path.abspath, places):
        return
    sys.stderr.write(
        f"error: {next(iter(places), 'nothing')} hides ShardGAN's own module `pipeline` ({ours}). Rename "
        "it, or take its folder off PYTHONPATH.\n"
    )
    sys.exit(2)


if (
    os.path.basename(sys.argv[0]) == "shardgan"
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    # Until `cli.main` handles Ctrl-C, it ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
_refuse_another_pipeline()
