"""The `shardgan` command. Each subcommand is a file or folder of its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from launch.lazy import LazyGroup
from pipeline import console
from pipeline.cores import BINDING

# webdataset reads it when imported: it then decodes no pickles and runs no shell commands in shard names.
os.environ.setdefault("WDS_SECURE", "1")

COMMANDS = {
    "prepare": ("launch.prepare:prepare", "Turn images into tar shards with an index."),
    "doctor": ("launch.doctor:doctor", "Find what would go wrong, before anything is started."),
    "train": ("launch.train:train", "Train, on this machine, under any strategy."),
    "submit": ("launch.slurm.submit:submit", "Train on a Slurm cluster."),
    "sample": ("launch.sample:sample", "Write generated images: a picture, an animation or separate files."),
    "project": ("launch.project:project", "Find the latents of real images."),
    "evaluate": ("launch.evaluate:evaluate", "Score a run on held-out images."),
    "select": ("launch.select:select", "Choose λ by cross-validation, with a table, a curve and a report."),
    "report": ("launch.report:report", "Write runs or a selection as one HTML page."),
    "plot": ("launch.plot:plot", "Draw the curves of runs in one picture."),
    "compare": ("launch.compare:compare", "Show in which settings and scores runs differ."),
    "export": ("launch.export:export", "Write the networks for others to use, with a model card."),
    "push": ("launch.push:push", "Publish an export on the Hugging Face Hub."),
    "selfcheck": ("launch.selfcheck:selfcheck", "Compare every strategy with plain torch, on this machine."),
    "bench": ("launch.bench:bench", "Compare cost with simpler code and with theory."),
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardgan", prog_name="shardgan")
def cli() -> None:
    """Train GANs on many GPUs, with exact L2 penalties on sharded weights."""


def main() -> None:
    """Exit status: 0 done, or stopped by a scheduler's signal; 130 stopped by Ctrl-C; 2 what the user
    can fix (one message); 1 any other failure."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see launch/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    console.take()
    os.environ["PYTHONSAFEPATH"] = "1"  # in children: no file in the current folder hides a module
    if not os.environ.get("OMP_NUM_THREADS", "unset").strip():  # libgomp would complain of an empty one
        del os.environ["OMP_NUM_THREADS"]
    for name in BINDING:
        os.environ.pop(name, None)
    try:
        _call()
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the exit
        click.echo("stopped", err=True)
        sys.exit(130)


def _call() -> None:
    from pipeline.config import UserError
    from pipeline.folders import provide_home
    from pipeline.wording import one_line

    try:
        Path.cwd()
    except OSError as error:  # torch's libraries would say that they cannot be loaded
        console.show_error(f"The current folder is not there any more ({error.strerror}). Enter another one.")
        sys.exit(2)
    provide_home()
    try:
        cli.main(standalone_mode=False)
        if why := console.lost():
            raise click.ClickException(f"Standard output did not take everything: {why}.")
    except UserError as error:
        console.show_error(error)
        sys.exit(2)
    except PermissionError as error:  # of a look at a folder that is closed to this user
        console.show_error(f"{error.filename or 'A file'} cannot be read or written: {error.strerror}.")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        console.show_error(f"Memory is full: {one_line(str(error))}. Ask for less at a time, or free some.")
        sys.exit(2)
    except click.UsageError as error:
        error.show()  # with the command's usage
        sys.exit(error.exit_code)
    except click.ClickException as error:
        console.show_error(error.format_message())
        sys.exit(error.exit_code)


def _is_shortage(error: Exception) -> bool:
    """Whether there was not enough memory: numpy, PyTorch on CPUs, on GPUs, and oneDNN, each in its way."""
    words = ("allocate memory", "out of memory", "could not create a primitive")
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


if __name__ == "__main__":
    main()
