"""What runs inside a rank."""

import gc
import signal
import sys

from pipeline.api import shadows

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

shadows.refuse(shadows.on_the_path())
if "pipeline.train" in sys.orig_argv:  # python -m pipeline.train: a signal waits until train.py can answer it
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    gc.disable()  # until all is imported: see garbage.py
