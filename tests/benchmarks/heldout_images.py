"""The first held-out images of a run, as PNGs: `python tests/benchmarks/heldout_images.py RUN OUT COUNT`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from pipeline.data.index import load_index
from pipeline.data.plan import split_of
from pipeline.data.stream import heldout_batches
from pipeline.run.export import load_run

run, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config, _, state = load_run(run)
index = load_index(config.data.train, print, config.data.remote)
split = split_of(config, index)
if (split.training().fingerprint, index.fingerprint) != (state.plan, state.data):
    sys.exit(f"{config.data.train} is not what {run} was trained on.")
batch, _ = next(heldout_batches(index, split.heldout(), config.data, batch=count, limit=count))
out.mkdir(parents=True, exist_ok=True)
for number, pixels in enumerate(batch.images):
    image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
    image.save(out / f"heldout-{number:02}.png")
