"""A device that holds what updates need holds what is drawn and scored between them."""

from __future__ import annotations

from launching import FASHION

import pipeline.train
from pipeline.gan import dcgan

CONFIG = f"""
data: {{train: {FASHION}, size: 28, channels: 1, batch_size: 12, batch_gpu: 6, workers: 0}}
G: {{width: 4, z_dim: 8}}
D: {{width: 4}}
run: {{tick_kimg: 0.012, total_kimg: 0.024}}
score: {{images: 20}}
track: {{wandb: false}}
"""


def test_grids_and_scores_take_no_more_images_at_once_than_updates(
    tmp_path, signals_kept, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large.yaml").write_text(CONFIG)
    forward, seen = dcgan.Generator.forward, set[tuple[bool, int]]()

    def watched(G, z, c=None):
        seen.add((G.training, len(z)))
        return forward(G, z, c)

    monkeypatch.setattr(dcgan.Generator, "forward", watched)
    assert pipeline.train.main(["large.yaml"]) == 0
    assert max(count for training, count in seen if training) == 6
    assert max(count for training, count in seen if not training) == 6
