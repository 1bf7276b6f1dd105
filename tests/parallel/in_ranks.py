"""What the tests of this folder run in the ranks of one launch: `python -m in_ranks OUT EARLIER [CASE …]`.

The named cases of the parity matrix; some of them continued from the checkpoints that the launch before, of
another strategy or world, left in EARLIER; the Dirac-GAN; a record of what passes between the ranks; a run
that starts from another one; fp16; updates that are skipped; batch normalisation over all ranks; an
index on several machines; what FSDP2 gathers; compiled players; and, as it may end the training, a matrix
with known mistakes.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import compiled_pair
import dirac
import gathered
import half
import machines
import mutant
import skips
import starts
import sync_norm
import wire
from device_thread import device_thread
from safetensors.torch import save_file

from launch.selfcheck import parity
from pipeline.console import end_process

# Where a thread of its own differentiates, as on a GPU; in the others the one that trains does, as on a CPU.
DEVICE_THREAD = ("fsdp2-2", "zero2-2", "zero3-2", "ddp-3")
# Moments, steps; buffers that training moves; every family.
CONTINUED = ("adam-l2-clipped-2", "spectral", *sorted(parity.FAMILIES))


def main(out: Path, earlier: Path | None, chosen: list[str]) -> None:
    ranks = parity.join()
    cases = parity.cases(ranks.world, ranks.strategy, thorough=True)
    cases = [case for case in cases if case.name in chosen]
    with device_thread() if f"{ranks.strategy}-{ranks.world}" in DEVICE_THREAD else nullcontext():
        parity.train_all(cases, ranks, out)
        for case in cases if earlier else ():
            left = earlier / "checkpoints" / case.name
            if case.name in CONTINUED and left.exists():
                tensors = parity.resume(case, ranks, left)
                if ranks.main:
                    save_file(tensors, out / f"continued-{case.name}.safetensors")
    found = {f"dirac-{game}.json": dirac.train(ranks, game) for game in dirac.SHRINKS}
    found["wire.json"], found["sync_norm.json"] = wire.record(ranks), sync_norm.record(ranks)
    found["starts.json"] = starts.record(ranks, out)
    found["overflow.json"], found["machines.json"] = half.train(ranks, out), machines.record(ranks, out)
    found["skips.json"], found["settled.json"] = skips.record(ranks), skips.settled(ranks)
    found["idle.json"] = skips.idle(ranks)
    if ranks.strategy in ("fsdp2", "hsdp"):
        found["gathered.json"] = {
            "kept": gathered.record(ranks, keep=True),
            "by block": gathered.record(ranks, keep=False),
        }
    if f"{ranks.strategy}-{ranks.world}" in compiled_pair.WHERE:
        found["compiled.json"] = compiled_pair.record(ranks)
    if ranks.main:
        for name, value in found.items():
            (out / name).write_text(json.dumps(value))
    mutant.train(ranks, mutant.MADE.get(f"{ranks.strategy}-{ranks.world}", ()), out / "mistakes")
    assert "transformers" not in sys.modules  # Accelerate's DeepSpeed plugin would need it; nothing here does
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None, sys.argv[3:])
    end_process(0)
