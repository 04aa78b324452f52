"""`nexus-plugins`: what is installed."""

from __future__ import annotations

import click

from nexus_core.cli.check import check
from nexus_core.cli.errors import Group, reported
from nexus_core.cli.new import new

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nexus-trainer", prog_name="nexus-plugins")
def main() -> None:
    """Inspect installed plugins, and create your own."""


main.add_command(new)
main.add_command(check)


@main.command(name="list")
@click.option("--load/--no-load", "loading", default=True,
              help="Import each plugin to check that it loads, or only read metadata.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(loading: bool, as_json: bool) -> None:
    """List every installed plugin by purpose; says why if one cannot be loaded."""
    with reported(debug=False):
        from nexus_core.cli.listing import list_plugins, list_plugins_json

        click.echo((list_plugins_json if as_json else list_plugins)(loading=loading))


@main.command()
@click.argument("plugin", metavar="NAME|FILE.py")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def show(plugin: str, as_json: bool, debug: bool) -> None:
    """Show one plugin: settings, hooks, order and state."""
    with reported(debug):
        from nexus_core.cli.listing import show_plugin, show_plugin_json
        from nexus_core.sources import forget

        forget()
        click.echo((show_plugin_json if as_json else show_plugin)(plugin))
