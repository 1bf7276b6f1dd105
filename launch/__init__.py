"""The `shardgan` command, and how the processes that train are started."""

import signal
import sys
from pathlib import Path

if Path(sys.argv[0]).name == "shardgan" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `cli.main` can answer Ctrl-C, it ends the process as it ends any other: without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
