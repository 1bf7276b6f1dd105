"""Data: which samples there are (index), which one when (plan), and their bytes as batches (stream)."""

import os
import sys

# Read when webdataset is imported, here or by a user's own stages: no pickles, no shell commands.
if os.environ.setdefault("WDS_SECURE", "1") != "0" and "webdataset.utils" in sys.modules:
    sys.modules["webdataset.utils"].enforce_security = True  # type: ignore[attr-defined]  # it was, before
