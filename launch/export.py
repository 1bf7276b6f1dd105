"""`shardgan export`: whole networks of a run, for use without ShardGAN's launcher."""

from __future__ import annotations

from pathlib import Path

import click

from launch.checkpoint import checkpoint_option
from launch.paths import UserPath
from pipeline.config import load
from pipeline.run.export import export as write


@click.command()
@click.argument("run", type=UserPath())
@click.option("--out", type=UserPath(), required=True, help="Folder to write to.")
@checkpoint_option
def export(run: Path, out: Path, checkpoint: str) -> None:
    """Write G_ema, G and D of a checkpoint of RUN: whole, fp32, safetensors, with a model card."""
    for file in write(run, out, checkpoint):
        click.echo(f"{file}  {file.stat().st_size:,} bytes")
    if decoder := load(run / "config.yaml").data.decoder:
        click.echo(f"G makes latents; what makes images of them, {decoder}, is not among these files.")
