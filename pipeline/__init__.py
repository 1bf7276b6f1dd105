"""What runs inside a rank."""

import os

STARTED_BY = os.getppid()  # noted before anything that takes long: if it changes, whoever started us is gone
