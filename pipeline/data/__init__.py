"""Data: which samples there are (index), which one when (plan), and their bytes as batches (stream)."""

import os

# Read when webdataset is imported, here or by a user's own stages: no pickles, no shell commands.
os.environ.setdefault("WDS_SECURE", "1")
