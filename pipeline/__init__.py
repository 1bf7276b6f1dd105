"""What runs inside a rank."""

import signal
import sys

if "pipeline.train" in sys.orig_argv:  # python -m pipeline.train: a signal waits until train.py can answer it
    signal.pthread_sigmask(
        signal.SIG_BLOCK,
        (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2),
    )
