"""`shardgan project` on a conditional and on a plain run whose G is as it was initialised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

from launch.project import project
