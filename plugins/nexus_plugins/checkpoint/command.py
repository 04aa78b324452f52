"""`nexus-run export`: export the model of a checkpoint."""

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
@click.option("--ema", is_flag=True, help="Use the averaged weights of the plugin ema.")
@click.option("--to", metavar="FORMAT", help="Export format of an installed package, such as hf.")
@click.option(
    "--adapters",
    type=click.Choice(["merged", "alone"]),
    help="With --to: merge adapters into the base weights (default), or write only them.",
)
@click.option("--shard", metavar="SIZE", help="With --to: maximum size of a weights file (5GB).")
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
    """Export a checkpoint's weights, settings and tokenizer to a new folder.

    CHECKPOINT is a checkpoint folder (runs/x/checkpoints/best) or a run folder (its newest).
    """
    with reported(debug):
        from nexus_plugins.checkpoint.export import Options, export, exporter

        if to is not None:
            options = Options(ema=ema, adapters=adapters or "merged", shard=shard or "5GB")
            for path in exporter(to)(checkpoint, out, options):
                click.echo(path)
            return
        if adapters or shard:
            raise ConfigError("--adapters and --shard need a format: --to FORMAT")
        for path in export(checkpoint, out, ema=ema):
            click.echo(path)
        click.echo(f"description of the model, and how to load it: {out / 'README.md'}")
