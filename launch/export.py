"""`shardgan export`: whole networks of a run, for use with and without ShardGAN."""

from __future__ import annotations

from pathlib import Path

import click

from launch.checkpoint import checkpoint_option
from launch.paths import UserPath
from pipeline.wording import in_kimg


@click.command()
@click.argument("run", type=UserPath())
@click.option("--out", type=UserPath(), required=True, help="Folder to write to.")
@checkpoint_option
@click.option("--onnx", is_flag=True, help="G_ema.onnx too (pip install 'shardgan[onnx]').")
def export(run: Path, out: Path, checkpoint: str, onnx: bool) -> None:
    """Write the networks of a checkpoint of RUN, for others to use: a folder with G_ema, G and D as
    safetensors, G_ema.pt2, which plain torch runs, a picture and a model card.

    `shardgan push OUT USER/NAME` publishes it on the Hugging Face Hub.
    """
    from pipeline.config import load
    from pipeline.run.export import export as write
    from pipeline.run.exported import read

    files, remarks = write(run, out, checkpoint, complete=True, onnx=onnx)
    for file in files:
        click.echo(f"{file}  {file.stat().st_size:,} bytes")
    click.echo(f"G_ema, G and D after {in_kimg(read(out).cur_nimg / 1000)} kimg: {out}/")
    for remark in remarks:
        click.echo(remark)
    if decoder := load(run / "config.yaml").data.decoder:
        click.echo(f"G makes latents; their decoder into images, {decoder}, is not among these files.")
