"""What runs inside a rank."""

import os

from pipeline import shadows

STARTED_BY = os.getppid()  # noted before anything that takes long: if it changes, whoever started us is gone
shadows.refuse(shadows.on_the_path())
