"""`shardgan push`: an export, published on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from launch.paths import UserPath


@click.command()
@click.argument("export", type=UserPath())
@click.argument("repository", metavar="USER/NAME")
@click.option("--public", is_flag=True, help="Make the repository public. Default: private.")
@click.option("--replace", is_flag=True, help="Overwrite an export that is there.")
def push(export: Path, repository: str, public: bool, replace: bool) -> None:
    """Publish EXPORT, a folder that `shardgan export` wrote, as USER/NAME on the Hugging Face Hub.

    Needs `pip install 'shardgan[hub]'` and a login (`hf auth login`, or HF_TOKEN). It sends the files that
    export.json lists, and no others. Before you push, you may edit README.md, the card that the Hub
    shows.
    """
    from pipeline.run.hub import push as publish

    click.echo(publish(export, repository, public=public, replace=replace))
