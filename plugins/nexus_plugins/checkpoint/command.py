"""`nexus-run export`: the model of a checkpoint, by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from nexus_core.cli.errors import reported
from nexus_core.errors import ConfigError

__all__ = ["main"]


@click.command(name="export", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--ema", is_flag=True, help="Take the averaged weights of the plugin ema.")
@click.option("--to", metavar="FORMAT", help="A format of an installed package, such as hf.")
@click.option(
    "--adapters",
    type=click.Choice(["merged", "alone"]),
    help="With --to: put adapters into the weights below (the default), or write them alone.",
)
@click.option("--shard", metavar="SIZE", help="With --to: largest file of weights (5GB).")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(
    checkpoint: Path,
    out: Path,
    ema: bool,
    to: str | None,
    adapters: Literal["merged", "alone"] | None,
    shard: str | None,
    debug: bool,
) -> None:
    """Write a checkpoint's weights, settings and tokenizer into a folder of their own.

    CHECKPOINT is the folder of one (runs/x/checkpoints/best), or of a run: its newest one.
    """
    with reported(debug):
        from nexus_plugins.checkpoint.export import Options, export, exporter

        if to is not None:
            options = Options(ema=ema, adapters=adapters or "merged", shard=shard or "5GB")
            for path in exporter(to)(checkpoint, out, options):
                click.echo(path)
            return
        if adapters or shard:
            raise ConfigError("--adapters and --shard are for a format; name one: --to FORMAT")
        for path in export(checkpoint, out, ema=ema):
            click.echo(path)
        click.echo(f"what this model is, and which programs read it: {out / 'README.md'}")
