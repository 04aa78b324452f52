"""`nexus-run export`: the model of a checkpoint, by itself."""

from __future__ import annotations

from pathlib import Path

import click

from nexus_core.cli.errors import reported

__all__ = ["main"]


@click.command(name="export", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--ema", is_flag=True, help="Take the averaged weights of the plugin ema.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(checkpoint: Path, out: Path, ema: bool, debug: bool) -> None:
    """Write a checkpoint's weights, settings and tokenizer into a folder of their own.

    CHECKPOINT is the folder of one (runs/x/checkpoints/best), or of a run: its newest one.
    """
    with reported(debug):
        from nexus_plugins.checkpoint.export import export

        for path in export(checkpoint, out, ema=ema):
            click.echo(path)
        click.echo(f"what this model is, and which programs read it: {out / 'README.md'}")
