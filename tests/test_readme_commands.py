"""The commands in the READMEs, as far as they can be checked without running them."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("[a-z]*/README.md"))]


@pytest.mark.parametrize("readme", READMES)
def test_python_can_read_them(readme: str) -> None:
    for block in re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text("utf-8"), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("readme", READMES)
def test_bash_can_read_them(readme: str) -> None:
    """A function may not be called `select`, for example, which is a word of bash's own."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / readme).read_text("utf-8"), re.DOTALL):
        ended = subprocess.run(["bash", "-n"], check=False, input=block, capture_output=True, text=True)
        assert not ended.returncode, f"{ended.stderr}\n{block}"
