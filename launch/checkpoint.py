"""The option that says which checkpoint of a run a command uses."""

from __future__ import annotations

import click

checkpoint_option = click.option(
    "--checkpoint",
    default="newest",
    metavar="best|KIMG",
    help="Of the checkpoints kept, the one with the best score or at this kimg; default: the newest.",
)
