"""The `shardgan` command. Each subcommand is a file of its own, imported only when it is called."""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

from pipeline import console

# Read when webdataset is imported: no pickles decoded, no shell commands run for shard names.
os.environ.setdefault("WDS_SECURE", "1")

COMMANDS = {
    "prepare": "Turn images into tar shards with an index.",
    "doctor": "Find what would go wrong, before anything is started.",
    "train": "Train, on this machine, under any strategy.",
    "submit": "Train on a Slurm cluster.",
    "sample": "Write a sheet of generated images.",
    "evaluate": "Score a run on held-out images.",
    "select": "Choose λ by cross-validation, with a table, a curve and a report.",
    "export": "Write whole networks as safetensors.",
    "selfcheck": "Compare every strategy with plain torch, on this machine.",
    "bench": "Measure ratios, side by side in one run.",
}
_ELSEWHERE = {"submit": "launch.slurm.submit"}


class _Lazy(click.Group):
    """Knows its commands' names and one-line helps without importing torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = _ELSEWHERE.get(cmd_name, f"launch.{cmd_name}")
        command: click.Command = getattr(importlib.import_module(module), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardgan", prog_name="shardgan")
def cli() -> None:
    """Train GANs on many GPUs, with exact L2 penalties on sharded weights."""


def main() -> None:
    """Exit status: 0 done, or stopped by a scheduler's signal, 130 stopped by Ctrl-C, 2 bad input (one
    message), 1 anything else."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see launch/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    console.take()
    os.environ["PYTHONSAFEPATH"] = "1"  # in children too, no file in the current folder hides a module
    if not os.environ.get("OMP_NUM_THREADS", "unset").strip():  # of an empty one libgomp would complain
        del os.environ["OMP_NUM_THREADS"]
    try:
        _call()
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one would interrupt the way out
        click.echo("stopped", err=True)
        sys.exit(130)


def _call() -> None:
    from pipeline.config import UserError
    from pipeline.folders import provide_home

    provide_home()
    try:
        cli.main(standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
