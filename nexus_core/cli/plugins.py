"""`nexus-plugins`: what is installed."""

from __future__ import annotations

import click

from nexus_core.cli.check import check
from nexus_core.cli.errors import reported
from nexus_core.cli.new import new

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nexus-trainer", prog_name="nexus-plugins")
def main() -> None:
    """Look at the plugins that are installed, and begin one of your own."""


main.add_command(new)
main.add_command(check)


@main.command(name="list")
@click.option("--load/--no-load", "loading", default=True,
              help="Import each, to see that it loads; or read metadata alone.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(loading: bool, as_json: bool) -> None:
    """Every installed plugin by what it is for; one that cannot be loaded with why."""
    with reported(debug=False):
        from nexus_core.cli.listing import list_plugins, list_plugins_json

        click.echo((list_plugins_json if as_json else list_plugins)(loading=loading))


@main.command()
@click.argument("plugin", metavar="NAME|FILE.py")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def show(plugin: str, as_json: bool, debug: bool) -> None:
    """One plugin: settings, hooks, its place among the others, and its state."""
    with reported(debug):
        from nexus_core.cli.listing import show_plugin, show_plugin_json
        from nexus_core.sources import forget

        forget()
        click.echo((show_plugin_json if as_json else show_plugin)(plugin))
