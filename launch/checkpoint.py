"""The option that says which checkpoint of a run a command uses."""

from __future__ import annotations

import click

checkpoint_option = click.option(
    "--checkpoint",
    default="newest",
    metavar="best|KIMG",
    help="The one with the best score, or of this kimg, of those that the run keeps; default: the newest.",
)
