"""`shardgan report`: runs, or a selection, as a page to send."""

from __future__ import annotations

from pathlib import Path

import click

from launch.paths import UserPath


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath(), metavar="RUN...")
@click.option("--out", type=UserPath(), help="The page to write. Default: report.html in RUN, if it is one.")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write a page of the run folder RUN, of several to compare, or of a selection's folder.

    It is one HTML file that loads nothing from the network: images and their history, scores, curves,
    settings, environment, and what went wrong.
    """
    from pipeline.config import UserError
    from pipeline.run.page.document import PAGE, write
    from pipeline.wording import in_bytes

    if out is None:
        if len(runs) > 1:
            raise UserError("Where to? Several runs need --out page.html.")
        out = runs[0] / PAGE
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: a page ends in .html.")
    write(runs, out)
    click.echo(f"{out}, {in_bytes(out.stat().st_size)}")
